"""Golden vectors of GPTQModel's GPTQ: `python gptq.py FOLDER`, in an environment that has it.

Quantizes the layers of `FOLDER/gptq_layers.safetensors` and writes `FOLDER/gptqmodel_gptq.safetensors`:
codes (two in a byte, the even column in the low half), scales, zero points and group indices of every
case, and in its metadata the settings of the cases and the versions.
"""

import itertools
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from safetensors.torch import load_file, save_file


def gptq(weight: torch.Tensor, **settings) -> GPTQ:
    """Its GPTQ object on a linear layer."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    config = QuantizeConfig(
        act_group_aware=False, damp_percent=0.01, offload_to_disk=False, **settings
    )
    task = GPTQ(linear, config)
    task.quantizer.configure(perchannel=True)
    return task


def quantize(weight: torch.Tensor, hessian: torch.Tensor, case: dict) -> dict[str, torch.Tensor]:
    """Codes, scale, zero point and group index by its GPTQ from a given Hessian."""
    task = gptq(
        weight,
        bits=case["n_bits"],
        group_size=-1 if case["group_size"] == "row" else case["group_size"],
        sym=case["symmetric"],
        desc_act=case["act_order"],
        static_groups=case["static_groups"],
    )
    task.H, task.nsamples = hessian.clone(), 1
    task.finalize_hessian = lambda target_device=None: task.H
    quantized, scale, zero, index, _, _, damping, _ = task.quantize(blocksize=128)
    assert damping == 0.01
    steps = quantized / scale[:, index.long()]
    codes = (steps + zero[:, index.long()]).round()
    assert (steps - steps.round()).abs().max() < 1e-3 and codes.min() >= 0
    codes = codes.to(torch.uint8)
    return {
        "codes": codes[:, ::2] | codes[:, 1::2] << 4,
        "scale": scale,
        "zero_point": zero.to(torch.uint8),
        "group_index": index.to(torch.uint8),
    }


def cases() -> list[dict]:
    """Settings, under the names that the course gives them."""
    found = []
    for layer, sizes in {"wide": (64, 128, "row"), "narrow": (64, "row")}.items():
        for size, symmetric, act_order, static in itertools.product(sizes, *[(False, True)] * 3):
            if static and size == "row":
                continue  # has no meaning there
            found.append(
                {"layer": layer, "n_bits": 4, "group_size": size, "symmetric": symmetric,
                 "act_order": act_order, "static_groups": static}
            )  # fmt: skip
    return [*found, {**found[0], "n_bits": 3}]


def accumulated(inputs: torch.Tensor) -> torch.Tensor:
    """The Hessian it makes of batches of inputs `[batches, tokens, features]`."""
    task = gptq(torch.zeros(4, inputs.shape[-1]), bits=4, group_size=32)
    for number, batch in enumerate(inputs):
        task.add_batch(batch[None], None, batch_index=number)
    return task.finalize_hessian()


def main(folder: Path) -> None:
    layers = load_file(folder / "gptq_layers.safetensors")
    tensors, settings = {"hessian": accumulated(layers["inputs"])}, cases()
    for number, case in enumerate(settings):
        weight, hessian = layers[f"{case['layer']}.weight"], layers[f"{case['layer']}.hessian"]
        found = quantize(weight, hessian, case)
        tensors |= {f"{number}.{name}": tensor.contiguous() for name, tensor in found.items()}
    versions = {name: version(name) for name in ("gptqmodel", "torch", "transformers", "numpy")}
    versions["python"] = platform.python_version()
    # One entry: of several the order in the file would change from run to run.
    metadata = {"made": json.dumps({"cases": settings, "versions": versions})}
    save_file(tensors, folder / "gptqmodel_gptq.safetensors", metadata=metadata)
    print(len(settings), "cases,", versions)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
