"""Products with packed codes whose values are given group by group: uniform grids, and codebooks of 16.

The torch code is the reference. On a CPU with a C++ compiler `cpu.cpp` computes the same without ever
holding the float weight, and so does Triton for few inputs on a GPU (`compiled.py` says how to choose).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from course_utils.kernels.compiled import asked, is_compiled, library
from course_utils.kernels.packing import unpack

TILES = (128, 64, 32)  # codes that `cpu.cpp` reads at a time
COMPILED_WIDTHS = (2, 3, 4, 8)
INPUTS = ("float", "int8", "codes")
PREFILL = 16  # from so many inputs on, a tile of rows is decoded and multiplied by BLAS
DECODED = 2**20  # weights that are decoded at a time then: 4 MB


@dataclass(frozen=True)
class GroupedCodes:
    """Packed codes `[out, columns]` that share a scale in groups of neighbours.

    Code q stands for (q - zero) * scale, or with a `codebook` for codebook[q] * scale. With `high_first` the
    first of two 4-bit codes is the high half of its byte, as bitsandbytes packs; else the low half, as
    `packing.pack` does. Raises ValueError or TypeError for shapes, dtypes and devices that do not agree.
    """

    codes: Tensor  # uint8 [out, bytes], each row packed (`packing.pack`)
    scale: Tensor  # float32 [out, groups]
    zero: Tensor | None  # float32 [out, groups]
    codebook: Tensor | None  # float32 [16], for 4 bits
    n_bits: int
    columns: int
    high_first: bool = False

    def __post_init__(self):
        out, groups = self.scale.shape
        expected = {
            "codes": (self.codes, torch.uint8, (out, -(-self.columns * self.n_bits // 8))),
            "scale": (self.scale, torch.float32, (out, groups)),
        }
        if (self.zero is None) == (self.codebook is None):
            raise ValueError("codes have either zero points or a codebook")
        if self.codebook is None:
            expected["zero"] = self.zero, torch.float32, (out, groups)
        else:
            expected["codebook"] = self.codebook, torch.float32, (16,)
        if self.n_bits != 4 and (self.high_first or self.codebook is not None):
            raise ValueError(f"codebooks and high_first are for 4 bits, got n_bits {self.n_bits}")
        for name, (tensor, dtype, shape) in expected.items():
            if tensor.dtype != dtype:
                raise TypeError(f"{name} is {dtype}, got {tensor.dtype}")
            if tensor.shape != shape:
                raise ValueError(f"{name} is {shape}, got {tuple(tensor.shape)}")
            if tensor.device != self.codes.device:
                raise ValueError(f"codes are on {self.codes.device}, {name} on {tensor.device}")
        if self.columns % groups:
            raise ValueError(f"{groups} groups do not divide {self.columns} columns")

    @cached_property
    def tile(self) -> int | None:
        """Codes that the compiled product reads at a time, or None where it has no code for this weight."""
        width = self.columns // self.scale.shape[1]
        tiles = [tile for tile in TILES if width % tile == 0]
        return tiles[0] if tiles and self.n_bits in COMPILED_WIDTHS else None

    @cached_property
    def has_compiled_code(self) -> bool:
        """Whether the compiled product can read this weight: its shape, and its tensors in memory."""
        tensors = self.codes, self.scale, self.zero, self.codebook
        return self.tile is not None and all(t is None or t.is_contiguous() for t in tensors)

    def dequantize(self) -> Tensor:
        """The weight `[out, columns]` in float32."""
        q = unpack(self.codes, self.n_bits, self.columns)
        if self.high_first:
            q = q.unflatten(1, (-1, 2)).flip(2).flatten(1)
        q = q.unflatten(1, (self.scale.shape[1], -1))
        scale = self.scale[..., None]
        if self.codebook is not None:
            return (self.codebook[q.int()] * scale).flatten(1)
        return ((q - self.zero[..., None]) * scale).flatten(1)


def backend(weight: GroupedCodes) -> Literal["torch", "compiled", "triton"]:
    """What multiplies with `weight`: as `COURSE_KERNELS` says, its device, its shape and its strides."""
    if (name := asked()) == "triton" or (name == "auto" and weight.codes.is_cuda):
        # It imports Triton, which a CPU does without.
        from course_utils.kernels import triton_grouped

        return "triton" if triton_grouped.takes(weight) else "torch"
    compiled = weight.has_compiled_code and is_compiled(weight.codes.device)
    return "compiled" if compiled else "torch"


def grouped_linear(
    x: Tensor,
    weight: GroupedCodes,
    bias: Tensor | None = None,
    *,
    inputs: Literal["float", "int8", "codes"] = "float",
) -> Tensor:
    """`x @ W.T + bias` for float `x` `[tokens, columns]`, `[tokens, out]` in the dtype of `x`.

    With `inputs` "int8" each tile of a token's inputs (`rounded_inputs`) is first rounded to 8 bits; "codes"
    says that `x` holds whole numbers of -127 to 127 already. Raises ValueError or TypeError for an `x` of
    another shape, dtype or device.
    """
    if x.ndim != 2 or x.shape[1] != weight.columns:
        raise ValueError(f"inputs are [tokens, {weight.columns}], got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"inputs are float, got {x.dtype}")
    if x.device != weight.codes.device:
        raise ValueError(f"inputs are on {x.device}, codes on {weight.codes.device}")
    if inputs not in INPUTS:
        raise ValueError(f"inputs {inputs!r}: choose one of {', '.join(INPUTS)}")
    chosen = backend(weight)
    if chosen != "compiled" or x.dtype == torch.float64:  # compiled sums are of float32
        if inputs == "int8":
            x = rounded_inputs(x, _tile(weight))
        if chosen == "triton" and len(x) <= PREFILL and x.dtype != torch.float64:
            from course_utils.kernels.triton_grouped import triton_linear

            return _plus(triton_linear(x, weight), bias)
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, weight.dequantize().to(x.dtype), bias)
    return _plus(_compiled(x, weight, inputs).to(x.dtype), bias)


def _plus(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y.add_(bias)


def _compiled(x: Tensor, weight: GroupedCodes, inputs: str) -> Tensor:
    """`x @ W.T` by `cpu.cpp`, float32."""
    values = x.detach().float().contiguous()
    if len(x) > PREFILL:
        if inputs == "int8":
            values = rounded_inputs(values, weight.tile)
        return _by_decoded_rows(values, weight)
    y = values.new_empty(len(x), len(weight.codes))
    if inputs != "float" and weight.n_bits != 3 and weight.codebook is None:
        of_inputs = values.data_ptr(), inputs == "codes", y.data_ptr()
        if not _call(library().int8_product, weight, *of_inputs, len(x)):
            return y
    if inputs == "int8":  # as floats: there is no code for integers here, or for a NaN
        values = rounded_inputs(values, weight.tile)
    _call(library().float_product, weight, values.data_ptr(), y.data_ptr(), len(x))
    return y


def rounded_inputs(x: Tensor, tile: int) -> Tensor:
    """`x` `[tokens, columns]` with each `tile` of a token on a grid of its own: largest magnitude / 127."""
    tiles = x.unflatten(1, (-1, tile)).float()
    largest = tiles.abs().amax(2, keepdim=True)
    codes = (tiles * torch.where(largest > 0, 127 / largest, 0)).round()
    return (codes * (largest / 127)).flatten(1).to(x.dtype)


def _tile(weight: GroupedCodes) -> int:
    """What of a token shares a scale in int8, also where `cpu.cpp` has no code: a whole group at worst."""
    return weight.tile or weight.columns // weight.scale.shape[1]


def _ordered(x: Tensor, weight: GroupedCodes) -> Tensor:
    """`x` in the order in which `cpu.cpp` cuts codes out of a tile: by their place in the words."""
    codes_of_word = 8 if weight.n_bits == 3 else min(32 // weight.n_bits, weight.tile // 8)
    words = x.unflatten(1, (-1, weight.tile // codes_of_word, codes_of_word))
    if weight.high_first:
        words = words.unflatten(3, (-1, 2)).flip(4).flatten(3)
    return words.transpose(2, 3).flatten(1)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _of_weight(weight: GroupedCodes) -> tuple:
    tensors = weight.codes, weight.scale, weight.zero, weight.codebook
    shape = len(weight.codes), weight.columns, weight.scale.shape[1]
    return *map(_pointer, tensors), *shape, weight.n_bits, weight.tile, weight.high_first


def _call(product: Callable[..., int], weight: GroupedCodes, *inputs: int) -> int:
    """Run a function of `cpu.cpp`; not 0 if the inputs have no codes, for a NaN or an infinity in them."""
    return product(*_of_weight(weight), *inputs, torch.get_num_threads())


def _by_decoded_rows(x: Tensor, weight: GroupedCodes) -> Tensor:
    """Some rows are decoded at a time, in the order of the codes; BLAS multiplies, and they are forgotten."""
    out = len(weight.codes)
    y = x.new_empty(len(x), out)
    ordered = _ordered(x, weight)
    some = max(1, min(out, DECODED // weight.columns))
    rows, of_weight = x.new_empty(some, weight.columns), _of_weight(weight)
    for first in range(0, out, some):
        count = min(some, out - first)
        library().decode(*of_weight, _pointer(rows), first, count, torch.get_num_threads())
        y[:, first : first + count] = ordered @ rows[:count].T
    return y
