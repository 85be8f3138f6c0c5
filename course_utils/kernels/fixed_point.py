"""From int32 sums to integer codes with integer arithmetic alone.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", arXiv 1712.05877, section 2.2: the real factor M between the sums
and the codes of the output is written as 2^-n M0 with M0 in [0.5, 1) (equation 6), M0 is held as an
int32 fixed-point number, and the factor 2^-n is a rounding shift. The two roundings are those of
gemmlowp's `fixedpoint.h`. Built step by step in `foundations/integer_arithmetic`.
"""

import math

import torch
from torch import Tensor

INT32 = torch.iinfo(torch.int32)


def quantize_multiplier(real: float) -> tuple[int, int]:
    """The int32 `multiplier` in [2^30, 2^31) and right `shift` in 0..31 that stand for `real`.

    `real` is about `multiplier * 2^(-31 - shift)`, rounded half away from zero: the relative error is
    at most 2^-31. Allowed is 2^-32 <= real < 1 - 2^-32: a smaller factor makes every int32 sum 0, a
    greater one is 1 in this precision and needs a left shift. Others raise `ValueError`.
    """
    if not 2**-32 <= real < 1 - 2**-32:
        raise ValueError(
            f"a multiplier lies between 2^-32 and 1 - 2^-32, got {real}: "
            "it is scale_a * scale_b / scale_out, so check the scale of the output"
        )
    fraction, exponent = math.frexp(real)  # real = fraction * 2^exponent, fraction in [0.5, 1)
    multiplier = math.floor(fraction * 2**31 + 0.5)
    if multiplier == 2**31:  # rounded up to 1
        multiplier, exponent = 2**30, exponent + 1
    return multiplier, -exponent


def requantize(
    sums: Tensor,
    multiplier: int | Tensor,
    shift: int | Tensor,
    zero_point: int | Tensor,
    low: int,
    high: int,
) -> Tensor:
    """`clamp(round(sums * real) + zero_point, low, high)` in integers: int32, the shape of `sums`.

    `sums` is int32; `multiplier` and `shift` are from `quantize_multiplier`, as ints or as integer
    tensors that broadcast with `sums` (one for each output). The product is rounded twice, once to an
    integer before the shift and once by the shift, so it is within 1/2 + 2^-(shift + 1) of the exact
    product with the multiplier (and within 1/2 if the shift is 0).
    """
    if sums.dtype != torch.int32:
        raise TypeError(f"sums to requantize are int32, got {sums.dtype}")
    for name, value in (("multiplier", multiplier), ("shift", shift), ("zero_point", zero_point)):
        if torch.as_tensor(value).is_floating_point():
            raise TypeError(f"{name} is an integer here, got {value}: use quantize_multiplier")
    if low > high:
        raise ValueError(f"the range of codes {low}..{high} is empty: swap low and high")
    scaled = rounding_shift_right(rounding_doubling_high_multiply(sums, multiplier), shift)
    # In int64, so that adding the zero point cannot overflow before the clamp.
    return (scaled.long() + zero_point).clamp(low, high).int()


def rounding_doubling_high_multiply(a: Tensor, b: int | Tensor) -> Tensor:
    """The high 32 bits of `2 a b` for int32 values: `a b / 2^31`, int32, rounded half up.

    Saturating: -2^31 times itself, the one product that does not fit, gives 2^31 - 1. gemmlowp's
    `SaturatingRoundingDoublingHighMul`.
    """
    return ((a.long() * b + 2**30) >> 31).clamp(max=INT32.max).int()


def rounding_shift_right(x: Tensor, shift: int | Tensor) -> Tensor:
    """`x / 2^shift` for int32 `x` and a shift of 0..31, rounded half away from zero.

    gemmlowp's `RoundingDivideByPOT`.
    """
    shift = torch.as_tensor(shift, device=x.device)
    if ((shift < 0) | (shift > 31)).any():
        raise ValueError(f"a right shift is 0..31, got {shift.tolist()}: use quantize_multiplier")
    x, shift = x.long(), shift.long()
    half = (1 << shift) >> 1
    return (x.sign() * ((x.abs() + half) >> shift)).int()
