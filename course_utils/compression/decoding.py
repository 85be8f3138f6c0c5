"""A packed model back as a float one: the values of its codes, decoded once.

For measuring quality: the model computes what the packed one computes, without decoding at each call. It
is as large as the float model was, so nothing about bytes or speed can be read from it.
"""

import torch
from torch import nn

from course_utils.compression.base import QuantizedLinear
from course_utils.models.walk import replace_module

# Two float32 products in another order differ by less than this, relatively; with rounded inputs, by more.
SAME = 1e-3


@torch.no_grad()
def decode_model(model: nn.Module) -> nn.Module:
    """`model` with each `QuantizedLinear` replaced, in place, by `nn.Linear` with its decoded weight.

    Raises `ValueError` for a model that has none, and for a layer whose method also rounds its inputs (as
    LLM.int8() does): a float layer would compute something else. The model is whole then.
    """
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if not packed:
        raise ValueError("the model has no quantized layer: quantize it first")
    dtype = model.dtype
    plain = {name: _decoded(name, layer, dtype) for name, layer in packed.items()}
    for name, layer in plain.items():
        replace_module(model, name, layer)
    return model


def _decoded(name: str, layer: QuantizedLinear, dtype: torch.dtype) -> nn.Linear:
    values = layer.quantized_weight.dequantize().to(dtype)  # [out, in]
    out, columns = values.shape
    has_bias, like = layer.bias is not None, {"device": values.device, "dtype": dtype}
    made = nn.utils.skip_init(nn.Linear, columns, out, has_bias, **like)  # draws no numbers
    made.weight.copy_(values)
    if has_bias:
        made.bias.copy_(layer.bias)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, columns, generator=generator).to(values)
    expected = layer(probe)
    if (made(probe) - expected).norm() > SAME * expected.norm():
        raise ValueError(
            f"layer {name} by {layer.method} computes something else than its decoded weight does: "
            "its inputs are rounded too. Measure the packed model"
        )
    return made.requires_grad_(False)
