"""Models with packed integer weights as compressed-tensors stores them ("pack-quantized").

That is what llm-compressor saves, and vLLM and `transformers` load. Each layer has `weight_packed`
(int32 `[out, words]`), `weight_scale` (`[out, groups]`), `weight_shape`, and for asymmetric grids
`weight_zero_point` (int32 `[words, groups]`, packed along the rows). Codes are a little-endian bit stream
as the course's are (`kernels.packing`), rows filled up to whole words, in versions 0.19 and 0.20 of
the library.
"""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from course_utils.compression import QuantizedLinear
from course_utils.kernels import pack


def pack_quantized(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, n_bits: int
) -> dict[str, Tensor]:
    """The tensors of one layer, by their names in the format.

    `codes` `[out, in]` and `zero_point` `[out, groups]` are integers 0..2^n_bits - 1, the weight is
    `scale` (code - zero_point), and None stands for 2^(n_bits - 1), which the format does not store. Scales
    become float32, so that no reader rounds a product.
    """
    tensors = {
        "weight_packed": _words(codes, n_bits),
        "weight_scale": scale.float(),
        "weight_shape": torch.tensor(codes.shape),
    }
    if zero_point is not None:
        tensors["weight_zero_point"] = _words(zero_point.T, n_bits).T.contiguous()
    return tensors


def save_compressed_tensors(model: PreTrainedModel, folder: Path | str) -> None:
    """Write the quantized `model` into `folder`, for `from_pretrained` beside the library compressed-tensors.

    Give that `quantization_config=CompressedTensorsConfig(dequantize=True)` where the grid has zero points:
    transformers 5.23 makes room for packed ones in no other way.

    All its quantized layers have to be `nn.Linear` once loaded, on one uniform grid, with scales of rows or
    of groups of neighbouring columns: what `affine`, `gptq` and `awq` make. Raises ValueError for others.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if not layers:
        raise ValueError("the model has no quantized layer: quantize it by quantize_model first")
    schemes = {name: _scheme(name, layer) for name, layer in layers.items()}
    if len({json.dumps(scheme) for scheme in schemes.values()}) > 1:
        raise ValueError(
            "the layers are on several grids: this writes models with one n_bits and group_size, all of them "
            "symmetric or none"
        )
    with torch.device("meta"):
        kinds = {type(type(model)(model.config).get_submodule(name)) for name in layers}
    if kinds != {nn.Linear}:
        raise ValueError(
            f"layers of {type(model).__name__} are {', '.join(sorted(k.__name__ for k in kinds))}: the "
            "library decodes nn.Linear only"
        )
    state = model.state_dict()
    for name, layer in layers.items():
        stored = layer.quantized_weight
        for tensor in stored.tensors():
            del state[f"{name}.{tensor}"]
        zero_point = None if stored.zero_point is None else stored.zero_points()
        packed = pack_quantized(stored.integer_codes(), stored.scale, zero_point, stored.n_bits)
        state |= {f"{name}.{key}": tensor for key, tensor in packed.items()}
    state = {name: t.contiguous() for name, t in _untied(state).items()}
    floats = [name for name, m in model.named_modules() if type(m) is nn.Linear]
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": next(iter(schemes.values()))}
        },
        "ignore": floats,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _words(codes: Tensor, n_bits: int) -> Tensor:
    """`codes` `[rows, n]` as int32 `[rows, words]`."""
    packed = pack(codes, n_bits)
    return pad(packed, (0, -packed.shape[1] % 4)).view(torch.int32)


def _scheme(name: str, layer: QuantizedLinear) -> dict:
    """How the format describes the layer's grid; ValueError if it does not know such."""
    weight, method = layer.quantized_weight, layer.method
    if not all(hasattr(weight, part) for part in ("integer_codes", "zero_points", "n_bits")):
        raise ValueError(
            f"layer {name}: codes of {method.name} are on no uniform grid with zero points, and "
            "pack-quantized has no other"
        )
    if getattr(weight, "group_index", None) is not None:
        raise ValueError(
            f"layer {name}: its groups are of columns in another order, which the library cannot read. "
            "Quantize with static_groups=True"
        )
    if getattr(method, "inputs", "float") != "float":
        raise ValueError(
            f"layer {name}: its inputs are quantized, and pack-quantized stores weights only"
        )
    out, columns = weight.shape
    groups = weight.scale.shape[1]
    if len(weight.scale) != out:
        raise ValueError(f"layer {name}: one scale for the whole weight: use group_size='row'")
    return {
        "num_bits": weight.n_bits,
        "type": "int",
        "symmetric": weight.zero_point is None,
        "strategy": "channel" if groups == 1 else "group",
        "group_size": None if groups == 1 else columns // groups,
    }


def _untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with each tensor under its first name only: loading ties the others to it."""
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(tensor.data_ptr(), name)
    return {name: tensor for name, tensor in state.items() if first[tensor.data_ptr()] == name}
