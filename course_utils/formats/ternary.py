"""Ternary weights as other tools store them: llama.cpp's TQ2_0 and TQ1_0, transformers' BitNet.

llama.cpp cuts a row into blocks of 256 and gives each a float16 scale of its own, though BitNet has one for
the whole matrix: 66 bytes a block in TQ2_0 (2.0625 bits a weight), 54 in TQ1_0 (1.6875). The bytes are
those of `gguf.quants`. `transformers` packs four rows of the matrix into one, and keeps one scale beside.
"""

import torch
from torch import Tensor

from course_utils.kernels import pack_trits, unpack_trits

BLOCK = 256


def to_tq2_0(trits: Tensor, scale: Tensor) -> Tensor:
    """`trits` (int8 `[out, in]`) and `scale` (`[1, 1]` or `[out, 1]`) as uint8 `[out, in / 256 * 66]`.

    A byte of a block holds four trits that lie 32 apart. `in` must be a multiple of 256.
    """
    blocks = _blocks(trits)
    codes = blocks.unflatten(2, (2, 4, 32)).transpose(3, 4).flatten(2)  # four of a byte together
    return _with_scales(pack_trits(codes, "2bit"), blocks, scale)


def from_tq2_0(stored: Tensor) -> tuple[Tensor, Tensor]:
    """The trits (int8 `[out, in]`) and the blocks' scales (float32 `[out, in / 256]`) of TQ2_0."""
    codes, scales = _split(stored, 64)
    trits = unpack_trits(codes, "2bit", BLOCK).unflatten(2, (2, 32, 4)).transpose(3, 4)
    return trits.flatten(2).flatten(1), scales


def to_tq1_0(trits: Tensor, scale: Tensor) -> Tensor:
    """The same as uint8 `[out, in / 256 * 54]`.

    A block's first 160 trits fill 32 bytes with five that lie 32 apart, the next 80 fill 16 bytes with
    five that lie 16 apart, and the last 16 fill 4 bytes with four that lie 4 apart.
    """
    blocks = _blocks(trits)
    stored = [
        pack_trits(part.unflatten(2, (digits, -1)).transpose(2, 3), "base3").flatten(2)
        for part, digits in zip(blocks.split((160, 80, 16), 2), (5, 5, 4), strict=True)
    ]
    return _with_scales(torch.cat(stored, 2), blocks, scale)


def from_tq1_0(stored: Tensor) -> tuple[Tensor, Tensor]:
    """The trits (int8 `[out, in]`) and the blocks' scales (float32 `[out, in / 256]`) of TQ1_0."""
    codes, scales = _split(stored, 52)
    trits = [
        unpack_trits(part[..., None], "base3", digits).transpose(2, 3).flatten(2)
        for part, digits in zip(codes.split((32, 16, 4), 2), (5, 5, 4), strict=True)
    ]
    return torch.cat(trits, 2).flatten(1), scales


def to_transformers(trits: Tensor) -> Tensor:
    """`trits` (int8 `[out, in]`) as uint8 `[out / 4, in]`, as `integrations/bitnet.py` packs them.

    Row r of the bytes holds rows r, r + out / 4, ... of the matrix, lowest bits first. The scale is stored
    beside it, under one name in two conventions: the class `BitLinear` divides by `weight_scale`, so it
    takes 1 / gamma, and `AutoBitLinear` multiplies by it, so it takes gamma.
    """
    if len(trits) % 4:
        raise ValueError(f"{len(trits)} rows are no multiple of 4, the rows that share bytes")
    rows = trits.unflatten(0, (4, -1)).movedim(0, -1)  # [out / 4, in, 4]
    return pack_trits(rows, "2bit").squeeze(-1)


def from_transformers(stored: Tensor) -> Tensor:
    """The trits (int8 `[out, in]`) of uint8 `[out / 4, in]`."""
    return unpack_trits(stored[..., None], "2bit", 4).movedim(-1, 0).flatten(0, 1)


def _blocks(trits: Tensor) -> Tensor:
    """`[out, blocks, 256]`."""
    if trits.shape[1] % BLOCK:
        raise ValueError(f"{trits.shape[1]} columns are no multiple of {BLOCK}, llama.cpp's block")
    return trits.unflatten(1, (-1, BLOCK))


def _with_scales(codes: Tensor, blocks: Tensor, scale: Tensor) -> Tensor:
    # llama.cpp takes the largest magnitude of a block for its scale: 0 where all trits are.
    scales = scale.half().expand(*blocks.shape[:2])[..., None] * blocks.any(2, keepdim=True)
    if not scales.isfinite().all():
        raise ValueError(f"scale {scale.max().item():.6g} does not fit into float16 (65504)")
    return torch.cat((codes, scales.contiguous().view(torch.uint8)), 2).flatten(1)


def _split(stored: Tensor, code_bytes: int) -> tuple[Tensor, Tensor]:
    if stored.dtype != torch.uint8:
        raise TypeError(f"stored blocks are uint8, got {stored.dtype}")
    if stored.ndim != 2 or stored.shape[1] % (code_bytes + 2):
        raise ValueError(
            f"rows of blocks are [out, blocks * {code_bytes + 2}] bytes, got {tuple(stored.shape)}"
        )
    blocks = stored.unflatten(1, (-1, code_bytes + 2))
    codes, scales = blocks.split((code_bytes, 2), 2)
    return codes, scales.contiguous().view(torch.float16).float().squeeze(2)
