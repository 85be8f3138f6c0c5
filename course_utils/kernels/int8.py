"""The int8 matrix product with int32 accumulation."""

import torch
from torch import Tensor

# A product of two codes is at most 128^2 in magnitude, and float32 holds every integer up to 2^24:
# a sum over 1024 of them is exact in float32, whatever the order of the additions.
EXACT_COLUMNS = 2**24 // 128**2


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T` of int8 `a` `[m, k]` and `b` `[n, k]`, accumulated in int32: `[m, n]` int32.

    Exact for k up to (2^31 - 1) // 128^2 = 131,071; beyond that an int32 sum could overflow, so longer
    ones are refused.
    Computed piece by piece in float32, which is exact for pieces of 1,024 columns and takes a CPU's
    fastest matrix product; the pieces are added as int32.
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise TypeError(f"int8_matmul needs int8 codes, got {a.dtype} and {b.dtype}")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"int8_matmul needs [m, k] and [n, k], got {tuple(a.shape)}, {tuple(b.shape)}"
        )
    if a.shape[1] > (2**31 - 1) // 128**2:
        raise ValueError(f"{a.shape[1]} columns could overflow an int32 sum: split the product")
    total = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
    for left, right in zip(a.split(EXACT_COLUMNS, 1), b.split(EXACT_COLUMNS, 1), strict=True):
        total += (left.float() @ right.float().T).int()
    return total
