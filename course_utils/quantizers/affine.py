"""Round-to-nearest on uniform grids, r = S (q - Z), with int8 inputs on request.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", arXiv 1712.05877, sections 2.1 and 2.3. Built step by step in `foundations/linear_mapping`
and `foundations/dynamic_range`.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from course_utils.compression.base import (
    Method,
    QuantizedWeight,
    check_settings,
    check_weight,
    dequantized_linear,
)
from course_utils.compression.checks import ALL_ZERO
from course_utils.grids.observers import OBSERVERS, MinMax, mse_range, percentile_range
from course_utils.grids.uniform import (
    code_range,
    dequantize,
    group_width,
    quantize,
    scale_and_zero_point,
    stored_scale,
)
from course_utils.kernels import GroupedCodes, int8_matmul_zero_points, pack, unpack

INPUT_RANGE = code_range(8, signed=True)


@dataclass(frozen=True)
class AffineWeight(QuantizedWeight):
    """Codes of `n_bits` with a scale and a zero point for each group of columns of each row.

    `scale` is `[out, groups]`, or `[1, 1]` for the whole tensor. `input_scale` and `input_zero_point` are
    there if the inputs are quantized with constants.
    """

    codes: Tensor  # uint8 [out, bytes], each row packed
    scale: Tensor  # float16 or float32 [out, groups]
    zero_point: Tensor | None  # uint8 [out, bytes], packed like codes; None: 2^(n_bits - 1)
    n_bits: int
    columns: int
    input_scale: Tensor | None = None  # float32 []
    input_zero_point: Tensor | None = None  # int32 []; None: 0

    @classmethod
    def from_codes(
        cls, codes: Tensor, scale: Tensor, zero_point: Tensor | None, n_bits: int
    ) -> "AffineWeight":
        """Pack integer `codes` `[out, in]` and `zero_point` `[out, groups]`, both 0..2^n_bits - 1.

        `scale` `[out, groups]` (or `[1, 1]`) is stored in the dtype that it has, float16 or float32.
        """
        out, columns = codes.shape
        fits = scale.ndim == 2 and scale.shape[0] == out and columns % scale.shape[1] == 0
        if not fits and scale.shape != (1, 1):
            raise ValueError(
                f"scale {tuple(scale.shape)} does not divide codes {tuple(codes.shape)}: it has to be "
                "[out, groups] with groups of equal width, or [1, 1]"
            )
        if scale.dtype not in (torch.float16, torch.float32):
            raise TypeError(f"scale is stored as float16 or float32, got {scale.dtype}")
        if zero_point is not None:
            if zero_point.shape != scale.shape:
                raise ValueError(
                    f"zero_point {tuple(zero_point.shape)} and scale {tuple(scale.shape)} differ in shape"
                )
            zero_point = pack(zero_point, n_bits)
        return cls(pack(codes, n_bits), scale, zero_point, n_bits, columns)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), self.columns

    def integer_codes(self) -> Tensor:
        """The codes (uint8 `[out, in]`), unpacked."""
        return unpack(self.codes, self.n_bits, self.columns)

    def zero_points(self) -> Tensor:
        """The zero points (int32), in the shape of `scale`."""
        if self.zero_point is None:
            middle = 2 ** (self.n_bits - 1)
            return torch.full_like(self.scale, middle, dtype=torch.int32)
        return unpack(self.zero_point, self.n_bits, self.scale.shape[1]).int()

    def grouped(self) -> GroupedCodes:
        """The codes, with scale and zero point of each group in float32, which are made once and kept."""
        scale, zero = self.layout(_float_grid)
        return GroupedCodes(self.codes, scale, zero, None, self.n_bits, self.columns)

    def dequantize(self) -> Tensor:
        """The weight `[out, in]` in float32: S (q - Z)."""
        groups = self.integer_codes().unflatten(1, (self.scale.shape[1], -1))
        return dequantize(groups, self.scale[..., None], self.zero_points()[..., None]).flatten(1)


def _float_grid(weight: AffineWeight) -> tuple[Tensor, Tensor]:
    """Scales and zero points, float32 `[out, groups]`; one for the whole tensor becomes one a row."""
    groups = len(weight.codes), weight.scale.shape[1]
    grid = weight.scale, weight.zero_points()
    return tuple(part.float().expand(groups).contiguous() for part in grid)


@dataclass(frozen=True)
class Affine(Method):
    """Round-to-nearest: each weight gets the nearest value of its group's grid.

    `n_bits`: 2 to 8. `group_size`: how many neighbouring columns of a row share a scale; "row" (all of
    them) or "tensor" (one scale for the weight). `symmetric`: the zero point is the middle code, and none
    is stored; it holds for weights and inputs.
    `weight_range`: "minmax" clips nothing, "mse" searches the range of least squared error
    (`observers.mse_range`), "percentile" leaves the 0.01% largest out (`observers.percentile_range`: it
    clips something in groups of 10,000 weights and more only, so use it with "tensor").
    `inputs`: "float" leaves them, and multiplies by the dequantized weight. With "per_token" each token
    gets its own 8-bit grid from its minimum to its maximum; with "static" all tokens share one, found on
    calibration data by the observer that `input_range` names. Both multiply integers, which takes one
    scale a row: a `group_size` of "row" or "tensor".
    `scale_dtype`: how scales are stored; codes are computed with the scale as stored. ValueError for a
    scale that float16 would change by more than 1%, that is above 65,504 or below about 3e-6.
    """

    n_bits: int = 4
    group_size: int | Literal["row", "tensor"] = 64
    symmetric: bool = False
    weight_range: Literal["minmax", "mse", "percentile"] = "minmax"
    inputs: Literal["float", "per_token", "static"] = "float"
    input_range: str = "minmax"
    scale_dtype: Literal["float16", "float32"] = "float16"
    name: ClassVar[str] = "affine"
    weight_type: ClassVar[type] = AffineWeight

    def __post_init__(self):
        wide = ("row", "tensor")
        check_settings(self, wide_groups=wide)
        for setting, choices in {
            "weight_range": ("minmax", "mse", "percentile"),
            "inputs": ("float", "per_token", "static"),
            "input_range": tuple(OBSERVERS),
        }.items():
            if getattr(self, setting) not in choices:
                raise ValueError(
                    f"{setting} {getattr(self, setting)!r}: choose one of {', '.join(choices)}"
                )
        if self.inputs != "float" and self.group_size not in wide:
            raise ValueError(
                f"inputs={self.inputs!r} multiplies integers, and group_size {self.group_size} would put "
                "a scale inside the sum: use group_size='row' or 'tensor', or inputs='float'"
            )

    def check_shape(self, out: int, columns: int) -> None:
        """Refuse columns that groups of this size do not divide."""
        if self.group_size != "tensor":
            group_width(self.group_size, columns)

    @property
    def wants_statistics(self) -> bool:
        """With `inputs="static"`: the range of the layer's inputs."""
        return self.inputs == "static"

    def new_statistics(self, in_features: int, device: torch.device) -> MinMax:
        """The observer that `input_range` names, still without inputs."""
        return OBSERVERS[self.input_range](symmetric=self.symmetric)

    def quantize(self, weight: Tensor, statistics: MinMax | None = None) -> AffineWeight:
        """Codes of `weight` `[out, in]`; with `inputs="static"` also the grid of its inputs."""
        check_weight(weight)
        groups = self._groups(weight.float())
        low, high = code_range(self.n_bits)
        minimum, maximum = self._range(groups)
        scale, zero_point = scale_and_zero_point(
            minimum, maximum, low, high, symmetric=self.symmetric
        )
        stored = stored_scale(scale, self.scale_dtype)
        codes = quantize(groups, stored[:, None], zero_point[:, None], low, high)
        shape = (1, 1) if self.group_size == "tensor" else (len(weight), -1)
        quantized = AffineWeight.from_codes(
            codes.reshape(weight.shape),
            stored.reshape(shape),
            None if self.symmetric else zero_point.reshape(shape),
            self.n_bits,
        )
        if self.inputs != "static":
            return quantized
        if statistics is None:
            raise ValueError(
                "inputs='static' needs the range of the layer's inputs: give quantize_model some "
                "calibration, or use inputs='per_token'"
            )
        minimum, maximum = (end.to(weight.device) for end in statistics.range())
        if minimum == maximum == 0:
            raise ValueError(ALL_ZERO)
        input_scale, input_zero_point = scale_and_zero_point(
            minimum, maximum, *INPUT_RANGE, symmetric=self.symmetric
        )
        return replace(
            quantized,
            input_scale=input_scale,
            input_zero_point=None if self.symmetric else input_zero_point,
        )

    def linear(self, x: Tensor, weight: AffineWeight, bias: Tensor | None) -> Tensor:
        """`x @ W.T + bias`, for `x` `[tokens, in]`.

        Integer products are exact in int32, and get both scales after the sum: y = S_x S_W sum (q_x - Z_x)
        (q_W - Z_W). There a NaN or an infinity in `x` makes its row of the output NaN.
        """
        if self.inputs == "float":
            return dequantized_linear(x, weight, bias)
        finite = x.isfinite().all(1, keepdim=True)
        x_codes, x_scale, x_zero_point = self._quantized_inputs(x.where(finite, 0), weight)
        # Less the middle, unsigned codes fit into int8; uint8 wraps around just so.
        middle = 2 ** (self.n_bits - 1)
        w_codes = (weight.integer_codes() - middle).view(torch.int8)
        w_zero_point = (weight.zero_points() - middle).expand(len(w_codes), 1).flatten()
        sums = int8_matmul_zero_points(x_codes, x_zero_point, w_codes, w_zero_point)
        # One scale after the other: their product alone may be too large or too small for float32.
        y = sums * x_scale * weight.scale.float().T
        if bias is not None:
            y += bias
        return y.where(finite, torch.nan).to(x.dtype)

    def _quantized_inputs(self, x: Tensor, weight: AffineWeight) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (int8) of `x` `[tokens, in]`, their scales `[tokens, 1]` and zero points `[tokens]`."""
        if self.inputs == "per_token":
            minimum, maximum = x.aminmax(dim=1, keepdim=True)
            scale, zero_point = scale_and_zero_point(
                minimum, maximum, *INPUT_RANGE, symmetric=self.symmetric
            )
        else:
            scale = weight.input_scale.expand(len(x), 1)
            zero_point = torch.zeros_like(scale, dtype=torch.int32)
            if weight.input_zero_point is not None:
                zero_point += weight.input_zero_point
        codes = quantize(x, scale, zero_point, *INPUT_RANGE)
        return codes.to(torch.int8), scale, zero_point.flatten()

    def _groups(self, weight: Tensor) -> Tensor:
        """`weight` `[out, in]` as `[groups of all rows, group size]`."""
        if self.group_size == "tensor":
            return weight.reshape(1, -1)
        return weight.reshape(-1, group_width(self.group_size, weight.shape[1]))

    def _range(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        if self.weight_range == "mse":
            return mse_range(groups, self.n_bits, self.symmetric)
        if self.weight_range == "percentile":
            return percentile_range(groups, symmetric=self.symmetric)
        return tuple(groups.aminmax(dim=1))
