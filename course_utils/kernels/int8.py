"""The int8 matrix product with int32 accumulation."""

from functools import cache

import torch
from torch import Tensor

from course_utils.kernels.compiled import is_compiled, library

# A product of two codes is at most 128^2 in magnitude, and float32 holds every integer up to 2^24:
# a sum over 1024 of them is exact in float32, whatever the order of the additions.
EXACT_COLUMNS = 2**24 // 128**2
FEW_ROWS = 4  # up to so many the weight comes from memory once, and compiled code is as fast as any


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T` of int8 `a` `[m, k]` and `b` `[n, k]`, accumulated in int32: `[m, n]` int32.

    Exact for k up to (2^31 - 1) // 128^2 = 131,071; beyond that an int32 sum could overflow, so longer
    ones are refused.
    A few rows of `a` are multiplied by compiled code, many by torch's own integer product where the processor
    has instructions for it (VNNI). Elsewhere it is computed piece by piece in float32, which is exact for
    pieces of 1,024 columns; the pieces are added as int32.
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise TypeError(f"int8_matmul needs int8 codes, got {a.dtype} and {b.dtype}")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"int8_matmul needs [m, k] and [n, k], got {tuple(a.shape)}, {tuple(b.shape)}"
        )
    if a.shape[1] > (2**31 - 1) // 128**2:
        raise ValueError(f"{a.shape[1]} columns could overflow an int32 sum: split the product")
    if a.numel() and b.numel() and is_compiled(a.device):
        if len(a) <= FEW_ROWS:
            return _compiled(a.contiguous(), b.contiguous())
        if _torch_is_quick_and_exact():
            return torch._int_mm(a, b.T)
    return _in_float_pieces(a, b)


def _compiled(a: Tensor, b: Tensor) -> Tensor:
    product = torch.empty(len(a), len(b), dtype=torch.int32)
    pointers = (tensor.data_ptr() for tensor in (a, b, product))
    library().int8_matmul(*pointers, len(a), len(b), a.shape[1], torch.get_num_threads())
    return product


@cache
def _torch_is_quick_and_exact() -> bool:
    """Whether torch has more than a plain loop, thirty times slower than float32, and it is right.

    Pairs of the largest products saturate in instructions older than VNNI.
    """
    if not torch.cpu._is_vnni_supported():
        return False
    codes = torch.tensor([-128, 127], dtype=torch.int8).repeat(32)[:, None].expand(64, 256)
    return torch.equal(torch._int_mm(codes, codes.T), _in_float_pieces(codes, codes))


def _in_float_pieces(a: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
    for left, right in zip(a.split(EXACT_COLUMNS, 1), b.split(EXACT_COLUMNS, 1), strict=True):
        total += (left.float() @ right.float().T).int()
    return total


def int8_matmul_zero_points(a: Tensor, a_zero: Tensor, b: Tensor, b_zero: Tensor) -> Tensor:
    """`(a - a_zero) @ (b - b_zero).T` of int8 codes `[m, k]` and `[n, k]` with zero points: int32 `[m, n]`.

    `a_zero` is an int32 scalar or `[m]`, one for each row, `b_zero` a scalar or `[n]`. The zero points are
    moved out of the sum (Jacob et al. 2018, arXiv 1712.05877, equation 7), so that the large product is one
    of codes:

        sum a b - a_zero sum b - b_zero sum a + k a_zero b_zero

    Raises ValueError where the result could overflow int32.
    """
    product = int8_matmul(a, b)
    k = a.shape[1]
    for name, zero, rows in (("a_zero", a_zero, len(a)), ("b_zero", b_zero, len(b))):
        if zero.is_floating_point() or zero.shape not in ((), (rows,)):
            raise ValueError(
                f"{name} is an integer scalar or [{rows}], got {zero.dtype} {tuple(zero.shape)}"
            )
    a_zero, b_zero = a_zero.long().reshape(-1, 1), b_zero.long().reshape(1, -1)
    largest = [int(zero.abs().amax()) if zero.numel() else 0 for zero in (a_zero, b_zero)]
    if max(largest) >= 2**31 or k * (128 + largest[0]) * (128 + largest[1]) >= 2**31:
        raise ValueError(
            f"{k} columns and zero points up to {largest[0]} and {largest[1]} could overflow an int32 "
            "sum: split the product"
        )
    a_zero, b_zero = a_zero.int(), b_zero.int()  # they fit, now that the largest are known
    a_sums = a.sum(1, dtype=torch.int32)[:, None]
    b_sums = b.sum(1, dtype=torch.int32)[None, :]
    return product - a_zero * b_sums - b_zero * a_sums + k * a_zero * b_zero
