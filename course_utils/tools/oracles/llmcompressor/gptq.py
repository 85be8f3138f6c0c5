"""Golden vectors of llm-compressor's GPTQ: `python gptq.py FOLDER`, in an environment that has it.

Quantizes the layers of `FOLDER/gptq_layers.safetensors` and writes
`FOLDER/llmcompressor_gptq.safetensors`: codes (two in a byte, the even column in the low half), scales
and zero points of every case, and in its metadata the settings of the cases and the versions. All its groups
are static.
"""

import itertools
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian
from safetensors.torch import load_file, save_file


def quantize(weight: torch.Tensor, hessian: torch.Tensor, case: dict) -> dict[str, torch.Tensor]:
    """Codes, scale and zero point by its GPTQ from a given Hessian; its codes are signed, ours not."""
    columns, size = weight.shape[1], case["group_size"]
    row = size == "row"
    settings = QuantizationArgs(
        num_bits=case["n_bits"],
        type="int",
        symmetric=case["symmetric"],
        strategy="channel" if row else "group",
        group_size=None if row else size,
        actorder="weight" if case["act_order"] and not row else None,
    )
    if row:  # an order is refused in the settings then, but quantize_weight itself takes it
        settings.actorder = "weight" if case["act_order"] else None
    # It finds its grids on the float weight as it is. The authors' code does that for whole rows, and
    # for groups after it has zeroed the weights of features that are always zero.
    seen = weight if row else weight.where(hessian.diagonal() != 0, 0)
    groups = seen.unflatten(1, (-1, columns if row else size))
    scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), settings)
    quantized, _, fell_back = quantize_weight(
        weight.clone()[None], hessian.clone()[None], scale[None], zero[None], None, settings,
        blocksize=128, percdamp=0.01,
    )  # fmt: skip
    assert not fell_back.any()
    steps = quantized[0].unflatten(1, (scale.shape[1], -1)) / scale[..., None]
    middle = 2 ** (case["n_bits"] - 1)
    codes = (steps + zero[..., None]).round().flatten(1) + middle
    assert (steps - steps.round()).abs().max() < 1e-3 and codes.min() >= 0
    codes = codes.to(torch.uint8)
    return {
        "codes": codes[:, ::2] | codes[:, 1::2] << 4,
        "scale": scale,
        "zero_point": (zero + middle).to(torch.uint8),
    }


def cases() -> list[dict]:
    """Settings, under the names that the course gives them."""
    return [
        {"layer": layer, "n_bits": 4, "group_size": size, "symmetric": symmetric,
         "act_order": act_order, "static_groups": True}
        for layer, sizes in {"wide": (64, 128, "row"), "narrow": (64, "row")}.items()
        for size, symmetric, act_order in itertools.product(sizes, *[(False, True)] * 2)
    ]  # fmt: skip


def accumulated(inputs: torch.Tensor) -> torch.Tensor:
    """The Hessian it makes of batches of inputs `[batches, tokens, features]`."""
    module = torch.nn.Linear(inputs.shape[-1], 4)
    hessian, samples = make_empty_hessian(module), torch.zeros(())
    for batch in inputs:
        hessian, samples = accumulate_hessian(batch[None], module, hessian, samples)
    return hessian / samples


def main(folder: Path) -> None:
    layers = load_file(folder / "gptq_layers.safetensors")
    tensors, settings = {"hessian": accumulated(layers["inputs"])}, cases()
    for number, case in enumerate(settings):
        weight, hessian = layers[f"{case['layer']}.weight"], layers[f"{case['layer']}.hessian"]
        found = quantize(weight, hessian, case)
        tensors |= {f"{number}.{name}": tensor.contiguous() for name, tensor in found.items()}
    names = ("llmcompressor", "compressed-tensors", "torch", "transformers", "numpy")
    versions = {name: version(name) for name in names} | {"python": platform.python_version()}
    # One entry: of several the order in the file would change from run to run.
    metadata = {"made": json.dumps({"cases": settings, "versions": versions})}
    save_file(tensors, folder / "llmcompressor_gptq.safetensors", metadata=metadata)
    print(len(settings), "cases,", versions)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
