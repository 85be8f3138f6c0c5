"""The block formats of llama.cpp's GGUF files: Q8_0, Q4_0 and Q4_1.

A row of the weight is cut into blocks of 32. A block is stored as float16 step d (and minimum m in
Q4_1), then its codes: 34, 18 or 20 bytes, that is 8.5, 4.5 or 5 bits a weight. The bytes and the
decoded values are those of `gguf.quants`, the Python package of llama.cpp.

The codes are computed with the inverse of the float32 step, the values decoded with the float16 step
that is stored: their difference is part of the format's error. It is large for steps below 6.1e-5, where
float16 loses digits, and complete for those below 3e-8, which are stored as 0.
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
from course_utils.grids.uniform import round_codes
from course_utils.kernels import pack, unpack

BLOCK = 32
HEADER_BYTES = {"Q8_0": 2, "Q4_0": 2, "Q4_1": 4}
BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}


@dataclass(frozen=True)
class GgufWeight(QuantizedWeight):
    """The blocks of each row one after another, as in the file."""

    blocks: Tensor  # uint8 [out, in / 32 * bytes of a block]
    kind: str

    @property
    def shape(self) -> tuple[int, int]:
        out, row_bytes = self.blocks.shape
        return out, row_bytes // BLOCK_BYTES[self.kind] * BLOCK

    def dequantize(self) -> Tensor:
        """Q8_0: d q with q in -127..127. Q4_0: d (q - 8), Q4_1: d q + m, with q in 0..15."""
        blocks = self.blocks.unflatten(1, (-1, BLOCK_BYTES[self.kind]))
        header, stored = blocks.split(
            (HEADER_BYTES[self.kind], blocks.shape[2] - HEADER_BYTES[self.kind]), 2
        )
        header = header.contiguous().view(torch.float16).float()
        step = header[..., :1]
        if self.kind == "Q8_0":
            values = step * stored.contiguous().view(torch.int8).float()
        elif self.kind == "Q4_0":
            values = step * (_from_nibbles(stored).float() - 8)
        else:
            values = step * _from_nibbles(stored).float() + header[..., 1:]
        return values.flatten(1)


@dataclass(frozen=True)
class GgufBlocks(Method):
    """Round-to-nearest in GGUF's blocks of 32; inputs stay float.

    `kind`: "Q8_0", codes -127..127 of step absmax / 127, rounded half away from zero. "Q4_0", step
    -x / 8 for the x of largest magnitude (the first of several), so that x gets code 0 exactly;
    "Q4_1", minimum m and step (max - m) / 15: both add 1/2 and cut off the fraction. A block whose
    step is 0, or so small that its inverse is not finite, has a stored step of 0 and decodes to
    0 (Q4_1: to m).
    """

    kind: Literal["Q8_0", "Q4_0", "Q4_1"] = "Q4_1"
    name: ClassVar[str] = "gguf"
    weight_type: ClassVar[type] = GgufWeight

    def __post_init__(self):
        if self.kind not in BLOCK_BYTES:
            raise ValueError(f"kind {self.kind!r}: choose one of {', '.join(BLOCK_BYTES)}")

    def check_shape(self, out: int, columns: int) -> None:
        """Refuse columns that are no multiple of 32."""
        if columns % BLOCK:
            raise ValueError(
                f"{columns} columns are not a multiple of {BLOCK}, the block of {self.kind}: "
                "leave this layer float, or choose another method"
            )

    def quantize(self, weight: Tensor, statistics: None = None) -> GgufWeight:
        """The blocks of `weight` `[out, in]`; `in` must be a multiple of 32.

        Raises `ValueError` for another width, and for a step or minimum beyond float16.
        """
        check_weight(weight)
        self.check_shape(*weight.shape)
        x = weight.float().unflatten(1, (-1, BLOCK))  # [out, blocks, 32]
        if self.kind == "Q8_0":
            header = _divide(x.abs().amax(2, keepdim=True), 127)
            codes = round_codes(x * _inverse(header), "half_away").to(torch.int8).view(torch.uint8)
        elif self.kind == "Q4_0":
            header = _divide(x.gather(2, x.abs().argmax(2, keepdim=True)), -8)
            codes = _nibbles(x * _inverse(header) + 8.5)
        else:
            minimum, maximum = x.aminmax(dim=2, keepdim=True)
            step = _divide(maximum - minimum, 15)
            header = torch.cat((step, minimum), 2)
            codes = _nibbles((x - minimum) * _inverse(step) + 0.5)
        stored = header.half()
        if not stored.isfinite().all():
            raise ValueError(
                f"a step or minimum of magnitude {header.abs().max():.6g} does not fit into float16 "
                f"(65504), which {self.kind} stores: choose another method for this layer"
            )
        return GgufWeight(torch.cat((stored.view(torch.uint8), codes), 2).flatten(1), self.kind)

    def linear(self, x: Tensor, weight: GgufWeight, bias: Tensor | None) -> Tensor:
        """`x @ W.T + bias` with the decoded weight, for `x` `[tokens, in]`."""
        return dequantized_linear(x, weight, bias)


def _divide(x: Tensor, divisor: int) -> Tensor:
    # By a tensor: by a number, a GPU multiplies with the inverse, which rounds differently.
    return x / torch.full_like(x, divisor)


def _inverse(step: Tensor) -> Tensor:
    inverse = 1 / step
    return torch.where(inverse.isfinite(), inverse, 0)


def _nibbles(x: Tensor) -> Tensor:
    """16 bytes of the 32 codes trunc(x), cut to 0..15: byte i holds code i low and code i + 16 high."""
    codes = x.trunc().clamp(0, 15).to(torch.uint8)
    return pack(codes.unflatten(2, (2, -1)).transpose(2, 3).flatten(2), 4)


def _from_nibbles(packed: Tensor) -> Tensor:
    return unpack(packed, 4, BLOCK).unflatten(2, (-1, 2)).transpose(2, 3).flatten(2)
