"""Grids of 1 to 4 bits without a zero: a sign, a size from few levels, and a scale.

At 1 bit W becomes alpha * sign(W), and alpha = mean|W| is the least squares answer (Rastegari et al. 2016,
"XNOR-Net", arXiv 1603.05279, section 3.1). Wider grids have as many positive levels as negative ones, evenly
spaced or of least squared error (Lloyd 1982). A second plane rounds what the first leaves. Left out of what
is published: scales for inputs, salient columns, codebooks of vectors. Built step by step in
`chronology/tpoti_demo`, whose "T-Poti" this is: no published method has that name.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from course_utils.compression.base import QuantizedWeight, check_weight
from course_utils.compression.compensation import compensate
from course_utils.compression.hessian import Hessian, inverse_factor
from course_utils.compression.stepwise import HessianMethod
from course_utils.grids.codebook import lloyd_max, nearest_codes
from course_utils.grids.uniform import group_width, stored_scale
from course_utils.kernels import GroupedCodes, pack, unpack

# Half the step of the evenly spaced grid without a zero that is best for the unit normal distribution, by
# width: there the search for a scale begins. `tests/test_ultra_low.py` derives them.
NORMAL_HALF_STEPS = {1: 0.79788, 2: 0.49784, 3: 0.29301, 4: 0.16760}
TURNS = 25  # of codes and scale, at most; most searches stop before
# A second plane with a scale below, which float16 would change, is left out: 0.
SMALLEST_REST = 4e-6
SMALLEST = 1e-38  # sizes are divided by as if they were at least this: groups of zeros stay finite


def uniform_levels(n_bits: int) -> Tensor:
    """Positive levels of the evenly spaced grid in units of half a step: 1, 3, ..., 2^n_bits - 1, float32."""
    return torch.arange(1.0, 2**n_bits, 2.0)


def least_squares_scale(groups: Tensor, levels: Tensor, start: float) -> Tensor:
    """The scale of each of `groups` `[groups, n]` for positive `levels` `[half]`: float32 `[groups]`.

    Codes and scale take turns: each magnitude goes to its nearest level, and then the scale is the least
    squares one, sum(|w| level) / sum(level^2). The error falls with every turn, and ends at a minimum that
    may be a local one. The first scale is `start` times the group's root mean square. With one level the
    answer is exact. A group of zeros gets 0.
    """
    magnitudes = groups.abs()
    unit = magnitudes.amax(1, keepdim=True)  # squares of what is left fit into float32
    magnitudes = magnitudes / unit.clamp(min=SMALLEST)
    scale = start * magnitudes.square().mean(1, keepdim=True).sqrt()  # [groups, 1]
    for _ in range(TURNS):
        nearest = levels[nearest_codes(magnitudes / scale.clamp(min=SMALLEST), levels).long()]
        found = (magnitudes * nearest).sum(1, keepdim=True)
        found /= nearest.square().sum(1, keepdim=True).clamp(min=SMALLEST)
        moved, scale = (found - scale).abs(), found
        if (moved <= 1e-5 * scale).all():
            break
    return (scale * unit).flatten()


def lloyd_max_levels(groups: Tensor, n_bits: int) -> Tensor:
    """Positive levels of least squared error for `groups` `[groups, n]`, each over its root mean square.

    Float32 `[2^(n_bits - 1)]`, ascending. The grid is symmetric, so the levels are those of the magnitudes; a
    group counts by its mean square. Where there are fewer magnitudes than levels, the largest is repeated.
    """
    magnitudes = groups.abs()
    unit = magnitudes.amax().clamp(min=SMALLEST)
    magnitudes = magnitudes / unit
    mean_square = magnitudes.square().mean(1, keepdim=True)  # [groups, 1]
    x = (magnitudes / mean_square.sqrt().clamp(min=SMALLEST)).flatten()
    half = 2 ** (n_bits - 1)
    distinct = len(x[:1024].unique())  # mostly that many are enough to see
    if distinct < half:
        distinct = len(x.unique())
    weights = mean_square.expand_as(magnitudes).flatten() if len(groups) > 1 else None
    levels = lloyd_max(x, min(half, distinct), weights)
    return torch.cat([levels, levels[-1:].expand(half - len(levels))])


def encode(x: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """Codes (uint8, as `x`) on the grid of `scale` times plus or minus `levels` `[half]`; 0 is positive.

    Codes ascend with the value: 0 is the most negative level, half - 1 and half those next to zero.
    """
    half = len(levels)
    size = nearest_codes(x.abs() / scale.clamp(min=SMALLEST), levels.to(x.dtype))
    return torch.where(x >= 0, half + size, half - 1 - size).to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """The values of `codes`, in the dtype of `scale`: scale times the level with its sign."""
    both = torch.cat([-levels.flip(0), levels]).to(scale.dtype)  # [2 half], ascending
    return both[codes.int()] * scale


@dataclass(frozen=True)
class UltraLowWeight(QuantizedWeight):
    """One or two planes of codes, a scale for each group and plane, and the levels where they were fitted."""

    codes: Tensor  # uint8 [planes, out, bytes], each row packed
    scale: Tensor  # float16 or float32 [planes, out, groups], or [planes, 1, 1]
    levels: Tensor | None  # float32 [planes, 2^(n_bits - 1)], the positive ones; None: 1, 3, 5, ...
    n_bits: int  # of one plane
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[1], self.columns

    def integer_codes(self) -> Tensor:
        """The codes (uint8 `[planes, out, in]`), unpacked."""
        return unpack(self.codes, self.n_bits, self.columns)

    def grouped(self) -> GroupedCodes | None:
        """The codes of a single plane, evenly spaced: scale * (2 q - 2^n_bits + 1). None for others."""
        if self.levels is not None or len(self.codes) > 1:
            return None
        step, middle = self.layout(_float_grid)
        return GroupedCodes(self.codes[0], step, middle, None, self.n_bits, self.columns)

    def dequantize(self) -> Tensor:
        """The weight `[out, in]` in float32: the sum of its planes."""
        groups = self.integer_codes().unflatten(2, (self.scale.shape[2], -1))
        uniform, total = uniform_levels(self.n_bits).to(self.scale.device), 0
        for plane, (codes, scale) in enumerate(zip(groups, self.scale.float(), strict=True)):
            levels = uniform if self.levels is None else self.levels[plane]
            total = total + decode(codes, scale[..., None], levels).flatten(1)
        return total


def _float_grid(weight: UltraLowWeight) -> tuple[Tensor, Tensor]:
    """Whole steps, and the code that 0 would have, float32 `[out, groups]`."""
    rows = len(weight.codes[0]), weight.scale.shape[2]
    step = (2 * weight.scale[0].float()).expand(rows).contiguous()
    return step, torch.full_like(step, (2**weight.n_bits - 1) / 2)


@dataclass(frozen=True)
class UltraLow(HessianMethod):
    """Nearest of few symmetric levels times a scale; inputs stay float.

    `n_bits`: 1 to 4, of one plane. `group_size`: how many neighbouring columns of a row share a scale, or
    "row", or "tensor". `levels`: "uniform" is evenly spaced, with the scale of least squared error for
    each group (`least_squares_scale`); "lloyd_max" fits the levels to the weight as well, and stores them
    (`lloyd_max_levels`). With 1 bit both are alpha = mean|W|. `planes`: 2 rounds what the first plane leaves
    on a grid of its own. `compensate`: GPTQ's column loop. Grids of a group are then found when its first
    column is reached, those of a row or tensor on the float weight; `damping` is as in `gptq`.
    `scale_dtype`: how scales are stored; codes are computed with the scale as stored.
    """

    n_bits: int = 1
    group_size: int | Literal["row", "tensor"] = "tensor"
    levels: Literal["uniform", "lloyd_max"] = "uniform"
    planes: int = 1
    compensate: bool = False
    damping: float = 0.01
    scale_dtype: Literal["float16", "float32"] = "float16"
    name: ClassVar[str] = "ultra_low"
    weight_type: ClassVar[type] = UltraLowWeight

    def __post_init__(self):
        for setting, choices in {
            "n_bits": (1, 2, 3, 4),
            "levels": ("uniform", "lloyd_max"),
            "planes": (1, 2),
            "compensate": (False, True),
            "scale_dtype": ("float16", "float32"),
        }.items():
            value = getattr(self, setting)
            if value not in choices or type(value) is not type(choices[0]):
                names = ", ".join(map(str, choices))
                raise ValueError(f"{setting} {value!r}: choose one of {names}")
        size = self.group_size
        if size not in ("row", "tensor") and not (type(size) is int and size > 0):
            raise ValueError(f"group_size {size!r}: choose a positive number, or 'row' or 'tensor'")
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping {self.damping} must be 0 or positive; GPTQ's is 0.01")

    def check_shape(self, out: int, columns: int) -> None:
        """Refuse columns that groups of this size do not divide."""
        self._width(columns)

    @property
    def uses_hessian(self) -> bool:
        """With `compensate`."""
        return self.compensate

    def quantize(self, weight: Tensor, statistics: Hessian | None = None) -> UltraLowWeight:
        """Codes of `weight` `[out, in]`; with `compensate` under the Hessian of its inputs, in float64."""
        check_weight(weight)
        if self.compensate and statistics is None:
            raise ValueError(
                "compensate=True needs the Hessian of the layer's inputs: give quantize_model some "
                "calibration, or use compensate=False"
            )
        out, columns = weight.shape
        width = weight.numel() if self.group_size == "tensor" else self._width(columns)
        groups = weight.float().contiguous().view(-1, width)  # [groups, width], of all rows
        scale, levels, codes = self._fitted(groups)
        shape = (self.planes, 1, 1) if self.group_size == "tensor" else (self.planes, out, -1)
        scale, codes = scale.reshape(shape), codes.reshape(self.planes, out, columns)
        if self.compensate:
            scale, codes = self._compensated(weight, statistics.matrix(), scale, levels)
        kept = None if self.levels == "uniform" else levels
        return UltraLowWeight(pack(codes, self.n_bits), scale, kept, self.n_bits, columns)

    def _width(self, columns: int) -> int:
        """Columns that share a scale in a row."""
        return columns if self.group_size == "tensor" else group_width(self.group_size, columns)

    def _fitted(
        self, groups: Tensor, levels: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scales `[planes, groups]`, levels `[planes, half]` and codes `[planes, groups, n]` of `groups`.

        `groups` is `[groups, n]`. Levels that are given are kept.
        """
        rest, scales, found, codes = groups, [], [], []
        for plane in range(self.planes):
            if levels is not None:
                of_plane = levels[plane]
            elif self.levels == "uniform":
                of_plane = uniform_levels(self.n_bits).to(groups.device)
            else:
                of_plane = lloyd_max_levels(rest, self.n_bits)
            start = NORMAL_HALF_STEPS[self.n_bits] if self.levels == "uniform" else 1.0
            scale = least_squares_scale(rest, of_plane, start)
            if plane and self.scale_dtype == "float16":
                scale = scale.where(scale > SMALLEST_REST, 0)
            scales.append(stored_scale(scale, self.scale_dtype))
            found.append(of_plane)
            S = scales[-1].float()[:, None]
            codes.append(encode(rest, S, of_plane))
            rest = rest - decode(codes[-1], S, of_plane)
        return torch.stack(scales), torch.stack(found), torch.stack(codes)

    def _compensated(
        self, weight: Tensor, hessian: Tensor, scale: Tensor, levels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scales and codes by the column loop; `levels` are kept, scales of groups are found anew."""
        out, columns = weight.shape
        # A feature that was always zero may have any weight, and gets its nearest code.
        hessian.diagonal()[hessian.diagonal() == 0] = 1
        U = inverse_factor(hessian, self.damping)
        # [out, in], each column in one piece of memory
        W = weight.T.to(U.dtype, copy=True, memory_format=torch.contiguous_format).T
        size, scale = self._width(columns), scale.clone()
        codes = W.new_empty(self.planes, out, columns, dtype=torch.uint8)

        def nearest(i: int, w: Tensor, pending: Tensor) -> Tensor:
            """Column i, `w` `[out, 1]`, on the grid of its group."""
            g = i // size
            if i % size == 0 and size < columns:
                group = W[:, i : i + size] - pending @ U[i - pending.shape[1] : i, i : i + size]
                scale[:, :, g] = self._fitted(group.float().contiguous(), levels)[0]
            total = torch.zeros_like(w)
            for plane in range(self.planes):
                S = scale[plane, :, g : g + 1].to(w)  # [out, 1], or [1, 1]
                q = encode(w - total, S, levels[plane])
                codes[plane, :, i : i + 1] = q
                total += decode(q, S, levels[plane])
            return total

        compensate(W, U, nearest)
        return scale, codes
