"""The product with packed codes in Triton: the loop of `cpu.cpp`, as a GPU takes it.

A program computes some rows for one token. It reads a tile's words for all its rows at once, and one shift
and one mask cut a code out of each word, as on a CPU. The inputs are not put into that order beforehand: they
are read at a step of `CODES`, out of the cache. Shown in `foundations/packed_kernels`.

`grouped_linear` takes it on a GPU for a few tokens, where Triton supports the GPU. Without one it runs under
Triton's interpreter, for `TRITON_INTERPRET=1` in the environment before Triton is first imported. Left out:
codebooks, 3 bits, integer products, several tokens a program, and tuning of `ROWS`.
"""

import os

import torch
from torch import Tensor

from course_utils.kernels.grouped import GroupedCodes

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ROWS = 16  # of a program
WIDTHS = (2, 4, 8)
OLDEST = (8, 0)  # compute capability that Triton supports: a T4 has 7.5

if triton is not None:

    @triton.jit
    def _product(
        words, scale, zero, x, x_sum, y, rows, tiles, tiles_of_group,
        BITS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """y [tokens, rows] of words [rows, tiles, WORDS], scale and zero [rows, groups],
        x [tokens, tiles, TILE], x_sum [tokens, tiles]."""
        CODES: tl.constexpr = 32 // BITS  # of a word
        WORDS: tl.constexpr = TILE // CODES  # of a tile
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
        token = tl.program_id(1)
        there, word = row < rows, tl.arange(0, WORDS)  # [ROWS], [WORDS]
        sums = tl.zeros([ROWS], dtype=tl.float32)
        for tile in range(tiles):
            at = ((row * tiles + tile) * WORDS)[:, None] + word[None, :]
            packed = tl.load(words + at, mask=there[:, None], other=0)  # [ROWS, WORDS]
            inputs = x + (token * tiles + tile) * TILE + word * CODES  # [WORDS]
            products = tl.zeros([ROWS], dtype=tl.float32)
            for c in tl.static_range(CODES):
                q = (packed >> (BITS * c)) & ((1 << BITS) - 1)
                products += tl.sum(q.to(tl.float32) * tl.load(inputs + c)[None, :], axis=1)
            group = row * (tiles // tiles_of_group) + tile // tiles_of_group
            S = tl.load(scale + group, mask=there, other=0.0)
            Z = tl.load(zero + group, mask=there, other=0.0)
            sums += S * (products - Z * tl.load(x_sum + token * tiles + tile))
        tl.store(y + token * rows + row, sums, mask=there)


def takes(weight: GroupedCodes) -> bool:
    """Whether `triton_linear` has code for `weight`, and Triton runs where it lies."""
    if triton is None or _no_code(weight) is not None:
        return False
    if weight.codes.is_cuda:
        return torch.cuda.get_device_capability(weight.codes.device) >= OLDEST
    return _interprets()


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _no_code(weight: GroupedCodes) -> str | None:
    """What of `weight` the kernel has no code for, or None."""
    if weight.high_first:
        return "high_first"
    if weight.n_bits in WIDTHS and weight.zero is not None and weight.tile is not None:
        return None
    kind = "a codebook" if weight.zero is None else f"{weight.n_bits} bits"
    return f"{kind} in groups of {weight.columns // weight.scale.shape[1]}"


def triton_linear(x: Tensor, weight: GroupedCodes) -> Tensor:
    """`x @ W.T` for float `x` `[tokens, columns]`, `[tokens, out]` in the dtype of `x`, by Triton.

    Raises ImportError without Triton; RuntimeError on a CPU without its interpreter; ValueError for an `x`
    that does not fit, and for a weight that the kernel has no code for: it takes 2, 4 or 8 bits with zero
    points, in groups that a tile of 32 divides.
    """
    if triton is None:
        raise ImportError("Triton is not installed here: use grouped_linear, or install triton")
    if x.device.type == "cpu" and not _interprets():
        raise RuntimeError(
            "Triton needs a GPU: on a CPU set TRITON_INTERPRET=1 before it is imported"
        )
    if x.ndim != 2 or x.shape[1] != weight.columns or not x.is_floating_point():
        raise ValueError(
            f"inputs are float [tokens, {weight.columns}], got {x.dtype} {tuple(x.shape)}"
        )
    if x.device != weight.codes.device:
        raise ValueError(f"inputs are on {x.device}, codes on {weight.codes.device}")
    if missing := _no_code(weight):
        raise ValueError(f"no Triton code for {missing}: use grouped_linear")
    (out, groups), tokens, tile = weight.scale.shape, len(x), weight.tile
    y = torch.empty(tokens, out, device=x.device)
    if not y.numel():
        return y.to(x.dtype)
    tiles = weight.columns // tile
    values = x.detach().float().contiguous()
    words = weight.codes.contiguous().view(torch.int32)
    x_sum = values.view(tokens, tiles, tile).sum(2)
    _product[triton.cdiv(out, ROWS), tokens](
        words, weight.scale.contiguous(), weight.zero.contiguous(), values, x_sum, y,
        out, tiles, tiles // groups, BITS=weight.n_bits, TILE=tile, ROWS=ROWS,
    )  # fmt: skip
    return y.to(x.dtype)
