"""Codes packed by slices of rows, as the hqq package stores them.

A word does not hold neighbours. The rows `[rows, n]` are cut into as many slices as a word holds codes, and
word r holds row r of every slice, the first slice in the highest bits. So unpacking is a shift and a mask
of whole matrices. Words are bytes at 8, 4, 2 and 1 bits. At 3 bits they are int32 of ten codes, whose two
highest bits stay 0: 3.2 bits a code. Rows that are missing from the last slice there are filled with 0.

The bytes are those of `hqq.core.bitpack.BitPack` (0.2.8). Built in `chronology/hqq_demo`; `packing` is the
layout of the course's own weights.
"""

import torch
from torch import Tensor

PER_WORD = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}  # codes in a word, by their bits


def pack_slices(codes: Tensor, n_bits: int) -> Tensor:
    """Integer `codes` `[rows, n]` in 0..2^n_bits - 1 as words `[rows / codes in a word, n]`.

    The words are uint8, and int32 at 3 bits. Raises `ValueError` for codes out of range, for widths other
    than 8, 4, 3, 2 and 1, and for rows that do not fill the slices, which only 3 bits pad; `TypeError` for
    codes that are not integers.
    """
    count = _per_word(n_bits)
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise TypeError(f"codes to pack are integers, got {codes.dtype}: round them first")
    if codes.ndim != 2:
        raise ValueError(f"codes to pack by slices are [rows, n], got {tuple(codes.shape)}")
    codes = codes.long()  # a uint8 has no 256 to be compared with
    bad = codes[(codes < 0) | (codes >= 2**n_bits)]
    if len(bad):
        raise ValueError(
            f"code {bad[0].item()} does not fit into {n_bits} bits (0..{2**n_bits - 1}): take more bits"
        )
    rows, n = codes.shape
    missing = -rows % count
    if missing and n_bits != 3:
        raise ValueError(
            f"{rows} rows are no multiple of {count}, the slices of {n_bits} bits: add rows of 0, or "
            "pack neighbours with kernels.pack"
        )
    codes = codes.to(torch.int32 if n_bits == 3 else torch.uint8)
    codes = torch.cat([codes, codes.new_zeros(missing, n)])
    words = codes.new_zeros(len(codes) // count, n)
    for place, piece in enumerate(codes.split(max(len(words), 1))):  # [words, n]
        words |= piece << (count - 1 - place) * n_bits
    return words


def unpack_slices(words: Tensor, n_bits: int, rows: int) -> Tensor:
    """The codes, uint8 `[rows, n]`, of `words` made by `pack_slices`.

    Raises `ValueError` if so many words are not those of `rows` rows, `TypeError` for a wrong dtype.
    """
    count = _per_word(n_bits)
    dtype = torch.int32 if n_bits == 3 else torch.uint8
    if words.dtype != dtype:
        raise TypeError(f"words of {n_bits}-bit codes are {dtype}, got {words.dtype}")
    if words.ndim != 2 or len(words) != -(-rows // count):
        raise ValueError(
            f"{rows} rows of {n_bits}-bit codes are [{-(-rows // count)}, n] words, got "
            f"{tuple(words.shape)}"
        )
    shifts = [(count - 1 - place) * n_bits for place in range(count)]
    slices = [(words >> shift) & (2**n_bits - 1) for shift in shifts]
    return torch.cat(slices)[:rows].to(torch.uint8)


def _per_word(n_bits: int) -> int:
    if n_bits not in PER_WORD:
        raise ValueError(f"n_bits {n_bits}: slices are packed at {', '.join(map(str, PER_WORD))}")
    return PER_WORD[n_bits]
