"""NF4: sixteen levels by quantiles of the normal distribution, in blocks that share an absmax.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, section 3. Codes,
bytes, absmax, and what double quantization makes of it are bit for bit those of bitsandbytes. As there,
blocks run over the weight as one long row, over the ends of its rows; and the 8-bit numbers of
double quantization are the dynamic map, not the FP8 that the paper names. Left out: FP4, other dtypes
of the packed bytes.
"""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from course_utils.compression.base import (
    Method,
    QuantizedWeight,
    check_weight,
    dequantized_linear,
)
from course_utils.grids.codebook import NF4 as LEVELS
from course_utils.grids.codebook import dynamic_map, nearest_codes
from course_utils.kernels import GroupedCodes

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes'
NESTED_BLOCK = 256  # absmax values that share one of their own
SMALLEST = 1e-38  # an absmax is divided by as if it were at least this: blocks of zeros stay finite


@cache
def _absmax_levels() -> Tensor:
    return dynamic_map()


def blockwise_codes(x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes (int32 `[n]`) of `x` float32 `[n]`, and absmax (float32 `[blocks]`).

    A block's values are divided by its absmax, and get the nearest level. The last block may be shorter. A
    block of zeros has absmax 0 and the codes of 0.
    """
    whole = len(x) - len(x) % block_size
    blocks, rest = x[:whole].view(-1, block_size), x[whole:]
    absmax = blocks.abs().amax(1) if whole else x.new_zeros(0)
    scaled = (blocks * (1 / absmax.clamp(min=SMALLEST))[:, None]).flatten()
    if len(rest):
        last = rest.abs().amax()
        # bitsandbytes divides here, where it multiplies by the inverse above: the last digit can differ.
        scaled = torch.cat([scaled, rest / last.clamp(min=SMALLEST)])
        absmax = torch.cat([absmax, last[None]])
    return nearest_codes(scaled, codebook.to(x.device)), absmax


def times_absmax(values: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """`values` `[n]`, each times the absmax `[blocks]` of its block."""
    return values * absmax.repeat_interleave(block_size)[: len(values)]


@dataclass(frozen=True)
class NF4Weight(QuantizedWeight):
    """Two codes a byte over the flattened weight, and an absmax for each block of them.

    With double quantization `absmax` holds codes of the dynamic map: the map's value times the
    `nested_absmax` of its 256, plus `offset`, is the absmax.
    """

    codes: Tensor  # uint8 [ceil(out * in / 2)], the first of two in the high half
    absmax: Tensor  # float32 [blocks], or uint8
    nested_absmax: Tensor | None  # float32 [ceil(blocks / 256)]
    offset: Tensor | None  # float32 []
    rows: int
    columns: int
    block_size: int

    def __post_init__(self):
        if self.codes is None or self.absmax is None:
            return  # without its tensors: they are the buffers of a layer
        parts = self.absmax, self.nested_absmax, self.offset
        nested = self.absmax.dtype == torch.uint8
        if nested != (self.nested_absmax is not None) or nested != (self.offset is not None):
            raise ValueError(
                "a broken nested state: absmax as uint8 codes goes with nested_absmax and offset, absmax as "
                f"float32 with neither; got {[None if p is None else p.dtype for p in parts]}"
            )
        n = self.rows * self.columns
        blocks = -(-n // self.block_size)
        wanted = {"codes": -(-n // 2), "absmax": blocks}
        if nested:
            wanted["nested_absmax"] = -(-blocks // NESTED_BLOCK)
        for name, count in wanted.items():
            found = getattr(self, name).shape
            if found != (count,):
                raise ValueError(
                    f"a broken weight: {self.rows} x {self.columns} in blocks of {self.block_size} take "
                    f"{name} [{count}], got {list(found)}"
                )

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def integer_codes(self) -> Tensor:
        """The codes (uint8 `[out, in]`), unpacked."""
        pairs = torch.stack([self.codes >> 4, self.codes & 15], 1)
        return pairs.flatten()[: self.rows * self.columns].view(self.shape)

    def block_absmax(self) -> Tensor:
        """The absmax of each block, float32 `[blocks]`, decoded if it is nested."""
        if self.nested_absmax is None:
            return self.absmax
        values = _absmax_levels().to(self.absmax.device)[self.absmax.long()]
        return times_absmax(values, self.nested_absmax, NESTED_BLOCK) + self.offset

    def grouped(self) -> GroupedCodes | None:
        """The codes row by row, with float32 absmax; None where blocks cross the ends of rows."""
        if self.columns % self.block_size:
            return None
        absmax = self.layout(_absmax_of_rows)
        codes, levels = self.codes.view(self.rows, -1), LEVELS.to(self.codes.device)
        return GroupedCodes(codes, absmax, None, levels, 4, self.columns, high_first=True)

    def dequantize(self) -> Tensor:
        """The weight `[out, in]` in float32: level times absmax."""
        n, levels = self.rows * self.columns, LEVELS.to(self.codes.device)
        pairs = torch.cartesian_prod(levels, levels)  # [256, 2]: what each byte stands for
        values = pairs.index_select(0, self.codes.int()).flatten()[:n]
        return times_absmax(values, self.block_absmax(), self.block_size).view(self.shape)


def _absmax_of_rows(weight: NF4Weight) -> Tensor:
    """Float32 `[out, blocks of a row]`, decoded if it is nested."""
    return weight.block_absmax().view(weight.rows, -1)


@dataclass(frozen=True)
class NF4(Method):
    """NF4 in blocks of `block_size` (a power of two, 32 to 4096); inputs stay float.

    `double_quantization`: the absmax is stored in 8 bits, minus its mean over the whole weight, in
    blocks of 256. With blocks of 64 a weight takes 4.127 bits then, and 4.5 without.
    """

    block_size: int = 64
    double_quantization: bool = True
    name: ClassVar[str] = "nf4"
    weight_type: ClassVar[type] = NF4Weight

    def __post_init__(self):
        if type(self.block_size) is not int or self.block_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise ValueError(f"block_size {self.block_size!r}: choose one of {sizes}")
        if type(self.double_quantization) is not bool:
            raise ValueError(
                f"double_quantization {self.double_quantization!r}: choose True or False"
            )

    def quantize(self, weight: Tensor, statistics: None = None) -> NF4Weight:
        """Codes of `weight` `[out, in]`, row after row as one; a tie goes to the lower level."""
        check_weight(weight)
        codes, absmax = blockwise_codes(weight.float().flatten(), LEVELS, self.block_size)
        codes = codes.to(torch.uint8)
        if len(codes) % 2:  # half a byte is left: the code of 0
            codes = torch.cat([codes, codes.new_tensor([7])])
        packed = codes[::2] << 4 | codes[1::2]
        nested = offset = None
        if self.double_quantization:
            offset = absmax.mean()
            absmax, nested = blockwise_codes(absmax - offset, _absmax_levels(), NESTED_BLOCK)
            absmax = absmax.to(torch.uint8)
        return NF4Weight(packed, absmax, nested, offset, *weight.shape, self.block_size)

    def linear(self, x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
        """`x @ W.T + bias` with the decoded weight, for `x` `[tokens, in]`."""
        return dequantized_linear(x, weight, bias)
