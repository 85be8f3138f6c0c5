"""AWQ: columns that meet large inputs get finer steps, by a scale that folds into what comes before.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv
2306.00978, section 3. Column j of a weight is multiplied by s_j and then rounded, and its inputs are
divided by s_j where they are made (`compression.folding`). The error that a column brings to the output
shrinks by s_j, as long as the step of its group grows by less. What the paper leaves open follows the
authors' code (github.com/mit-han-lab/llm-awq): s = mean|x|^ratio, with the ratio of least error in the
output of the module around the layers, and after that a search for the range of each group. Built step
by step in `chronology/awq_demo`. Scales are those of llm-compressor on the same inputs.

Other than in the authors' code, a group's range holds 0 (theirs collapses where all weights have one
sign), grouped-query attention has its fold as well, and GPT-2 its own, a feature that was always 0 gets
no scale, and ranges are searched on all tokens, not on 512.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from course_utils.compression.base import (
    Method,
    check_settings,
    check_weight,
    dequantized_linear,
)
from course_utils.compression.checks import ALL_ZERO
from course_utils.compression.driver import gather
from course_utils.compression.folding import (
    Fold,
    apply_fold,
    check_folds,
    folds_of,
    pool,
    source_features,
)
from course_utils.grids.uniform import (
    SCALE_TOLERANCE,
    code_range,
    group_width,
    scale_and_zero_point,
)
from course_utils.models.walk import BlockInputs, Call, LinearLayer, hidden_states, linear_layers
from course_utils.quantizers.affine import Affine, AffineWeight

Part = TypeVar("Part", Tensor, list[Call])  # of what candidates are tried on

# Candidates (ratio, duo) of a search. "duo" scales by mean|x|^ratio / mean|w|^(1 - ratio): ratio 0 is not the
# identity there, which comes first therefore.
GRIDS: dict[str, tuple[tuple[float, bool], ...]] = {
    "authors": tuple((i / 20, False) for i in range(20)),
    "llmcompressor": tuple((i / 19, False) for i in range(20)),
    "duo": ((0.0, False), *((i / 18, True) for i in range(19))),
}
CLIPPING = tuple(1 - i / 20 for i in range(10))  # 1.00 .. 0.55 of a group's largest magnitude
# Queries and keys are never clipped, since their errors meet in a product. In GPT-2 the values go with them.
UNCLIPPED = {"q_proj", "k_proj", "c_attn"}
SMALLEST = 1e-4  # the authors' lower bound of a scale, before it is normalised


class InputMoments:
    """Mean |x| of every input feature, and the sums of all products of two, over the tokens seen."""

    def __init__(self, in_features: int, device: torch.device):
        self.tokens = 0
        self._magnitude = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._products = torch.zeros(in_features, in_features, device=device)

    def update(self, x: Tensor) -> None:
        """Take in more inputs `[tokens, in]`."""
        x = x.float()
        self.tokens += len(x)
        self._magnitude += x.abs().sum(0)
        self._products.addmm_(x.T, x)

    @property
    def magnitude(self) -> Tensor:
        """Mean |x| of each feature, float32 `[in]`."""
        return (self._magnitude / self.tokens).float()

    @property
    def products(self) -> Tensor:
        """E[x x^T], float32 `[in, in]`."""
        return self._products / self.tokens


def squared_output(weight: Tensor, products: Tensor) -> float:
    """E|x W^T|^2 of a `weight` `[out, in]`, summed over outputs; `products` are E[x x^T]."""
    return ((weight @ products) * weight).sum().item()


def activation_scale(magnitude: Tensor, ratio: float, weight: Tensor | None = None) -> Tensor:
    """The scale of each feature, float32 `[features]`: mean|x|^ratio over the root of largest times smallest.

    `magnitude` `[features]` is mean |x|. With `weight` `[features]`, the mean size of a feature's weights
    (`relative_magnitude`), llm-compressor's duo scaling: mean|x|^ratio / (weight^(1 - ratio) + 1e-4).
    Scales are taken as at least 1e-4 before they are normalised. A feature that was 0 on the whole
    calibration gets 1: nothing is known of it.
    """
    seen = magnitude > 0
    scale = magnitude.float() ** ratio
    if weight is not None:
        scale = scale / (weight.float() ** (1 - ratio) + 1e-4)
    scale = scale.clamp(min=SMALLEST)
    largest, smallest = scale[seen].max(), scale[seen].min()
    return torch.where(seen, scale / (largest * smallest).sqrt(), 1.0)


def relative_magnitude(weights: list[Tensor], group_size: int | Literal["row"]) -> Tensor:
    """Mean over all rows of |w| over the largest of its group, `[in]`, for duo scaling."""
    total = torch.zeros(weights[0].shape[1], dtype=torch.float64, device=weights[0].device)
    for weight in weights:
        groups = _grouped(weight.float().abs(), group_size)
        total += (groups / (groups.amax(2, keepdim=True) + 1e-6)).flatten(1).double().sum(0)
    return (total / sum(map(len, weights))).float()


@dataclass(frozen=True)
class FoundScale:
    """What the search found for one fold of a block."""

    fold: Fold
    scale: Tensor  # float32 [features]
    ratio: float
    duo: bool
    # Mean squared error of the inspected module's output for each candidate of the grid, in its order; NaN
    # for those that were left out after the first part.
    losses: tuple[float, ...]


@dataclass(frozen=True)
class AWQ(Method):
    """Scales by activations folded into each block, then round-to-nearest in ranges that are searched.

    `n_bits`, `group_size`, `symmetric`, `scale_dtype`: the grid of the weights, as in `Affine`; the paper's
    groups are of 128.
    `ratio`: the grid on which the ratio is searched, one of `GRIDS`, or a number: the same ratio for
    all, without a search. 0 leaves the block as it is.
    `clip`: whether the range of each group is searched, 1.00 to 0.55 times its largest magnitude;
    queries and keys keep theirs. With ratio 0 and no clipping this is round-to-nearest, code for code.
    `finalists`: all candidates are tried on a small part, and then only the `finalists` that lose least
    there, and ratio 0, on the rest. The part of a module of several layers, which has to run for each
    candidate, is the first sixteenth of the calibration sequences; that of a single layer, whose inputs'
    products tell its error without a run, every eighth output. None: all candidates on everything, as the
    authors do.
    """

    n_bits: int = 4
    group_size: int | Literal["row"] = 128
    symmetric: bool = False
    ratio: float | str = "authors"
    clip: bool = True
    finalists: int | None = 2
    scale_dtype: Literal["float16", "float32"] = "float16"
    name: ClassVar[str] = "awq"
    weight_type: ClassVar[type] = AffineWeight
    prefix: ClassVar[Literal["quantized", "float"]] = "float"

    def __post_init__(self):
        check_settings(self, wide_groups=("row",))
        number = isinstance(self.ratio, int | float) and not isinstance(self.ratio, bool)
        if not (0 <= self.ratio <= 1 if number else self.ratio in GRIDS):
            raise ValueError(
                f"ratio {self.ratio!r}: choose a grid ({', '.join(GRIDS)}), or a number from 0 to 1"
            )
        if self.finalists is not None and (type(self.finalists) is not int or self.finalists < 1):
            raise ValueError(
                f"finalists {self.finalists!r}: choose a positive number, or None for all"
            )

    @property
    def candidates(self) -> tuple[tuple[float, bool], ...]:
        """What is searched: ratios, each with whether the weights' sizes count too (duo)."""
        return GRIDS[self.ratio] if isinstance(self.ratio, str) else ((self.ratio, False),)

    @property
    def rounding(self) -> Affine:
        """Round-to-nearest with the settings of this method's grid."""
        return Affine(self.n_bits, self.group_size, self.symmetric, scale_dtype=self.scale_dtype)

    def for_layer(self, name: str) -> Method:
        """Round-to-nearest for layers that are not clipped."""
        clipped = self.clip and name.rpartition(".")[2] not in UNCLIPPED
        return self if clipped else self.rounding

    def check_shape(self, out: int, columns: int) -> None:
        """Refuse columns that groups of this size do not divide."""
        group_width(self.group_size, columns)

    def check_block(self, block: nn.Module) -> None:
        """Refuse blocks without a mapping, shapes that do not fold, and layers that are not float."""
        check_folds(block)
        for fold in folds_of(block):
            for layer in _layers(block, fold):
                check_weight(layer.weight)
                self.check_shape(*layer.weight.shape)

    def prepare(self, block: nn.Module, inputs: BlockInputs) -> None:
        """Search the block's scales, and fold them in."""
        for found in self.search(block, inputs):
            apply_fold(block, found.fold, found.scale)

    @torch.no_grad()
    def search(self, block: nn.Module, inputs: BlockInputs) -> list[FoundScale]:
        """The best scale of each fold of a float `block`, which stays as it is; in the mapping's order.

        Best is what changes the output of the inspected module least (mean squared error) when the
        weights that read the features are rounded. Each fold is searched while all others are float.
        """
        folds = folds_of(block)
        linear = {layer.name for layer in linear_layers(block)}
        moments = {
            layer: InputMoments(layer.weight.shape[1], layer.weight.device)
            for layer in (_layers(block, fold)[0] for fold in folds)
        }
        with _keeping_calls(block, {f.inspected for f in folds} - linear) as calls:
            gather(block, inputs, moments)
        return [
            self._search_fold(block, fold, seen, calls.get(fold.inspected))
            for fold, seen in zip(folds, moments.values(), strict=True)
        ]

    @property
    def wants_statistics(self) -> bool:
        """With `clip`: the products of the inputs, which tell what a range costs."""
        return self.clip

    def new_statistics(self, in_features: int, device: torch.device) -> InputMoments:
        """The moments of the inputs, still without inputs."""
        return InputMoments(in_features, device)

    def quantize(self, weight: Tensor, statistics: InputMoments | None = None) -> AffineWeight:
        """Codes of `weight` `[out, in]`, in the ranges that cost least on the inputs if `clip` is on."""
        check_weight(weight)
        if self.clip:
            if statistics is None:
                raise ValueError(
                    "AWQ's ranges need the inputs of the layer: give quantize_model some calibration, or use "
                    "clip=False"
                )
            weight = self.clipped(weight, statistics.products)
        return self.rounding.quantize(weight)

    def clipped(self, weight: Tensor, products: Tensor) -> Tensor:
        """`weight` `[out, in]` (float32) with each group clamped to the range that costs least.

        `products` `[in, in]` is E[x x^T] of the layer's inputs. What a range costs a group of a row is the
        mean square, over tokens, of how much the group's part of the output changes by clamping and rounding.
        """
        groups = _grouped(weight.float(), self.group_size)  # [out, groups, size]
        count, size = groups.shape[1:]
        each = torch.arange(count, device=weight.device)
        blocks = products.view(count, size, count, size)[each, :, each]  # [groups, size, size]
        absmax = groups.abs().amax(2, keepdim=True)
        least = torch.full_like(absmax, torch.inf)
        limit = absmax
        for factor in CLIPPING:
            most = absmax * factor
            change = groups - self._on_grid(groups.clamp(-most, most))
            change = change.transpose(0, 1)  # [groups, out, size]
            cost = ((change @ blocks) * change).sum(2, keepdim=True).transpose(0, 1)
            better = cost < least
            least, limit = torch.where(better, cost, least), torch.where(better, most, limit)
        return groups.clamp(-limit, limit).flatten(1)

    def output_error(
        self, weight: Tensor, approximation: Tensor, statistics: InputMoments
    ) -> float | None:
        """The products tell it: no need to run the block again."""
        products = statistics.products
        power = squared_output(weight.float(), products)
        return squared_output(weight.float() - approximation, products) / power if power else 0.0

    def linear(self, x: Tensor, weight: AffineWeight, bias: Tensor | None) -> Tensor:
        """`x @ W.T + bias`, for `x` `[tokens, in]`, with the dequantized weight."""
        return dequantized_linear(x, weight, bias)

    def rounded(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Q(W s) / s: `weight` `[out, in]` rounded with its columns multiplied by `scale` `[in]`, float32."""
        return self._on_grid(_grouped(weight.float() * scale, self.group_size)).flatten(1) / scale

    def _on_grid(self, groups: Tensor) -> Tensor:
        """`groups` `[out, groups, size]` as `rounding` stores them; NaN where a step cannot be stored."""
        low, high = code_range(self.n_bits)
        minimum, maximum = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        exact, Z = scale_and_zero_point(minimum, maximum, low, high, symmetric=self.symmetric)
        S = exact.to(getattr(torch, self.scale_dtype)).float()
        S = S.where((S - exact).abs() <= SCALE_TOLERANCE * exact, torch.nan)
        return (groups * (1 / S)).round_().add_(Z).clamp_(low, high).sub_(Z).mul_(S)

    def _search_fold(
        self, block: nn.Module, fold: Fold, seen: InputMoments, calls: list[Call] | None
    ) -> FoundScale:
        """`calls` are those of the inspected module, None if that is the one layer of the fold."""
        if not seen.tokens:
            raise ValueError(
                f"layer {fold.layers[0]} never ran on the calibration: nothing tells how large its inputs "
                "are. Give more calibration"
            )
        if not seen.magnitude.any():
            raise ValueError(f"layer {fold.layers[0]}: {ALL_ZERO}")
        layers, index = _layers(block, fold), source_features(block, fold)
        magnitude, of_weights = pool(seen.magnitude, index), None
        if any(duo for _, duo in self.candidates):
            of_weights = pool(
                relative_magnitude([layer.weight for layer in layers], self.group_size), index
            )
        scales = [
            activation_scale(magnitude, ratio, of_weights if duo else None)
            for ratio, duo in self.candidates
        ]
        scales_of_columns = [scale[index] for scale in scales]
        if calls is None:
            losses = self._layer_losses(*layers, scales_of_columns, seen.products)
        else:
            module = block.get_submodule(fold.inspected)
            losses = self._module_losses(module, layers, scales_of_columns, calls)
        finite = [loss if loss < torch.inf else torch.inf for loss in losses]  # NaN is not less
        best = finite.index(min(finite))
        if finite[best] == torch.inf:
            raise ValueError(
                f"no ratio leaves the output of {fold.inspected} finite once {', '.join(fold.layers)} are "
                f"rounded with scales in {self.scale_dtype}: use scale_dtype='float32', or look for "
                "infinite values in the checkpoint"
            )
        ratio, duo = self.candidates[best]
        return FoundScale(fold, scales[best], ratio, duo, tuple(losses))

    def _layer_losses(
        self, layer: LinearLayer, scales: list[Tensor], products: Tensor
    ) -> list[float]:
        """Mean squared error of the layer's output, rounded with each of `scales`, for inputs' `products`."""
        W = layer.weight.float()
        part = torch.arange(len(W), device=W.device) % 8 == 0
        if self.finalists is None:
            part[:] = True

        def squared(number: int, rows: Tensor) -> float:
            return squared_output(rows - self.rounded(rows, scales[number]), products)

        return self._in_two_rounds(squared, W[part], W[~part], len(W))

    def _module_losses(
        self, module: nn.Module, layers: list[LinearLayer], scales: list[Tensor], calls: list[Call]
    ) -> list[float]:
        """Mean squared error of the module's output, with the layers rounded by each of `scales`."""

        def squared(number: int, some: list[Call]) -> float:
            with _weights(layers, [self.rounded(layer.weight, scales[number]) for layer in layers]):
                return sum(_squared_difference(module, call) for call in some)

        first = len(calls) if self.finalists is None else max(1, len(calls) // 16)
        elements = sum(hidden_states(call.output).numel() for call in calls)
        return self._in_two_rounds(squared, calls[:first], calls[first:], elements)

    def _in_two_rounds(
        self, squared: Callable[[int, Part], float], part: Part, rest: Part, elements: int
    ) -> list[float]:
        """Each candidate's `squared(number, ...)` over `part` and `rest`, by `elements`; NaN if left out."""
        totals = {number: squared(number, part) for number in range(len(self.candidates))}
        kept = list(totals)
        if len(rest):
            by_loss = sorted(totals, key=lambda n: (not totals[n] < torch.inf, totals[n]))
            kept = by_loss[: self.finalists]
            kept += [n for n in totals if self.candidates[n][0] == 0 and n not in kept][:1]
            for number in kept:
                totals[number] += squared(number, rest)
        return [totals[n] / elements if n in kept else torch.nan for n in totals]


def _grouped(weight: Tensor, group_size: int | Literal["row"]) -> Tensor:
    """`weight` `[out, in]` as `[out, groups, size]`."""
    return weight.unflatten(1, (-1, group_width(group_size, weight.shape[1])))


def _layers(block: nn.Module, fold: Fold) -> list[LinearLayer]:
    return [LinearLayer(name, block.get_submodule(name)) for name in fold.layers]


def _squared_difference(module: nn.Module, call: Call) -> float:
    """Sum of squares between what the module makes of a call now, and what it made then."""
    found = hidden_states(module(*call.args, **call.kwargs))
    return (found - hidden_states(call.output)).float().square().sum().item()


@contextmanager
def _weights(layers: list[LinearLayer], weights: list[Tensor]) -> Iterator[None]:
    """While this is open, the layers have these weights `[out, in]`."""
    own = [layer.weight.clone() for layer in layers]
    try:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.copy_(weight)
        yield
    finally:
        for layer, weight in zip(layers, own, strict=True):
            layer.weight.copy_(weight)


@contextmanager
def _keeping_calls(block: nn.Module, names: set[str]) -> Iterator[Mapping[str, list[Call]]]:
    """While this is open, the calls of these submodules of `block` are kept."""
    calls: dict[str, list[Call]] = {name: [] for name in names}
    handles = [
        block.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, output, kept=kept: kept.append(Call(args, kwargs, output)),
            with_kwargs=True,
        )
        for name, kept in calls.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
