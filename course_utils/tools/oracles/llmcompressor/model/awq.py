"""A whole model by llm-compressor's AWQ: `python awq.py FOLDER SETTINGS OUT`, in its environment.

Called by `course bench quantize` as `course_utils/tools/bench/quantize_once.py` is. OUT gets the weight
`[out, in]` of every linear layer, rounded, with scales still in it, and the norms they are divided out of; in
`measured.json` is what was measured, or why it cannot do what is asked.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from peak_memory import forget_peak, peak_bytes
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def refusal(settings: dict, model: torch.nn.Module) -> str | None:
    """What of the settings, or of the model, it does not have."""
    if settings["clip"]:
        return "it searches no ranges: compare it with clip=False"
    if settings["ratio"] not in ("llmcompressor", "duo"):
        return "its grids are others: compare it with ratio=duo, or ratio=llmcompressor"
    if settings["scale_dtype"] != "float32":
        return "its scales are float32: compare it with scale_dtype=float32"
    if not any(isinstance(m, torch.nn.Linear) for _, m in model.base_model.named_modules()):
        return f"it finds no linear layers in {type(model).__name__}"


def recipe(settings: dict) -> list:
    """Its settings for those of the course."""
    row = settings["group_size"] == "row"
    weights = {
        "num_bits": settings["n_bits"],
        "type": "int",
        "symmetric": settings["symmetric"],
        "strategy": "channel" if row else "group",
        "group_size": None if row else settings["group_size"],
    }
    return [
        AWQModifier(duo_scaling=settings["ratio"] == "duo"),
        QuantizationModifier(
            config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
        ),
    ]


def main(folder: Path, settings: dict, out: Path) -> None:
    torch.Tensor.pin_memory = lambda self, *_, **__: self  # it pins, which a build for CPUs refuses
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if reason := refusal(settings, model):
        (out / "measured.json").write_text(json.dumps({"refused": reason}), "utf-8")
        return
    tokens = load_file(folder / "calibration.safetensors")["tokens"]
    for tensor in model.state_dict().values():
        tensor.sum()  # read every page: files are mapped into memory lazily
    loaded = psutil.Process().memory_info().rss
    forget_peak()

    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    start = time.perf_counter()
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(folder),
        dataset=Dataset.from_dict(rows),
        recipe=recipe(settings),
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - start
    names = ("llmcompressor", "compressed-tensors", "torch", "transformers", "numpy")
    measured = {
        "seconds": seconds,
        "loaded_bytes": loaded,
        "peak_bytes": peak_bytes(),
        "bits_per_weight": None,  # nothing is packed yet
        "versions": {name: version(name) for name in names},
    }
    weights = {}
    for name, module in model.named_modules():
        if hasattr(module, "quantization_scheme"):  # float until the model runs, or is saved
            scheme = module.quantization_scheme.weights
            rounded = forward_quantize(module, module.weight, "weight", scheme)
            weights[name] = rounded.detach().contiguous()
        elif getattr(module, "weight", None) is not None and module.weight.ndim == 1:
            weights[name] = module.weight.detach().contiguous()  # a norm, divided by scales
    save_file(weights, out / "weights.safetensors")
    (out / "measured.json").write_text(json.dumps(measured), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
