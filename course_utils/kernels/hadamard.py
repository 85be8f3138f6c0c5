"""The fast Walsh-Hadamard transform: a rotation of n numbers by n log n additions.

A Hadamard matrix H holds only 1 and -1, and H H^T = n I: divided by sqrt(n) it is a rotation, which spreads
an outlier over all n numbers. Sylvester's matrices have the sizes 2^k. A Kronecker product of two Hadamard
matrices is one again, and Paley's construction (from the squares modulo a prime q of the form 4 j + 3) gives
the sizes q + 1, of which 12 and 20 are taken: so 576 = 12 * 12 * 4 and 1536 = 12 * 128 have one.
"""

from functools import cache
from math import sqrt

import torch
from torch import Tensor

from course_utils.kernels.compiled import is_compiled, library

PALEY = (20, 12)  # sizes q + 1, q prime


def hadamard(x: Tensor) -> Tensor:
    """`x @ H.T / sqrt(n)` for `x` `[..., n]` with `hadamard_matrix(n)`; in float32 where `x` is narrower.

    The result has the dtype of `x`. The powers of 2 in n take n log n additions (compiled on a CPU), a factor
    12 or 20 a small product. `x` is left as it is. Raises `ValueError` for an n that has no such matrix, and
    `TypeError` for numbers that are not floats.
    """
    if not x.is_floating_point():
        raise TypeError(f"hadamard takes floats, got {x.dtype}: convert them first")
    n = x.shape[-1]
    *large, power = factors(n)
    y = x if x.dtype == torch.float64 else x.float()
    y = y.reshape(-1, *large, power)
    for axis, size in enumerate(large, 1):
        y = torch.tensordot(y, _paley(size).to(y), dims=([axis], [1])).movedim(-1, axis)
    return (_sylvester(y).reshape(x.shape) / sqrt(n)).to(x.dtype)


def hadamard_matrix(n: int) -> Tensor:
    """A Hadamard matrix `[n, n]` of 1 and -1 in float32: the Kronecker product of those of `factors(n)`."""
    *large, power = factors(n)
    matrix = torch.ones(1, 1)
    for size in large:
        matrix = torch.kron(matrix, _paley(size))
    return torch.kron(matrix, _sylvester(torch.eye(power)))


def factors(n: int) -> list[int]:
    """Sizes of Hadamard matrices whose product is `n`: some of 20 and 12, then a power of 2.

    Raises `ValueError` for other n.
    """
    large, rest = [], n
    for size in PALEY:
        while rest > 0 and rest % size == 0 and _odd(rest) > 1:
            large.append(size)
            rest //= size
    if rest < 1 or _odd(rest) > 1:
        raise ValueError(
            f"no Hadamard matrix of size {n} here: 2^k, times any of 12 and 20, have one; "
            "rotate parts of such a size instead"
        )
    return [*large, rest]


def _odd(n: int) -> int:
    """`n` without its factors of 2."""
    return n // (n & -n)


@cache
def _paley(size: int) -> Tensor:
    """Paley's first construction for the prime q = size - 1: H H^T = size I, entries 1 and -1."""
    q = size - 1
    squares = {j * j % q for j in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if j in squares else -1.0 for j in range(1, q)])
    differences = torch.arange(q)[:, None] - torch.arange(q)[None, :]
    S = torch.zeros(size, size)
    S[0, 1:], S[1:, 0] = 1, -1
    S[1:, 1:] = character[differences % q]  # skew-symmetric, since q % 4 == 3
    return S + torch.eye(size)


def _sylvester(x: Tensor) -> Tensor:
    """Sums and differences over the last axis, of a power of 2; the result is new."""
    n = x.shape[-1]
    x = x.contiguous()
    if x.dtype == torch.float32 and is_compiled(x.device):
        y = x.clone()
        library().hadamard(y.data_ptr(), y.numel() // n if n else 0, n, torch.get_num_threads())
        return y
    y, half = x.clone(), 1
    while half < n:
        pairs = y.unflatten(-1, (-1, 2, half))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([a + b, a - b], -2).flatten(-3)
        half *= 2
    return y
