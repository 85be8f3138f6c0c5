"""Quantization-aware training: linear layers that learn float weights through a grid of codes.

`prepare_qat` puts a `FakeQuantLinear` in the place of every linear layer, the course's training loop
trains the model like any other, and `conversion.convert` stores what the layers computed with as packed
codes: the same logits, from integers. The gradients are those of LSQ (`fake_quantization.learned_step`).
Built step by step in `foundations/ptq_vs_qat`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_utils.compression.checks import check_replaceable
from course_utils.compression.driver import naming
from course_utils.finetuning.conversion import TrainedLinear
from course_utils.grids.fake_quantization import learned_step, straight_through
from course_utils.grids.uniform import code_range, quantize
from course_utils.models.walk import linear_layers, replace_module
from course_utils.quantizers.affine import Affine, AffineWeight


class FakeQuantLinear(TrainedLinear):
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
