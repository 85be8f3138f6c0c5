"""Requantization by integers, against Python's unbounded ones and against the real product."""

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from course_utils.kernels import int8_matmul_zero_points, quantize_multiplier, requantize

INT32 = st.integers(-(2**31), 2**31 - 1)
FACTORS = st.floats(2.0**-32, 1, exclude_max=True).filter(lambda f: f < 1 - 2.0**-32)


def gemmlowp(value: int, multiplier: int, shift: int) -> int:
    """SaturatingRoundingDoublingHighMul, then RoundingDivideByPOT, as gemmlowp writes them."""
    product = value * multiplier
    nudge = 2**30 if product >= 0 else 1 - 2**30
    total = product + nudge
    high = abs(total) // 2**31 * (1 if total >= 0 else -1)  # C++ divides towards zero
    mask = 2**shift - 1
    threshold = (mask >> 1) + (high < 0)
    return (high >> shift) + ((high & mask) > threshold)


@settings(max_examples=300, deadline=None)
@given(value=INT32, factor=FACTORS)
@example(value=-(2**31), factor=0.999999)
@example(value=2**31 - 1, factor=0.5)
@example(value=-3, factor=0.5)  # -1.5: a tie in the first rounding
@example(value=-6, factor=0.25)  # and in the second
def test_requantize_rounds_as_gemmlowp_does(value, factor):
    multiplier, shift = quantize_multiplier(factor)
    sums = torch.tensor([value], dtype=torch.int32)
    low, high = -(2**31) + 1, 2**31 - 1
    got = requantize(sums, multiplier, shift, 0, low, high)
    assert got.item() == max(low, min(high, gemmlowp(value, multiplier, shift)))


@settings(max_examples=300, deadline=None)
@given(value=INT32, factor=FACTORS)
def test_requantize_is_within_one_rounding_of_the_real_product(value, factor):
    multiplier, shift = quantize_multiplier(factor)
    got = requantize(
        torch.tensor([value], dtype=torch.int32), multiplier, shift, 0, -(2**31) + 1, 2**31 - 1
    )
    exact = Fraction(value) * Fraction(factor)
    # half a unit for the second rounding, half of 2^-shift for the first, 2^-31 of the value for the
    # 31 bits of the multiplier, and a unit at the lower end, which is cut off
    bound = Fraction(1, 2) + Fraction(1, 2 ** (shift + 1)) + abs(exact) / 2**31
    assert abs(got.item() - exact) <= bound + (value == -(2**31))


@settings(max_examples=200, deadline=None)
@given(factor=FACTORS)
def test_the_multiplier_has_31_significant_bits(factor):
    multiplier, shift = quantize_multiplier(factor)
    assert 2**30 <= multiplier < 2**31 and 0 <= shift <= 31
    assert abs(Fraction(multiplier, 2 ** (31 + shift)) / Fraction(factor) - 1) <= Fraction(1, 2**31)


def test_requantize_adds_the_zero_point_and_clamps():
    multiplier, shift = quantize_multiplier(0.5)
    sums = torch.tensor([-1000, -10, 0, 10, 1000], dtype=torch.int32)
    assert requantize(sums, multiplier, shift, 3, 0, 255).tolist() == [0, 0, 3, 8, 255]


@pytest.mark.parametrize(
    "factor", [0.0, -0.5, 1.0, 2.0, 1e-12, float("nan"), float("inf"), 1 - 1e-15]
)
def test_a_factor_that_has_no_multiplier_is_refused(factor):
    with pytest.raises(ValueError, match="a multiplier lies between"):
        quantize_multiplier(factor)


def test_wrong_sums_shifts_and_ranges_are_refused():
    with pytest.raises(TypeError, match=r"int32, got torch.int64"):
        requantize(torch.tensor([1]), 2**30, 0, 0, 0, 255)
    sums = torch.tensor([1], dtype=torch.int32)
    for shift in (-1, 32):
        with pytest.raises(ValueError, match=rf"a right shift is 0..31, got {shift}"):
            requantize(sums, 2**30, shift, 0, 0, 255)
    with pytest.raises(ValueError, match=r"255..0 is empty"):
        requantize(sums, 2**30, 0, 0, 255, 0)


def test_floats_among_the_integers_are_refused():
    """A zero point of 3.5 was cut to 3, and a shift of 2.5 to 2."""
    sums = torch.tensor([1], dtype=torch.int32)
    for wrong in ((0.5, 0, 0), (2**30, 2.5, 0), (2**30, 0, torch.tensor(3.5))):
        with pytest.raises(TypeError, match="is an integer here"):
            requantize(sums, *wrong, 0, 255)


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 4), n=st.integers(1, 4), k=st.integers(1, 60), seed=st.integers(0, 2**31),
       per_row=st.booleans())  # fmt: skip
def test_corrections_equal_the_product_of_shifted_codes(m, n, k, seed, per_row):
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-128, 128, (rows, k), generator=g).to(torch.int8) for rows in (m, n))
    a_zero, b_zero = (
        torch.randint(-200, 200, (rows,) if per_row else (), generator=g).int() for rows in (m, n)
    )
    expected = (a.long() - a_zero.reshape(-1, 1)) @ (b.long() - b_zero.reshape(-1, 1)).T
    got = int8_matmul_zero_points(a, a_zero, b, b_zero)
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), expected)


def test_zero_points_of_a_wrong_shape_or_size_are_refused():
    a, b = torch.zeros(2, 8, dtype=torch.int8), torch.zeros(3, 8, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"a_zero is an integer scalar or \[2\]"):
        int8_matmul_zero_points(a, torch.zeros(3, dtype=torch.int32), b, torch.tensor(0))
    with pytest.raises(ValueError, match=r"b_zero is an integer scalar or \[3\].*float32"):
        int8_matmul_zero_points(a, torch.tensor(0), b, torch.zeros(3))
    with pytest.raises(ValueError, match="could overflow"):
        int8_matmul_zero_points(a, torch.tensor(2**30), b, torch.tensor(2**30))


def test_zero_points_of_int8_do_not_wrap():
    """|-128| is no int8: the check for overflow once passed because of that."""
    a, b = torch.full((1, 40_000), -128).to(torch.int8), torch.full((1, 40_000), 127).to(torch.int8)
    with pytest.raises(ValueError, match="could overflow"):
        int8_matmul_zero_points(a, torch.tensor(127), b, torch.tensor(-128, dtype=torch.int8))


@pytest.mark.parametrize("zero_point", [2**32 + 1, -(2**31)])
def test_zero_points_beyond_int32_do_not_wrap(zero_point):
    """2^32 + 1 was taken for 1, and the magnitude of -2^31 for a negative one."""
    a, b = torch.zeros(1, 1, dtype=torch.int8), torch.ones(1, 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="could overflow"):
        int8_matmul_zero_points(a, torch.tensor(zero_point), b, torch.tensor(0))


def test_no_rows_give_no_sums():
    a, b = torch.zeros(0, 8, dtype=torch.int8), torch.zeros(3, 8, dtype=torch.int8)
    none = torch.zeros(0, dtype=torch.int32)
    assert int8_matmul_zero_points(a, none, b, torch.tensor(5)).shape == (0, 3)
