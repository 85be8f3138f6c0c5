"""Learned rounding: which way each weight rounds is trained, so that a block's output changes least.

AutoRound (Cheng et al. 2023, arXiv 2309.05516; the authors' `auto_round`): W becomes S clamp(round(W / S + V)
+ Z), and V is trained by the signs of its gradient, with a straight-through gradient for rounding. The ends
of each group's range are trained as well, by factors from 0 to 1. All linear layers of a decoder block learn
together; the loss is the mean squared difference between what the block puts out and what the float block
does. The rate falls from 1 / iterations to 0, so that no V can move further than about 1/2: a weight goes to
one of its two neighbours on the grid. The result is stored like round-to-nearest's, and is as fast. Built
step by step in `chronology/tpoti_two_bit_ladder`.

Other than in the authors' code, the float block is run on the inputs that the quantized blocks before it
make, not on float ones, and the best state is the one of least loss on all sequences, looked at ten times,
not on the last batch. So the result never loses more than round-to-nearest there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_utils.compression.base import (
    Method,
    check_settings,
    check_weight,
    dequantized_linear,
)
from course_utils.grids.fake_quantization import straight_through
from course_utils.grids.uniform import code_range, group_width, scale_and_zero_point, stored_scale
from course_utils.models.walk import (
    BlockInputs,
    LinearLayer,
    hidden_states,
    linear_layers,
    replace_module,
)
from course_utils.quantizers.affine import AffineWeight

LOOKS = 10  # how often the loss is taken on all sequences


class LearningLinear(nn.Module):
    """A linear layer with a fixed weight and trained rounding: `V` and the factors of its ranges.

    It starts as round-to-nearest: V = 0, and factors of 1.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, method: "LearnedRounding"):
        super().__init__()
        self.method, self.bias = method, bias
        size = group_width(method.group_size, weight.shape[1])
        self.W = weight.detach().float().unflatten(1, (-1, size))  # [out, groups, size]
        self.low, self.high = (end[..., None] for end in self.W.aminmax(dim=2))  # [out, groups, 1]
        self.V = nn.Parameter(torch.zeros_like(self.W))
        self.factors = nn.Parameter(torch.ones(2, *self.low.shape, device=weight.device))

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale, as it will be stored, and zero point, `[out, groups, 1]` in float32, with gradients."""
        ends = self.low * self.factors[0], self.high * self.factors[1]
        exact, Z = scale_and_zero_point(*ends, *self._codes, symmetric=False)
        S = stored_scale(exact.detach(), self.method.scale_dtype).float()
        S = straight_through(S, exact)
        return S, straight_through(Z.float(), -ends[0].clamp(max=0) / exact)

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes `[out, groups, size]`, still float, with S and Z; a gradient flows through the rounding."""
        S, Z = self.grid()
        steps = self.W * (1 / S) + self.V
        return (straight_through(steps.round(), steps) + Z).clamp(*self._codes), S, Z

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` to `[..., out]`, with the weight as it would be decoded now."""
        q, S, Z = self.codes()
        return F.linear(x, (S * (q - Z)).flatten(1).to(x.dtype), self.bias)

    @torch.no_grad()
    def packed(self) -> AffineWeight:
        """What is stored of the layer in this state."""
        q, S, Z = self.codes()
        scale = S[..., 0].to(getattr(torch, self.method.scale_dtype))
        return AffineWeight.from_codes(
            q.flatten(1).int(), scale, Z[..., 0].int(), self.method.n_bits
        )

    @property
    def _codes(self) -> tuple[int, int]:
        return code_range(self.method.n_bits)


@dataclass(frozen=True)
class LearnedRounding(Method):
    """AutoRound on asymmetric groups; inputs stay float.

    `n_bits`: 2 to 8. `group_size`: how many neighbouring columns of a row share a scale, or "row".
    `iterations`: updates of a block, 200 in the paper; with 0 this is round-to-nearest. `batch`: calibration
    sequences an update; `seed` draws them. `scale_dtype`: how scales are stored.

    All linear layers of a block learn together, so name either all of a block in a mapping, or none.
    """

    n_bits: int = 2
    group_size: int | Literal["row"] = 64
    iterations: int = 200
    batch: int = 8
    seed: int = 0
    scale_dtype: Literal["float16", "float32"] = "float16"
    name: ClassVar[str] = "learned_rounding"
    weight_type: ClassVar[type] = AffineWeight

    def __post_init__(self):
        check_settings(self, wide_groups=("row",))
        for setting, least in (("iterations", 0), ("batch", 1)):
            value = getattr(self, setting)
            if type(value) is not int or value < least:
                raise ValueError(f"{setting} {value!r}: choose a whole number from {least} on")

    def check_shape(self, out: int, columns: int) -> None:
        """Refuse columns that groups of this size do not divide."""
        group_width(self.group_size, columns)

    def check_block(self, block: nn.Module) -> None:
        """Refuse a block with layers that cannot learn."""
        for layer in linear_layers(block):
            check_weight(layer.weight)
            self.check_shape(*layer.weight.shape)

    def prepare(self, block: nn.Module, inputs: BlockInputs) -> None:
        """Learn the rounding of all linear layers of `block`; the block itself stays as it is."""
        layers = {layer.name: layer for layer in linear_layers(block)}
        targets = torch.cat(list(inputs.outputs(block)))  # [sequences, length, width]
        learning = {n: LearningLinear(of.weight, of.bias, self) for n, of in layers.items()}
        with _in_place(block, layers, learning):
            self.learn(block, inputs, targets, list(learning.values()))
        # `quantize` is asked layer by layer. A weight is known by its memory, which `layers` keep alive.
        vars(self)["_learned"] = {
            of.weight.data_ptr(): (of, learning[name].packed()) for name, of in layers.items()
        }

    def learn(
        self,
        block: nn.Module,
        inputs: BlockInputs,
        targets: Tensor,
        layers: list[LearningLinear],
    ) -> list[float]:
        """Train `layers`, which stand in `block`, and leave them in the best state seen.

        `targets` `[sequences, length, width]` are the outputs to keep. Returns the loss on all sequences
        before the first update and at each look after it.
        """
        trained = [parameter for layer in layers for parameter in (layer.V, layer.factors)]
        draw = torch.Generator().manual_seed(self.seed)
        losses, best = [self._loss_on_all(block, inputs, targets)], _copies(trained)
        looks = max(1, self.iterations // LOOKS)
        for iteration in range(self.iterations):
            chosen = torch.randperm(len(targets), generator=draw)[: self.batch]
            with torch.enable_grad():
                loss = self._loss(block, inputs, targets, chosen)
                gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            rate = (1 - iteration / self.iterations) / self.iterations
            for parameter, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:  # of a layer that ran
                    parameter.data.sub_(rate * gradient.sign())
            for layer in layers:
                layer.factors.data.clamp_(0, 1)
            if (iteration + 1) % looks and iteration + 1 < self.iterations:
                continue
            losses.append(self._loss_on_all(block, inputs, targets))
            if losses[-1] < min(losses[:-1]):
                best = _copies(trained)
        for parameter, value in zip(trained, best, strict=True):
            parameter.data.copy_(value)
        return losses

    def quantize(self, weight: Tensor, statistics: None = None) -> AffineWeight:
        """The codes that `prepare` has learned for this very `weight` `[out, in]`.

        Raises ValueError for a weight that it has not seen.
        """
        check_weight(weight)
        learned = vars(self).get("_learned", {})
        if weight.data_ptr() not in learned:
            raise ValueError(
                "the rounding of this weight was never learned: a block learns as a whole, in quantize_model "
                "with calibration. For a single matrix take the method 'affine'"
            )
        _, packed = learned.pop(weight.data_ptr())
        return packed

    def linear(self, x: Tensor, weight: AffineWeight, bias: Tensor | None) -> Tensor:
        """`x @ W.T + bias`, for `x` `[tokens, in]`, with the dequantized weight."""
        return dequantized_linear(x, weight, bias)

    def _loss(
        self, block: nn.Module, inputs: BlockInputs, targets: Tensor, chosen: Tensor
    ) -> Tensor:
        output = hidden_states(block(inputs.hidden[chosen], *inputs.args, **inputs.kwargs))
        return F.mse_loss(output.float(), targets[chosen].float())

    @torch.no_grad()
    def _loss_on_all(self, block: nn.Module, inputs: BlockInputs, targets: Tensor) -> float:
        total = 0.0
        for chosen in torch.arange(len(targets)).split(self.batch):
            total += self._loss(block, inputs, targets, chosen).item() * len(chosen)
        return total / len(targets)


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


@contextmanager
def _in_place(
    block: nn.Module, layers: dict[str, LinearLayer], others: dict[str, nn.Module]
) -> Iterator[None]:
    """While this is open, `others` stand in the places of the block's `layers`."""
    try:
        for name, module in others.items():
            replace_module(block, name, module)
        yield
    finally:
        for name, layer in layers.items():
            replace_module(block, name, layer.module)
