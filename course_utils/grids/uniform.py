"""The uniform grid: real values and their integer codes, r = S (q - Z).

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", arXiv 1712.05877, equation 1. Built step by step in `foundations/linear_mapping`. All
functions work elementwise and broadcast, so that one of them serves scales of a tensor, of rows and of
groups.
"""

from typing import Literal

import torch
from torch import Tensor

# A scale that float16 rounds by more than this is refused: at 1% the ends of a 4-bit grid move by 0.15
# of a step. Normal float16 numbers round by 0.05% at most; those below 6.1e-5 have fewer digits.
SCALE_TOLERANCE = 0.01

Rounding = Literal["half_even", "half_away", "stochastic"]


def code_range(n_bits: int, *, signed: bool = False, narrow: bool = False) -> tuple[int, int]:
    """Lowest and highest code of `n_bits` bits (1..16): (0, 15) for 4, (-8, 7) signed.

    `narrow` leaves out the lowest of the signed codes, (-7, 7), so that every code has its negative.
    """
    if not isinstance(n_bits, int) or not 1 <= n_bits <= 16:
        raise ValueError(f"n_bits {n_bits}: a code has a whole number of bits, 1 to 16")
    if narrow and (not signed or n_bits == 1):
        raise ValueError("a narrow range is one of signed codes, of 2 bits or more")
    if signed:
        half = 2 ** (n_bits - 1)
        return -half + narrow, half - 1
    return 0, 2**n_bits - 1


def scale_and_zero_point(
    minimum: Tensor, maximum: Tensor, low: int, high: int, *, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale S (float32) and zero point Z (int32) of the grid `low..high` over [minimum, maximum].

    The range is widened to hold 0, so that 0 has a code of its own.
    Asymmetric: S = (maximum - minimum) / (high - low), Z = low - round(minimum / S), rounded half to
    even, and clamped to low..high, where only float32's rounding can have pushed it out.
    Symmetric: S = max(-minimum, maximum) / ((high - low) / 2), and Z is the middle: 0 of signed codes,
    (low + high + 1) // 2 of unsigned ones.
    An empty range, and one so small that 1 / S is not finite (S below 3e-39), gets S = 1: its values
    decode to exact zeros. Otherwise S and Z are those of `torch.ao.quantization`'s observers, which
    replace an S below their eps by eps.

    Raises ValueError for NaN, infinity, minimum > maximum, or where a width, a scale or what
    an end of the range decodes to overflows float32; also for a grid of fewer than two codes.
    """
    if low >= high:
        raise ValueError(f"a grid of codes {low}..{high} spans no range: low has to be below high")
    minimum, maximum = torch.broadcast_tensors(minimum.float(), maximum.float())
    below, above = minimum.clamp(max=0), maximum.clamp(min=0)
    if symmetric:
        largest = torch.maximum(-below, above)
        scale = largest / ((high - low) / 2)
    else:
        scale = (above - below) / (high - low)
    width = maximum - minimum
    sound = width.isfinite() & (width >= 0) & scale.isfinite()
    scale = torch.where(sound & ~(1 / scale).isfinite(), 1.0, scale)
    if symmetric:
        middle = 0 if low < 0 else (low + high + 1) // 2
        zero_point = torch.full_like(scale, middle)
    else:
        zero_point = (low - (below / scale).round()).clamp(low, high)
    lowest = scale * (below / scale).round().clamp(min=low - zero_point)
    highest = scale * (above / scale).round().clamp(max=high - zero_point)
    if (bad := ~(sound & lowest.isfinite() & highest.isfinite())).any():
        raise ValueError(
            f"the range [{minimum[bad][0].item()}, {maximum[bad][0].item()}] is no finite float32 "
            "interval: look for NaN, infinite or extremely large values in what it was taken from"
        )
    return scale, zero_point.int()


def round_codes(
    x: Tensor, rounding: Rounding = "half_even", generator: torch.Generator | None = None
) -> Tensor:
    """`x` rounded to integers, still float.

    "half_even" sends a tie to the even neighbour (`torch.round`, IEEE 754's default), "half_away" away
    from zero, and "stochastic" rounds up with a probability equal to the fraction, so that the mean
    over many draws (from `generator`, else from torch's default one) is `x` itself.
    """
    if rounding == "half_even":
        return x.round()
    if rounding == "half_away":
        whole = x.trunc()
        return whole + x.sign() * ((x - whole).abs() >= 0.5)
    if rounding == "stochastic":
        below = x.floor()
        draw = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return below + (draw < x - below)
    raise ValueError(f"rounding {rounding!r}: choose 'half_even', 'half_away' or 'stochastic'")


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    low: int,
    high: int,
    *,
    rounding: Rounding = "half_even",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Codes (int32) of `x`: clamp(round(x / S) + Z, low, high).

    The quotient is computed in float32 as x * (1 / S), as `torch.fake_quantize_per_tensor_affine` and
    `_per_channel_affine` do, with which the result agrees bit for bit: where x / S lies within float32's
    rounding of a tie, a division may give the neighbouring code.

    Raises ValueError if `x` is not finite, or if S or 1 / S is not positive and finite.
    """
    x, inverse = x.float(), 1 / scale.float()
    if not x.isfinite().all():
        raise ValueError(
            f"{int((~x.isfinite()).sum())} of {x.numel()} values to quantize are NaN or infinite: "
            "they have no code"
        )
    if not ((inverse > 0) & inverse.isfinite()).all():
        raise ValueError(
            f"scales from {scale.min().item()} to {scale.max().item()}: each has to be positive, finite "
            "and at least 3e-39, so that its inverse is finite"
        )
    return (round_codes(x * inverse, rounding, generator) + zero_point).clamp(low, high).int()


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The real values (float32) of integer `codes`: S (q - Z)."""
    return (codes.float() - zero_point.float()) * scale.float()


def stored_scale(scale: Tensor, scale_dtype: Literal["float16", "float32"]) -> Tensor:
    """`scale` (float32) in the dtype in which it is stored.

    Raises ValueError for a scale that float16 would change by more than 1%: above 65,504, or below
    about 3e-6.
    """
    stored = scale.to(getattr(torch, scale_dtype))
    off = (stored.float() - scale).abs() > SCALE_TOLERANCE * scale
    if off.any():
        raise ValueError(
            f"{int(off.sum())} of {off.numel()} scales do not fit into float16, the first is "
            f"{scale[off][0].item():.3g} and would become {stored[off][0].item():.3g}: "
            "use scale_dtype='float32'"
        )
    return stored


def group_width(group_size: int | Literal["row"], columns: int) -> int:
    """How many neighbouring columns of a row share a scale; ValueError if that does not divide `columns`."""
    size = columns if group_size == "row" else group_size
    if columns % size:
        fitting = [n for n in range(min(size, columns), 0, -1) if columns % n == 0][:3]
        raise ValueError(
            f"group_size {size} does not divide the {columns} columns of this layer: use "
            f"{', '.join(map(str, fitting))} or 'row'"
        )
    return size
