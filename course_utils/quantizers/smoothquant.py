"""SmoothQuant: int8 weights and inputs, with outlier features smoothed out of the inputs beforehand.

Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", arXiv 2211.10438, equations 3 and 4. A feature with large values stretches the steps of the
inputs, and weights are flat: so feature j of the inputs is divided by s_j, and column j of the weight
multiplied by it. As in the authors' code, the division is folded into the norm in front of the layers,
and only layers that read a norm are smoothed (attention's q, k, v and the first of the MLP). Built step
by step in `foundations/smoothing`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from course_utils.compression.base import Method, check_weight
from course_utils.compression.checks import ALL_ZERO
from course_utils.compression.driver import gather
from course_utils.grids.vectorwise import vectorwise_quantize
from course_utils.models.structure import norm_groups
from course_utils.models.walk import BlockInputs, LinearLayer, linear_layers
from course_utils.quantizers.llm_int8 import Int8Weight, int8_linear

SMALLEST = 1e-5  # the authors' lower bound of a weight's maximum, and of a factor


class FeatureMaxima:
    """Largest |x| of every input feature so far, `maxima` float32 `[in]`."""

    def __init__(self, in_features: int, device: torch.device):
        self.maxima = torch.zeros(in_features, device=device)

    def update(self, x: Tensor) -> None:
        """Take in more inputs `[tokens, in]`."""
        self.maxima = torch.maximum(self.maxima, x.float().abs().amax(0))


def smoothing_factors(x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
    """Equation 4: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), float32 `[in]`, at least 1e-5.

    `x_max` `[in]`: largest magnitude of each feature over the calibration; `w_max` `[in]`: of its weights,
    over the rows of all layers that read it, taken as at least 1e-5. A feature that was 0 on the
    whole calibration gets 1: the authors' bound of 1e-5 would multiply whatever it holds later by
    100,000.
    """
    x_max, w_max = x_max.float(), w_max.float().clamp(min=SMALLEST)
    factors = (x_max**alpha / w_max ** (1 - alpha)).clamp(min=SMALLEST)
    return torch.where(x_max > 0, factors, 1.0)


@dataclass(frozen=True)
class SmoothQuant(Method):
    """Smoothing, then int8: weights by the absmax of each row, inputs as `inputs` says.

    `alpha`: how much of the difficulty moves from the inputs to the weights. At 1 all smoothed features are
    equally large; 0 is not "no smoothing": it makes the weights' columns equally large instead.
    `inputs`: "per_token" scales every token by its own absmax; "static" all of them by the largest
    magnitude seen in calibration, and what exceeds that later is clipped to it.
    """

    alpha: float = 0.5
    inputs: Literal["per_token", "static"] = "per_token"
    name: ClassVar[str] = "smoothquant"
    weight_type: ClassVar[type] = Int8Weight
    prefix: ClassVar[Literal["quantized", "float"]] = "float"

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha {self.alpha} must lie between 0 and 1; the paper's is 0.5")
        if self.inputs not in ("per_token", "static"):
            raise ValueError(f"inputs {self.inputs!r}: choose 'per_token' or 'static'")

    def check_block(self, block: nn.Module) -> None:
        """Refuse blocks whose norms are not known, and those with a layer behind a norm that is not float."""
        layers = {layer.name for layer in linear_layers(block)}
        for name in (name for group in norm_groups(block) for name in group.layers):
            if name not in layers:
                kind = type(block.get_submodule(name)).__name__
                raise ValueError(
                    f"layer {name} reads a norm, and has no float weight to fold the factors into: it is a "
                    f"{kind}. Smooth a block before its layers are quantized."
                )

    def prepare(self, block: nn.Module, inputs: BlockInputs) -> None:
        """Divide what the block's norms put out by the factors, and multiply the layers they feed."""
        groups = norm_groups(block)
        fed = [[LinearLayer(n, block.get_submodule(n)) for n in group.layers] for group in groups]
        maxima = {
            layers[0]: FeatureMaxima(layers[0].weight.shape[1], layers[0].weight.device)
            for layers in fed
        }
        gather(block, inputs, maxima)
        for group, layers in zip(groups, fed, strict=True):
            w_max = torch.stack([layer.weight.abs().amax(0) for layer in layers]).amax(0)
            factors = smoothing_factors(maxima[layers[0]].maxima, w_max, self.alpha)
            for parameter in group.norm.parameters():  # weight, and LayerNorm's bias
                parameter.data.div_(factors)
            for layer in layers:
                layer.weight.mul_(factors)

    @property
    def wants_statistics(self) -> bool:
        """With `inputs="static"`: the inputs' maxima."""
        return self.inputs == "static"

    def new_statistics(self, in_features: int, device: torch.device) -> FeatureMaxima:
        """The inputs' maxima, for their static scale; still without inputs."""
        return FeatureMaxima(in_features, device)

    def quantize(self, weight: Tensor, statistics: FeatureMaxima | None = None) -> Int8Weight:
        """Codes of each row of a smoothed `weight` `[out, in]`, rounded half to even, -127..127."""
        check_weight(weight)
        codes, absmax, _ = vectorwise_quantize(weight)
        if self.inputs == "per_token":
            return Int8Weight(codes, absmax)
        if statistics is None:
            raise ValueError(
                "inputs='static' needs the statistics of the layer's inputs: give quantize_model some "
                "calibration, or use inputs='per_token'"
            )
        if not statistics.maxima.any():
            raise ValueError(ALL_ZERO)
        return Int8Weight(codes, absmax, input_absmax=statistics.maxima.amax())

    def linear(self, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        """The integer product, times the two scales. A NaN or infinity in a row of `x` makes it NaN."""
        if weight.input_absmax is None:
            codes, absmax, _ = vectorwise_quantize(x)
        else:
            codes, absmax = _static_codes(x, weight.input_absmax)
        return int8_linear(codes, absmax, weight, bias).to(x.dtype)


def _static_codes(x: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of `x` `[tokens, in]` by one scale, clipped to -127..127, and that scale for each token."""
    x = x.float()
    inverse = 127 / absmax
    inverse = torch.where(inverse.isfinite(), inverse, 0)
    bad = ~x.isfinite().all(1)
    codes = (x * inverse).round().clamp(-127, 127).masked_fill(bad[:, None], 0).to(torch.int8)
    return codes, absmax.expand(len(x)).masked_fill(bad, torch.nan)
