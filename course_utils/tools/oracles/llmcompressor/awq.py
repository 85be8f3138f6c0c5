"""Golden vectors of llm-compressor's AWQ: `python awq.py FOLDER`, in an environment that has it.

Scales the small Llama of `FOLDER/awq_layers.safetensors` and writes
`FOLDER/llmcompressor_awq.safetensors`: the scale of every fold in every case, and in its metadata the
settings of the cases and the versions. Scales are read from the weights, before and after.
"""

import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# It asks for one, though the tokens are there.
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))


def scaled(folder: Path, tokens: torch.Tensor, case: dict) -> LlamaForCausalLM:
    """The model in `folder` with its scales folded in; its weights are rounded only when it runs."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    row = case["group_size"] == "row"
    weights = {
        "num_bits": case["n_bits"],
        "type": "int",
        "symmetric": False,
        "strategy": "channel" if row else "group",
        "group_size": None if row else case["group_size"],
    }
    oneshot(
        model=model,
        processor=TOKENIZER,
        dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
        recipe=[
            AWQModifier(duo_scaling=case["ratio"] == "duo"),
            QuantizationModifier(
                config_groups={"all": {"targets": ["Linear"], "weights": weights}},
                ignore=["lm_head"],
            ),
        ],
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
    )
    return model


def scales(before: dict, after: dict) -> dict[str, torch.Tensor]:
    """The scale of every fold, by the name of its source: of a norm, or of the columns that read it."""
    found = {}
    for name in before:
        ratio = None
        if name.endswith("layernorm.weight"):
            ratio = before[name].double() / after[name].double()
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            ratio = after[name].double().norm(dim=0) / before[name].double().norm(dim=0)
            name = name.replace("o_proj", "v_proj").replace("down_proj", "up_proj")
        if ratio is not None:
            found[name.removesuffix(".weight")] = ratio.float()
    return found


def cases() -> list[dict]:
    """Settings, under the names that the course gives them.

    None is symmetric: the largest weight of a group lies half way between two codes then, and the
    last bit of a quotient decides which it gets, and with that which of two close ratios is better.
    """
    return [
        {"n_bits": n_bits, "group_size": group_size, "ratio": ratio}
        for ratio in ("llmcompressor", "duo")
        for n_bits, group_size in ((3, 32), (4, 32), (4, "row"))
    ]


def main(folder: Path) -> None:
    torch.Tensor.pin_memory = lambda self, *_, **__: self  # it pins, which a build for CPUs refuses
    stored = folder / "awq_layers.safetensors"
    with safe_open(stored, "pt") as file:
        shape = json.loads(file.metadata()["made"])["shape"]
    tensors = load_file(stored)
    tokens = tensors.pop("tokens")
    found, settings = {}, cases()
    with tempfile.TemporaryDirectory() as made:  # it takes models from a folder only
        model = LlamaForCausalLM(LlamaConfig(**shape))
        model.load_state_dict(tensors, strict=False)  # the head is the embedding
        model.save_pretrained(made)
        for number, case in enumerate(settings):
            after = scaled(Path(made), tokens, case).state_dict()
            found |= {f"{number}.{name}": scale for name, scale in scales(tensors, after).items()}
    names = ("llmcompressor", "compressed-tensors", "torch", "transformers", "numpy")
    versions = {name: version(name) for name in names} | {"python": platform.python_version()}
    # One entry: of several the order in the file would change from run to run.
    metadata = {"made": json.dumps({"cases": settings, "versions": versions})}
    save_file(found, folder / "llmcompressor_awq.safetensors", metadata=metadata)
    print(len(settings), "cases,", versions)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
