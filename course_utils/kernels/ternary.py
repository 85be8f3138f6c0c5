"""Ternary digits (trits) -1, 0 and 1 in bytes, and a product with them that multiplies nothing.

"2bit" puts four in a byte, as `packing.pack` does: code trit + 1, lowest bits first, code 3 unused.
"base3" puts five in a byte, since 3^5 = 243 fits: 1.6 bits a trit, where log2(3) = 1.585 is the least. The
first of the five is the most significant digit of q in 0..242, and the byte is q * 256 / 243, rounded up:
multiplying it by 3, over and over, then carries one digit after the other out of its eight bits. That is
how llama.cpp's TQ1_0 stores them (`ggml-quants.c`). Built step by step in `chronology/bitnet_demo`.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from course_utils.kernels.compiled import is_compiled, library
from course_utils.kernels.int8 import int8_matmul
from course_utils.kernels.packing import pack, unpack

Packing = Literal["2bit", "base3"]
PACKINGS = ("2bit", "base3")
POWERS = (81, 27, 9, 3, 1)


def pack_trits(trits: Tensor, packing: Packing) -> Tensor:
    """Integer `trits` `[..., n]` as uint8 `[..., ceil(n / 4)]` ("2bit") or `[..., ceil(n / 5)]` ("base3").

    Each row begins with a byte of its own; the codes left over in its last byte are 0. Raises `ValueError`
    for another value than -1, 0 and 1, `TypeError` for trits that are not integers.
    """
    _check_packing(packing)
    if trits.is_floating_point() or trits.dtype == torch.bool or trits.dtype == torch.uint8:
        raise TypeError(f"trits to pack are signed integers, got {trits.dtype}: use trits.char()")
    bad = trits[(trits < -1) | (trits > 1)]
    if len(bad):
        raise ValueError(f"trit {bad[0].item()} is none of -1, 0 and 1: round the weights first")
    codes = trits.int() + 1
    if packing == "2bit":
        return pack(codes, 2)
    groups = pad(codes, (0, -codes.shape[-1] % 5)).unflatten(-1, (-1, 5))
    q = (groups * _powers(codes)).sum(-1, dtype=torch.int32)
    return ((q * 256 + 242) // 243).to(torch.uint8)


def unpack_trits(packed: Tensor, packing: Packing, n: int) -> Tensor:
    """The trits, int8 `[..., n]`, of bytes that `pack_trits` made.

    Raises `ValueError` for a byte that stands for no trits (code 3 in "2bit", 13 of the 256 bytes in
    "base3") and for another number of bytes than `n` trits take, `TypeError` for what are no bytes.
    """
    _check_packing(packing)
    if packing == "2bit":
        codes = unpack(packed, 2, n)
        if (codes == 3).any():
            raise ValueError(
                "code 3 in packed trits, where 0, 1 and 2 are -1, 0 and 1: the file is broken"
            )
        return codes.to(torch.int8) - 1
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed trits are uint8, got {packed.dtype}")
    if n < 0 or packed.shape[-1:] != (-(-n // 5),):
        raise ValueError(
            f"{n} trits in base 3 are [..., {-(-n // 5)}] bytes, got {tuple(packed.shape)}"
        )
    q = packed.int() * 243 >> 8
    bad = packed[(q * 256 + 242) // 243 != packed]
    if len(bad):
        raise ValueError(f"byte {bad[0].item()} stands for no five trits: the file is broken")
    codes = q[..., None] // _powers(q) % 3  # [..., bytes, 5]
    return (codes - 1).to(torch.int8).flatten(-2)[..., :n].contiguous()


def add_subtract(x: Tensor, trits: Tensor) -> Tensor:
    """`x @ trits.T` of int8 `x` `[m, k]` and `trits` `[n, k]` by additions and subtractions: int32 `[m, n]`.

    Output by output, to show the arithmetic; `int8_matmul` gives the same sums, faster on a CPU.
    """
    x = x.int()
    sums = [x[:, row == 1].sum(1) - x[:, row == -1].sum(1) for row in trits]
    return torch.stack(sums, 1).int()


def base3_product(x: Tensor, packed: Tensor) -> Tensor:
    """`x @ trits.T` of int8 `x` `[m, k]` and "base3" `packed` trits `[n, ceil(k / 5)]`: int32 `[m, n]`.

    By table look-up, as T-MAC (arXiv 2407.00088) computes: for five inputs the sums that a byte can stand for
    are made once, by additions, and all rows look theirs up. Without compiled code the trits are unpacked.
    The bytes are trusted: `unpack_trits` tells those that are no trits. Raises `ValueError` for shapes,
    dtypes and devices that do not agree, and for sums that int32 might not hold.
    """
    n_bytes = -(-x.shape[-1] // 5)
    if x.dtype != torch.int8 or packed.dtype != torch.uint8 or x.device != packed.device:
        raise ValueError(
            f"base3_product takes int8 and uint8 on one device, got {x.dtype} on {x.device} and "
            f"{packed.dtype} on {packed.device}"
        )
    if x.ndim != 2 or packed.ndim != 2 or packed.shape[1] != n_bytes:
        raise ValueError(
            f"base3_product takes [m, k] and [n, ceil(k / 5)], got {tuple(x.shape)}, {tuple(packed.shape)}"
        )
    if x.shape[1] > (2**31 - 1) // 128:
        raise ValueError(f"{x.shape[1]} columns could overflow an int32 sum: split the product")
    if not (is_compiled(x.device) and x.numel() and packed.numel()):
        return int8_matmul(x, unpack_trits(packed, "base3", x.shape[1]))
    x = pad(x, (0, 5 * n_bytes - x.shape[1])).contiguous()
    packed = packed.contiguous()
    sums = torch.empty(len(x), len(packed), dtype=torch.int32)
    pointers = packed.data_ptr(), x.data_ptr(), sums.data_ptr()
    library().base3_product(*pointers, len(x), len(packed), n_bytes, torch.get_num_threads())
    return sums


def _powers(like: Tensor) -> Tensor:
    return torch.tensor(POWERS, dtype=torch.int32, device=like.device)


def _check_packing(packing: str) -> None:
    if packing not in PACKINGS:
        raise ValueError(f"packing {packing!r}: choose one of {', '.join(PACKINGS)}")
