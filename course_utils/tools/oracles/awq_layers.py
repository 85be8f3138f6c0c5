"""The model that AWQ's oracles scale: a Llama of two small blocks, and its calibration.

Run by the course's own Python, before the oracles: `python awq_layers.py FOLDER` writes
`FOLDER/awq_layers.safetensors`, which they and the tests read: the model's state, in float16 to be small,
and in its metadata its configuration. Its norms make some features large, as those of real models do.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}


def main(folder: Path) -> None:
    torch.manual_seed(2306)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    generator = torch.Generator().manual_seed(978)
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight"):
            parameter.data = torch.randn(parameter.shape, generator=generator).exp()
        elif parameter.ndim == 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    tokens = torch.randint(0, SHAPE["vocab_size"], (16, 32), generator=generator)
    state = {f"model.{name}": tensor.half() for name, tensor in model.model.state_dict().items()}
    metadata = {"made": json.dumps({"shape": SHAPE, "torch": torch.__version__})}
    save_file(
        state | {"tokens": tokens},
        folder / "awq_layers.safetensors",
        metadata=metadata,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
