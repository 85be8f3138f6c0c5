"""Quantization-aware training: linear layers that learn float weights through a grid of codes.

`prepare_qat` puts a `FakeQuantLinear` in the place of every linear layer, the course's training loop
trains the model like any other, and `convert` stores what the layers computed with as packed codes:
the same logits, from integers. The gradients are those of LSQ (`fake_quantization.learned_step`). Built
step by step in `foundations/ptq_vs_qat`.
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_utils.compression.base import QuantizedLinear
from course_utils.compression.checks import check_replaceable
from course_utils.compression.driver import LayerReport, naming
from course_utils.compression.model import Report, float_parts
from course_utils.compression.saving import mark_quantized
from course_utils.grids.fake_quantization import learned_step, straight_through
from course_utils.grids.uniform import code_range, quantize
from course_utils.models.walk import linear_layers, replace_module
from course_utils.quantizers.affine import Affine, AffineWeight


class FakeQuantLinear(nn.Module):
    """A linear layer that trains a float weight and its steps, and computes with values on their grid.

    It starts on the grid of round-to-nearest, `method.quantize(weight)`, and so with its outputs. Trained
    is the logarithm of each step: a step is positive whatever an update does, and one update of AdamW
    changes it by about the learning rate, relatively, whether it is large or small. The parameter is a
    vector, so that the training loop does not decay it. The forward pass takes the step as it will be
    stored, rounded to `method.scale_dtype`, with a straight-through gradient.
    """

    def __init__(self, method: Affine, weight: Tensor, bias: Tensor | None):
        super().__init__()
        start = method.quantize(weight).scale  # [out, groups] or [1, 1]
        self.method = method
        self._step_shape = start.shape
        self.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.log_step = nn.Parameter(start.float().log().flatten())

    def step(self) -> Tensor:
        """The steps `[out, groups]` (or `[1, 1]`) in float32, each a number of the stored dtype."""
        step = self.log_step.exp().reshape(self._step_shape)
        stored = step.detach().to(self._stored_dtype).float()
        if not ((stored > 0) & stored.isfinite()).all():
            raise ValueError(
                f"steps from {step.min().item():.3g} to {step.max().item():.3g} do not fit into "
                f"{self.method.scale_dtype}: lower the learning rate, or use scale_dtype='float32'"
            )
        return straight_through(stored, step)

    def fake_quantized_weight(self) -> Tensor:
        """The weight `[out, in]` that the layer computes with: float32, on the grid."""
        low, high = code_range(self.method.n_bits, signed=True)
        return learned_step(self._groups(), self.step()[..., None], low, high).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` to `[..., out]`."""
        return F.linear(x, self.fake_quantized_weight(), self.bias)

    @torch.no_grad()
    def quantized_weight(self) -> AffineWeight:
        """The packed codes of `fake_quantized_weight()`: `dequantize()` gives the same, bit for bit."""
        low, high = code_range(self.method.n_bits)
        step, middle = self.step(), torch.tensor(2 ** (self.method.n_bits - 1))
        codes = quantize(self._groups(), step[..., None], middle, low, high).flatten(1)
        return AffineWeight.from_codes(codes, step.to(self._stored_dtype), None, self.method.n_bits)

    def _groups(self) -> Tensor:
        return self.weight.unflatten(1, (self._step_shape[1], -1))  # [out, groups, size]

    @property
    def _stored_dtype(self) -> torch.dtype:
        return getattr(torch, self.method.scale_dtype)

    def extra_repr(self) -> str:
        out, columns = self.weight.shape
        return f"{columns}, {out}, {self.log_step.numel()} steps, {self.method}"


def prepare_qat(model: nn.Module, method: Affine) -> None:
    """Replace every linear layer of `model`, in place, by a `FakeQuantLinear` on the grid of `method`.

    The model's outputs are then those of `quantize_model(model, method)`. Embeddings and LM head stay
    as they are, and are trained with the rest. Raises `ValueError` or `TypeError` if the grid is not
    symmetric (LSQ learns no zero point), if inputs are quantized, if the model is not float32, or for
    weights that `method` cannot quantize; the model is whole then.
    """
    if not isinstance(method, Affine):
        raise TypeError(f"training learns the grid of the method 'affine', got {method!r}")
    if not method.symmetric:
        raise ValueError(
            f"{method} has zero points, and LSQ learns steps alone: use symmetric=True"
        )
    if method.inputs != "float":
        raise ValueError(f"inputs={method.inputs!r}: only weights are trained; use inputs='float'")
    layers = linear_layers(model)
    if not layers:
        raise ValueError("the model has no float linear layer left: is it quantized already?")
    prepared = {}
    for layer in layers:
        with naming(f"layer {layer.name}"):
            check_replaceable(layer)
            if layer.weight.dtype != torch.float32:
                raise TypeError(
                    f"weights are {layer.weight.dtype}, too coarse for small updates: train in float32, "
                    "model.float()"
                )
            prepared[layer.name] = FakeQuantLinear(method, layer.weight, layer.bias)
    for name, module in prepared.items():
        replace_module(model, name, module)


@torch.no_grad()
def convert(model: nn.Module) -> Report:
    """Replace every `FakeQuantLinear` of `model`, in place, by a `QuantizedLinear` with packed codes.

    Codes and steps stand for the very weights that the layers computed with: the logits stay as they were,
    and the float weights are gone. The report compares with those float weights. Raises `ValueError` if
    there is no such layer, or if training left weights or steps that have no code; the model is whole then.
    """
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, FakeQuantLinear)]
    if not layers:
        raise ValueError("the model has no FakeQuantLinear: call prepare_qat and train it first.")
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
