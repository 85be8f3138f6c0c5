"""Any 16 values as a codebook, in blocks: what NF4 is compared with, stored in the same way.

A block is scaled by its absmax, as in NF4 (Dettmers et al. 2023, arXiv 2305.14314, section 3), or from its
minimum to its maximum, as int4 with a float zero point is. Blocks run over the weight as one long row. The
levels are stored with each weight, 64 bytes, since a fitted codebook has to be. Left out: double
quantization (`nf4`), codes of other widths. Used in `chronology/nf4_demo`.
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
from course_utils.grids.codebook import NF4, nearest_codes
from course_utils.grids.uniform import stored_scale
from course_utils.kernels import pack, unpack

N_LEVELS = 16
SMALLEST = 1e-38  # a scale is divided by as if it were at least this: constant blocks stay finite
EVEN = tuple(i / 15 for i in range(N_LEVELS))  # with `offsets`: int4 from minimum to maximum


@dataclass(frozen=True)
class CodebookWeight(QuantizedWeight):
    """Two codes a byte over the flattened weight; a scale, and perhaps an offset, for each block of them."""

    codes: Tensor  # uint8 [ceil(out * in / 2)], the first of two in the low half
    scale: Tensor  # float16 or float32 [blocks]
    offset: Tensor | None  # as scale; None: 0
    levels: Tensor  # float32 [16], ascending
    rows: int
    columns: int
    block_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def integer_codes(self) -> Tensor:
        """The codes (uint8 `[out, in]`), unpacked."""
        return unpack(self.codes, 4, self.rows * self.columns).view(self.shape)

    def dequantize(self) -> Tensor:
        """The weight `[out, in]` in float32: scale times level, plus the offset."""
        n = self.rows * self.columns
        pairs = torch.cartesian_prod(self.levels, self.levels).flip(1)  # [256, 2]: of each byte
        values = pairs.index_select(0, self.codes.int()).flatten()[:n]
        values = _in_blocks(values, self.block_size) * self.scale.float()[:, None]
        if self.offset is not None:
            values += self.offset.float()[:, None]
        return values.flatten()[:n].view(self.shape)


@dataclass(frozen=True)
class Codebook(Method):
    """Nearest of 16 `levels` in blocks of `block_size`; inputs stay float.

    Without `offsets` levels lie in -1..1, and a block is divided by its absmax. With them levels lie in 0..1,
    and stand for the way from the block's minimum, which is stored too, to its maximum. `scale_dtype`: how
    both are stored; codes are computed with what is stored.
    """

    levels: tuple[float, ...] = tuple(NF4.tolist())
    block_size: int = 64
    offsets: bool = False
    scale_dtype: Literal["float16", "float32"] = "float16"
    name: ClassVar[str] = "codebook"
    weight_type: ClassVar[type] = CodebookWeight

    def __post_init__(self):
        object.__setattr__(self, "levels", tuple(map(float, self.levels)))  # JSON makes lists
        low = 0 if self.offsets else -1
        ascending = all(a <= b for a, b in zip(self.levels, self.levels[1:], strict=False))
        if (
            len(self.levels) != N_LEVELS
            or not ascending
            or not low <= self.levels[0] <= self.levels[-1] <= 1
        ):
            raise ValueError(
                f"levels {self.levels}: {N_LEVELS} ascending numbers in {low}..1 are needed "
                f"{'with' if self.offsets else 'without'} offsets"
            )
        if type(self.block_size) is not int or self.block_size < 1:
            raise ValueError(f"block_size {self.block_size!r}: choose a positive number")
        if type(self.offsets) is not bool:
            raise ValueError(f"offsets {self.offsets!r}: choose True or False")
        if self.scale_dtype not in ("float16", "float32"):
            raise ValueError(f"scale_dtype {self.scale_dtype!r}: choose one of float16, float32")

    def quantize(self, weight: Tensor, statistics: None = None) -> CodebookWeight:
        """Codes of `weight` `[out, in]`, row after row as one; a tie goes to the lower level."""
        check_weight(weight)
        n, levels = weight.numel(), torch.tensor(self.levels, device=weight.device)
        blocks = _in_blocks(weight.float().flatten(), self.block_size)  # [blocks, block_size]
        offset = None
        if self.offsets:
            low, high = blocks.aminmax(dim=1)
            offset = low.to(getattr(torch, self.scale_dtype))
            if not offset.isfinite().all():
                raise ValueError(
                    f"a minimum of {low[~offset.isfinite()][0].item():.3g} does not fit into float16: use "
                    "scale_dtype='float32'"
                )
            blocks, scale = blocks - offset.float()[:, None], high - low
        else:
            scale = blocks.abs().amax(1)
        scale = stored_scale(scale, self.scale_dtype)
        scaled = blocks * (1 / scale.float().clamp(min=SMALLEST))[:, None]
        codes = nearest_codes(scaled.flatten()[:n], levels).to(torch.uint8)
        return CodebookWeight(pack(codes, 4), scale, offset, levels, *weight.shape, self.block_size)

    def linear(self, x: Tensor, weight: CodebookWeight, bias: Tensor | None) -> Tensor:
        """`x @ W.T + bias` with the decoded weight, for `x` `[tokens, in]`."""
        return dequantized_linear(x, weight, bias)


def _in_blocks(x: Tensor, block_size: int) -> Tensor:
    """`x` `[n]` as `[blocks, block_size]`, the last block filled up with its last value."""
    missing = -len(x) % block_size
    if missing:
        x = torch.cat([x, x[-1:].expand(missing)])
    return x.view(-1, block_size)
