"""E8P: 8 weights in 16 bits, as the nearest point of a fixed lattice.

QuIP#'s codebook (Tseng et al. 2024, arXiv 2402.04396), built from its definition in `grids.e8`. Nothing is
fitted and no codebook is stored: a row is scaled by its root mean square, and each 8 neighbours become the
nearest of 65,536 points. The points suit numbers like draws of a normal distribution, which QuIP# makes of
weights by a rotation first; this module does not rotate (`compression.rotation` does). Left out besides:
finetuning, and the authors' kernels. Built step by step in `chronology/tpoti_two_bit_ladder`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from course_utils.compression.base import QuantizedWeight, check_weight
from course_utils.compression.hessian import Hessian
from course_utils.compression.stepwise import HessianMethod, compensated, divisor, row_scale
from course_utils.grids.e8 import LENGTH, e8_points, nearest_e8

SCALE = 1.03  # the lattice is made for numbers of this root mean square: the authors' factor


@dataclass(frozen=True)
class E8PWeight(QuantizedWeight):
    """Two bytes for 8 neighbouring weights, and a scale a row."""

    codes: Tensor  # uint8 [out, in / 8, 2]
    scale: Tensor  # float16 or float32 [out]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), LENGTH * self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """The weight `[out, in]` in float32: scale times lattice point."""
        return e8_points(self.codes).flatten(1) * (self.scale.float() / SCALE)[:, None]


@dataclass(frozen=True)
class E8P(HessianMethod):
    """The nearest points of QuIP#'s lattice; inputs stay float.

    `compensate`: codes are chosen by the column loop of GPTQ, 8 columns a step, so that later columns make
    up for errors. As in QuIP#'s block LDLQ, a step takes the nearest points, as if errors in its 8 columns
    counted alike and did not add up. It takes calibration. `damping`: share of the Hessian's mean diagonal
    that is added to it. `scale_dtype`: how the rows' scales are stored.
    """

    compensate: bool = False
    damping: float = 0.01
    scale_dtype: Literal["float16", "float32"] = "float16"
    name: ClassVar[str] = "e8p"
    weight_type: ClassVar[type] = E8PWeight

    def __post_init__(self):
        if type(self.compensate) is not bool:
            raise ValueError(f"compensate {self.compensate!r}: choose True or False")
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping {self.damping} must be 0 or positive; GPTQ's is 0.01")
        if self.scale_dtype not in ("float16", "float32"):
            raise ValueError(f"scale_dtype {self.scale_dtype!r}: choose one of float16, float32")

    @property
    def uses_hessian(self) -> bool:
        """With `compensate`."""
        return self.compensate

    def check_shape(self, out: int, columns: int) -> None:
        """Refuse columns that 8 does not divide."""
        if columns % LENGTH:
            raise ValueError(
                f"the lattice has {LENGTH} dimensions, and {LENGTH} does not divide the {columns} columns of "
                "this layer: leave it to another method"
            )

    def quantize(self, weight: Tensor, statistics: Hessian | None = None) -> E8PWeight:
        """Codes of `weight` `[out, in]`."""
        check_weight(weight)
        self.check_shape(*weight.shape)
        self.check_statistics(statistics)
        scale = row_scale(weight, self.scale_dtype)
        unit = divisor(scale) / SCALE  # [out, 1]
        if not self.compensate:
            codes = nearest_e8((weight.float() / unit).reshape(-1, LENGTH))
            return E8PWeight(codes.view(len(weight), -1, 2), scale)
        out, columns = weight.shape
        codes = torch.empty(out, columns // LENGTH, 2, dtype=torch.uint8, device=weight.device)

        def choose(i: int, w: Tensor, metric: Tensor) -> Tensor:
            codes[:, i // LENGTH] = found = nearest_e8(w / unit)
            return e8_points(found) * unit

        compensated(weight, statistics, choose, width=LENGTH, damping=self.damping)
        return E8PWeight(codes, scale)
