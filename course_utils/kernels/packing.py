"""Codes of 1 to 8 bits in bytes, with no bit wasted.

The layout is a little-endian bit stream along the last dimension: code i takes the bits from
`i * n_bits` on, lowest bit first, and bit j of the stream is bit `j % 8` of byte `j // 8`. So at 4
bits an even code is the low nibble of its byte, and at 3 bits 8 codes fill 3 bytes. Built step by step
in `foundations/linear_mapping`.
"""

from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack(codes: Tensor, n_bits: int) -> Tensor:
    """Integer `codes` `[..., n]` in 0..2^n_bits - 1 as uint8 `[..., ceil(n * n_bits / 8)]`.

    `n_bits` is 1 to 8. Each row along the last dimension starts at a byte of its own; the bits left
    over in its last byte are 0. Raises `ValueError` for a code out of range, `TypeError` for codes
    that are not integers.
    """
    group_codes, group_bytes = _group(n_bits)
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise TypeError(f"codes to pack are integers, got {codes.dtype}: round them first")
    if codes.ndim == 0:
        raise ValueError("codes to pack are [..., n], got a scalar: give it a dimension")
    if codes.numel() and (codes.min() < 0 or codes.max().item() >= 2**n_bits):
        codes = codes.long()
        bad = codes[(codes < 0) | (codes >= 2**n_bits)]
        raise ValueError(
            f"code {bad[0].item()} does not fit into {n_bits} bits (0..{2**n_bits - 1}): "
            "shift signed codes to start at 0, or take more bits"
        )
    n = codes.shape[-1]
    groups = -(-n // group_codes)
    if group_bytes == 1:  # no code lies in two bytes, so that bytes are wide enough to work in
        codes = pad(codes.to(torch.uint8), (0, groups * group_codes - n))
        packed = codes[..., ::group_codes].clone(memory_format=torch.contiguous_format)
        for i in range(1, group_codes):
            packed |= codes[..., i::group_codes] << i * n_bits
        return packed
    codes = codes.long()
    codes = pad(codes, (0, groups * group_codes - n)).unflatten(-1, (groups, group_codes))
    words = (codes << _steps(group_codes, n_bits, codes)).sum(-1, keepdim=True)
    packed = (words >> _steps(group_bytes, 8, codes)) & 255
    packed = packed.to(torch.uint8).flatten(-2)[..., : _length(n, n_bits)]
    # A single row counts as contiguous whatever its stride, which its view as words then refuses.
    return packed.clone(memory_format=torch.contiguous_format)


def unpack(packed: Tensor, n_bits: int, n: int) -> Tensor:
    """The codes, uint8 `[..., n]`, of bytes `packed` `[..., ceil(n * n_bits / 8)]` made by `pack`.

    Raises `ValueError` if the number of bytes is not that of `n` codes, `TypeError` if they are no
    bytes.
    """
    group_codes, group_bytes = _group(n_bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed codes are uint8, got {packed.dtype}")
    if n < 0 or packed.shape[-1:] != (_length(n, n_bits),):
        raise ValueError(
            f"{n} codes of {n_bits} bits are [..., {_length(n, n_bits)}] bytes, "
            f"got {tuple(packed.shape)}"
        )
    groups = -(-n // group_codes)
    words = pad(packed, (0, groups * group_bytes - packed.shape[-1]))
    words = words.unflatten(-1, (groups, group_bytes))
    if group_bytes > 1:  # codes that straddle bytes: 24 bits at 3 and 6 bits, 40 and 56 at 5 and 7
        words = words.to(torch.int64 if group_bytes > 3 else torch.int32)
        words = (words << _steps(group_bytes, 8, words)).sum(-1, keepdim=True, dtype=words.dtype)
    codes = (words >> _steps(group_codes, n_bits, words)) & (2**n_bits - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :n].contiguous()


def _length(n: int, n_bits: int) -> int:
    """Bytes that `n` codes of `n_bits` bits take: ceil(n * n_bits / 8)."""
    return -(-n * n_bits // 8)


def _group(n_bits: int) -> tuple[int, int]:
    """The smallest number of codes that fill whole bytes, and how many bytes."""
    if not isinstance(n_bits, int) or n_bits not in range(1, 9):
        raise ValueError(f"n_bits {n_bits} must be a whole number from 1 to 8")
    common = gcd(n_bits, 8)
    return 8 // common, n_bits // common


def _steps(count: int, width: int, like: Tensor) -> Tensor:
    """Positions of the lowest bits of `count` neighbours of `width` bits each."""
    return torch.arange(0, count * width, width, dtype=like.dtype, device=like.device)
