"""QuIP#'s E8P: 65,536 points of a shifted E8 lattice, for 8 weights in 16 bits.

E8 packs balls in 8 dimensions as tightly as can be. The points of D8 + 1/2 are vectors of half-integers with
an even sum; E8P moves them by 1/4 up or down (Tseng et al. 2024, "QuIP#: Even Better LLM Quantization with
Hadamard Incoherence and Lattice Codebooks", arXiv 2402.04396; the authors' `latticee8_padded12.py`). A
pattern of magnitudes is one of 256, seven signs are free, and the eighth makes the sum even. So nothing but
256 patterns has to be known to a decoder, and they are computed here.

The 256: all 227 patterns of squared length 10 at most, and 29 of the 56 with five 3/2 and three 1/2, of
squared length 12. The authors list their 29 by hand, and one of them twice, which leaves 65,280 points; ours
are the first 29 in descending order. Built step by step in `chronology/tpoti_two_bit_ladder`.
"""

from functools import cache
from itertools import combinations, product

import torch
from torch import Tensor

LENGTH = 8
SHIFT = 0.25
PART = 2**12  # vectors compared with the patterns at a time


@cache
def e8_patterns() -> Tensor:
    """The 256 patterns of magnitudes, float32 `[256, 8]`, half-integers."""
    short = [
        halves
        for halves in product((1, 3, 5), repeat=LENGTH)  # in halves
        if sum(h * h for h in halves) <= 4 * 10
    ]
    long = [
        tuple(3 if i in large else 1 for i in range(LENGTH))
        for large in combinations(range(LENGTH), 5)  # descending: the first has its 3s in front
    ]
    # "cpu" by name: a packed model is loaded with "meta" as the default
    return torch.tensor([*short, *long[: 256 - len(short)]], device="cpu") / 2


def nearest_e8(x: Tensor) -> Tensor:
    """Codes of the nearest point to each of `x` `[n, 8]`: uint8 `[n, 2]`, the pattern and a byte of signs.

    Bits 0 to 6 of the second byte say which of the first seven numbers are negative before the shift, bit 7
    that the shift is +1/4. With the eighth sign given by the others, the nearest signs may not be allowed:
    then the one goes wrong that costs least.
    """
    patterns = e8_patterns().to(x.device)
    return torch.cat([_nearest(part.float(), patterns) for part in x.split(PART)])


def e8_points(codes: Tensor) -> Tensor:
    """The points (float32 `[..., 8]`) of `codes` `[..., 2]` that `nearest_e8` made."""
    pattern, bits = codes[..., 0].int(), codes[..., 1].int()
    magnitudes = e8_patterns().to(codes.device)[pattern]  # [..., 8]
    places = torch.arange(LENGTH - 1, device=codes.device)
    negative = (bits[..., None] >> places) & 1  # [..., 7]
    last = (negative.sum(-1, keepdim=True) + _odd(magnitudes)) % 2
    signs = 1 - 2 * torch.cat([negative, last], -1)
    return signs * magnitudes + SHIFT * (2 * (bits >> LENGTH - 1) - 1)[..., None]


def _odd(magnitudes: Tensor) -> Tensor:
    """1 where the sum of magnitudes is odd, else 0 (int32 `[..., 1]`): so many signs, modulo 2, it takes."""
    return (magnitudes.sum(-1, keepdim=True) % 2).int()


def _nearest(x: Tensor, patterns: Tensor) -> Tensor:
    candidates = [_nearest_shifted(x, patterns, shift) for shift in (-SHIFT, SHIFT)]
    (down, codes), (up, codes_up) = candidates
    return torch.where((up < down)[:, None], codes_up, codes)


def _nearest_shifted(x: Tensor, patterns: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """Squared distance `[n]` to the nearest point with this shift, and its code `[n, 2]`."""
    y = x - shift
    size, negative = y.abs(), y < 0  # [n, 8]
    distance = size.square().sum(1, keepdim=True) - 2 * size @ patterns.T + patterns.square().sum(1)
    # A magnitude p with the wrong sign is (|y| + p)^2 instead of (|y| - p)^2: 4 |y| p more.
    wrong = (negative.sum(1, keepdim=True) + _odd(patterns).T) % 2  # [n, 256]
    least = (size[:, None] * patterns).amin(2)  # [n, 256]
    best, pattern = (distance + 4 * wrong * least).min(1)
    flipped = (size * patterns[pattern]).argmin(1, keepdim=True)
    turn = wrong.gather(1, pattern[:, None]).bool()
    at = torch.arange(LENGTH, device=x.device)
    negative = negative ^ (turn & (at == flipped))
    bits = (negative[:, :-1].int() << at[:-1]).sum(1) + (int(shift > 0) << LENGTH - 1)
    return best, torch.stack([pattern, bits], 1).to(torch.uint8)
