"""The layers that GPTQ's oracles quantize: weights, inputs and Hessians, in float32.

Run by the course's own Python, before the oracles: `python gptq_layers.py FOLDER` writes
`FOLDER/gptq_layers.safetensors`, which they and the tests read. Inputs are correlated, and of unequal size.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


def correlated(tokens: int, features: int, generator: torch.Generator) -> torch.Tensor:
    """Inputs `[tokens, features]`: features mixed out of a quarter as many, plus noise, and scaled."""
    causes = torch.randn(tokens, features // 4, generator=generator)
    mixing = torch.randn(features // 4, features, generator=generator) / (features // 4) ** 0.5
    noise = torch.randn(tokens, features, generator=generator)
    sizes = torch.exp(torch.randn(features, generator=generator) / 2)
    return (causes @ mixing + 0.3 * noise) * sizes


def layer(out: int, features: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight `[out, features]` and inputs `[2048, features]`."""
    weight = torch.randn(out, features, generator=generator) * 0.05
    return weight, correlated(2048, features, generator)


def hessian(x: torch.Tensor) -> torch.Tensor:
    """2/n x^T x, exactly symmetric."""
    x = x.double()
    return (x.T @ x * (2 / len(x))).float()


def main(folder: Path) -> None:
    generator = torch.Generator().manual_seed(2210)
    tensors = {}
    # Two blocks of 128. A row of zeros, and two features that are always zero, one of them with
    # weights large enough to decide the grid of its group.
    weight, x = layer(24, 256, generator)
    weight[5] = 0
    weight[:5, 10] *= 8
    x[:, [10, 200]] = 0
    tensors |= {"wide.weight": weight, "wide.hessian": hessian(x)}
    # A block of 128 and one of 64, nothing special.
    weight, x = layer(24, 192, generator)
    tensors |= {"narrow.weight": weight, "narrow.hessian": hessian(x)}
    # Inputs in three batches, whose Hessian the oracles accumulate themselves.
    tensors["inputs"] = correlated(96, 32, generator).reshape(3, 32, 32)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()},
        folder / "gptq_layers.safetensors",
        metadata={"torch": torch.__version__},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
