"""HQQ: zero points found without calibration, by a half-quadratic solver.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models",
mobiusml.github.io/hqq_blog (no paper on arXiv). Scales stay as min and max give them. The solver takes
turns: codes for the zero points, a sparse error E that the l_p norm favours, zero points for codes and
error. Codes and zero points are those of the authors' package (hqq 0.2.8) on the same weights.

Two things follow from its code, and are our observations. E is exactly 0 as long as no weight is off by
more than beta^(-1 / (2 - p)), 0.170 with the defaults, which weights of language models hardly ever are:
then p changes nothing, and the zero points are those of least squares, codes given. And `kappa`, which
was to raise beta, is not read by the package's default solver; nor is it here. Left out: 8-bit zero
points and scales, the search over scales, the solver by gradient descent.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from course_utils.compression.base import (
    Method,
    QuantizedWeight,
    check_weight,
    dequantized_linear,
)
from course_utils.grids.uniform import group_width, stored_scale
from course_utils.kernels import GroupedCodes, pack, unpack

WIDTHS = (1, 2, 3, 4, 8)
NARROW = 1e-4  # a group that spans no more gets the inverse scale 1
LARGEST = 2e4  # of an inverse scale, so that it fits into float16
PIECE = 512  # groups that the solver works on at a time


def shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """The generalised soft threshold: sign(x) max(|x| - |x|^(p - 1) / beta, 0). It is 0 up to `dead_zone`."""
    size = x.abs()
    return (size - size ** (p - 1) / beta).clamp(min=0) * x.sign()


def dead_zone(beta: float, p: float) -> float:
    """The largest |x| that `shrink` makes 0: beta^(-1 / (2 - p))."""
    return beta ** (-1 / (2 - p))


def solve(
    W: Tensor,
    inverse: Tensor,
    Z: Tensor,
    top: int,
    *,
    p: float,
    beta: float,
    iterations: int,
    in_steps: bool = False,
) -> tuple[Tensor, list[float]]:
    """Zero points `[groups, 1]` for `W` `[groups, size]`, and the mean |error| at the start of each turn.

    `inverse` `[groups, 1]` is 1 / S, `Z` the zero points to begin with, `top` the largest code. It ends
    with the first turn that begins no better than the best one, and keeps the zero points of its end, as the
    package does. `in_steps` shrinks the errors as multiples of their group's step S, and not as they are:
    then weights c W have the zero points of W. `chronology/hqq_demo` derives it; the package has no such way.
    """
    low, high = W.aminmax(dim=1, keepdim=True)
    pieces = [  # so small that they stay in the cache from one operation to the next
        (w, w * scale, scale, torch.empty_like(w), torch.empty_like(w))
        for w, scale in zip(W.split(PIECE), inverse.split(PIECE), strict=True)
    ]
    errors = []
    for _ in range(iterations):
        # Inside the grid a weight is off by half a step at most, outside by how far it lies out.
        bound = torch.maximum(high * inverse + Z - top, -low * inverse - Z).clamp(min=0.5)
        bound = (bound if in_steps else bound / inverse).max()
        shrinks = not bound <= 0.999 * dead_zone(beta, p)  # `shrink` costs most, and is mostly 0
        sums, found = [], []
        for (w, scaled, scale, codes, off), zero in zip(pieces, Z.split(PIECE), strict=True):
            torch.add(scaled, zero, out=codes).round_().clamp_(0, top)  # [groups, size]
            torch.sub(codes, zero, out=off).div_(scale)
            torch.sub(w, off, out=off)
            target = scaled
            if shrinks and in_steps:
                target = scaled - shrink(off * scale, beta, p)
            elif shrinks:
                target = (w - shrink(off, beta, p)) * scale
            sums.append(off.abs_().sum())
            found.append(codes.sub_(target).mean(1, keepdim=True))
        Z = torch.cat(found)
        errors.append(torch.stack(sums).double().sum().item() / W.numel())
        if errors[-1] >= min(errors[:-1], default=torch.inf):
            break
    return Z, errors


@dataclass(frozen=True)
class HQQWeight(QuantizedWeight):
    """Codes with a scale and a float zero point for each group.

    Along `axis` 1 a group is `size` neighbours in a row. Along 0 it is what lies one below the other once the
    weight is written as `size` rows.
    """

    codes: Tensor  # uint8 [groups, bytes], each group packed
    scale: Tensor  # float16 or float32 [groups, 1]
    zero_point: Tensor  # as scale
    rows: int
    columns: int
    n_bits: int
    axis: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def group_size(self) -> int:
        """Weights that share a scale."""
        return self.rows * self.columns // len(self.scale)

    def integer_codes(self) -> Tensor:
        """The codes (uint8 `[groups, size]`), unpacked."""
        return unpack(self.codes, self.n_bits, self.group_size)

    def grouped(self) -> GroupedCodes | None:
        """The codes row by row, with scale and zero point of each group in float32; None for other groups.

        Groups across rows, and those whose codes do not fill bytes, are decoded.
        """
        if self.axis == 0 or self.group_size * self.n_bits % 8:
            return None
        scale, zero = self.layout(_float_grid)
        codes = self.codes.view(self.rows, -1)
        return GroupedCodes(codes, scale, zero, None, self.n_bits, self.columns)

    def dequantize(self) -> Tensor:
        """The weight `[out, in]` in float32: S (q - Z)."""
        values = (self.integer_codes() - self.zero_point.float()) * self.scale.float()
        return (values if self.axis == 1 else values.T).reshape(self.shape)


def _float_grid(weight: HQQWeight) -> tuple[Tensor, Tensor]:
    """Scales and zero points, float32 `[out, groups]`, of groups along the rows."""
    return tuple(part.float().view(weight.rows, -1) for part in (weight.scale, weight.zero_point))


@dataclass(frozen=True)
class HQQ(Method):
    """Half-quadratic quantization; inputs stay float, and no calibration is read.

    `n_bits`: 1, 2, 3, 4 or 8. `axis`: 1 for groups along the rows, 0 across them (see `HQQWeight`).
    `p`, `beta`, `iterations`: the solver's norm, penalty and most turns; 0 turns are round-to-nearest with a
    float zero point, rounded at 4 bits as in the package. `shrink_in`: "weights" shrinks errors as they are,
    as published, "steps" as multiples of their group's step, which makes scaled weights give scaled results.
    """

    n_bits: int = 4
    group_size: int = 64
    axis: Literal[0, 1] = 1
    p: float = 0.7
    beta: float = 10.0
    iterations: int = 20
    shrink_in: Literal["weights", "steps"] = "weights"
    scale_dtype: Literal["float16", "float32"] = "float16"
    name: ClassVar[str] = "hqq"
    weight_type: ClassVar[type] = HQQWeight

    def __post_init__(self):
        for setting, choices in {
            "n_bits": WIDTHS, "axis": (0, 1), "shrink_in": ("weights", "steps"),
            "scale_dtype": ("float16", "float32"),
        }.items():  # fmt: skip
            value = getattr(self, setting)
            if value not in choices or isinstance(value, bool):
                raise ValueError(
                    f"{setting} {value!r}: choose one of {', '.join(map(str, choices))}"
                )
        if type(self.group_size) is not int or self.group_size < 1:
            raise ValueError(f"group_size {self.group_size!r}: choose a positive number")
        if not 0 < self.p <= 1 or not self.beta > 0:
            raise ValueError(
                f"p {self.p}, beta {self.beta}: p lies above 0 and is at most 1, and beta is positive"
            )
        if type(self.iterations) is not int or self.iterations < 0:
            raise ValueError(f"iterations {self.iterations!r}: choose 0 or more")

    def check_shape(self, out: int, columns: int) -> None:
        """Refuse a weight that groups do not divide: its rows along axis 1, all of it along 0."""
        group_width(self.group_size, columns if self.axis == 1 else out * columns)

    def groups(self, weight: Tensor) -> Tensor:
        """`weight` `[out, in]` as `[groups, size]` in float32."""
        weight = weight.float()
        if self.axis == 1:
            return weight.reshape(-1, self.group_size)
        return weight.reshape(self.group_size, -1).T

    def start(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse scales and first zero points, both `[groups, 1]`, from the least and the largest weight."""
        low, high = groups.aminmax(dim=1, keepdim=True)
        span = high - low
        inverse = torch.where(span <= NARROW, 1.0, (2**self.n_bits - 1) / span).clamp(max=LARGEST)
        Z = -low * inverse
        return inverse, Z.round() if self.n_bits == 4 else Z

    def quantize(self, weight: Tensor, statistics: None = None) -> HQQWeight:
        """Codes of `weight` `[out, in]`, with the zero points that the solver finds."""
        check_weight(weight)
        self.check_shape(*weight.shape)
        groups, top = self.groups(weight), 2**self.n_bits - 1
        inverse, Z = self.start(groups)
        solver = {"p": self.p, "beta": self.beta, "iterations": self.iterations}
        Z, _ = solve(groups, inverse, Z, top, **solver, in_steps=self.shrink_in == "steps")
        codes = (groups * inverse + Z).round_().clamp_(0, top)
        scale = stored_scale(1 / inverse, self.scale_dtype)
        return HQQWeight(
            pack(codes.to(torch.uint8), self.n_bits), scale, Z.to(scale.dtype), *weight.shape,
            self.n_bits, self.axis,
        )  # fmt: skip

    def linear(self, x: Tensor, weight: HQQWeight, bias: Tensor | None) -> Tensor:
        """`x @ W.T + bias` with the decoded weight, for `x` `[tokens, in]`."""
        return dequantized_linear(x, weight, bias)
