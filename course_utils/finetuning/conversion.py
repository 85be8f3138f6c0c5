"""From layers that train float weights through codes to layers that hold the codes."""

import time

import torch
from torch import Tensor, nn

from course_utils.compression.base import Method, QuantizedLinear, QuantizedWeight
from course_utils.compression.driver import LayerReport, naming
from course_utils.compression.model import Report, float_parts
from course_utils.compression.saving import mark_quantized
from course_utils.models.walk import replace_module


class TrainedLinear(nn.Module):
    """A linear layer that trains a float weight `[out, in]` and computes with its codes."""

    method: Method
    weight: nn.Parameter
    bias: Tensor | None

    def quantized_weight(self) -> QuantizedWeight:
        """What the layer computes with, as packed codes."""
        raise NotImplementedError


@torch.no_grad()
def convert(model: nn.Module) -> Report:
    """Replace every `TrainedLinear` of `model`, in place, by a `QuantizedLinear` with packed codes.

    The codes stand for the very weights that the layers computed with. So the logits stay as they were, but
    for the order of float additions where a method multiplies integers; the float weights are gone. The
    report compares with those float weights. Raises `ValueError` if there is no such layer, or if training
    left weights or steps that have no code; the model is whole then.
    """
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, TrainedLinear)]
    if not layers:
        raise ValueError(
            "the model has no layer that trains through codes: call prepare_qat or prepare_bitnet, and "
            "train it first."
        )
    converted, reports = {}, []
    for name, layer in layers:
        start = time.perf_counter()
        with naming(f"layer {name}"):
            weight = layer.quantized_weight()
        seconds = time.perf_counter() - start
        power = layer.weight.square().sum().item()
        difference = (layer.weight - weight.dequantize()).square().sum().item()
        error = difference / power if power else 0.0
        reports.append(
            LayerReport(
                name, weight.shape, weight.bits_per_weight, weight.nbytes, error, None, seconds
            )
        )
        bias = None if layer.bias is None else layer.bias.detach()
        converted[name] = QuantizedLinear(layer.method, weight, bias)
    for name, module in converted.items():
        replace_module(model, name, module)
    mark_quantized(model)
    return Report(layers[0][1].method, reports, float_parts=float_parts(model))
