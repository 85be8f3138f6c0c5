"""Observers: parity with torch.ao, what each clips, streams in pieces, and bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course_utils.grids.observers import (
    OBSERVERS,
    Entropy,
    MeanSquaredError,
    MinMax,
    MovingAverage,
    Percentile,
    entropy_clip,
    mse_range,
    percentile_range,
)
from course_utils.grids.uniform import code_range, dequantize, quantize, scale_and_zero_point

HISTOGRAMS = {"percentile": Percentile, "mse": MeanSquaredError, "entropy": Entropy}
BIN = 2**-12  # of a histogram, relative to the largest magnitude, at most


def gaussian(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def observed(observer, *pieces):
    """(minimum, maximum) as numbers, after one update a piece."""
    for piece in pieces:
        observer.update(piece)
    return tuple(end.item() for end in observer.range())


def squared_error(x, minimum, maximum, n_bits, symmetric):
    low, high = code_range(n_bits)
    scale, zero_point = scale_and_zero_point(minimum, maximum, low, high, symmetric=symmetric)
    scale, zero_point = scale[:, None], zero_point[:, None]
    codes = quantize(x, scale, zero_point, low, high)
    return (x - dequantize(codes, scale, zero_point)).square().sum(1)


@pytest.mark.parametrize("symmetric", [False, True])
@settings(deadline=None, max_examples=30)
@given(
    pieces=st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=5), min_size=1, max_size=5
    )
)
def test_scales_and_zero_points_equal_those_of_torch_observers(symmetric, pieces):
    observer = pytest.importorskip("torch.ao.quantization.observer", reason="torch.ao is gone")
    qscheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    pairs = [
        (MinMax(symmetric=symmetric), observer.MinMaxObserver(qscheme=qscheme)),
        (
            MovingAverage(symmetric=symmetric),
            observer.MovingAverageMinMaxObserver(averaging_constant=0.01, qscheme=qscheme),
        ),
    ]
    for ours, theirs in pairs:
        for piece in pieces:
            ours.update(torch.tensor(piece))
            theirs(torch.tensor(piece))
        scale, zero_point = scale_and_zero_point(*ours.range(), 0, 255, symmetric=symmetric)
        their_scale, their_zero_point = theirs.calculate_qparams()
        if their_scale > theirs.eps:  # they take it for every scale below it
            assert scale == their_scale and zero_point == their_zero_point


@pytest.mark.parametrize("name", OBSERVERS)
def test_symmetric_ranges_are_symmetric_and_hold_the_larger_side(name):
    x = gaussian(5000) - 0.5
    low, high = observed(OBSERVERS[name](symmetric=True), x)
    assert low == -high
    assert 0.5 * x.abs().max() < high <= x.abs().max()


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_on_uniform_values_nothing_is_clipped(name, symmetric):
    x = 4 * torch.rand(400_000, generator=torch.Generator().manual_seed(1)) - 1
    expected = (-x.max(), x.max()) if symmetric else (x.min(), x.max())
    found = observed(OBSERVERS[name](symmetric=symmetric), x)
    # a percentile of 99.99 is one; the others keep all
    slack = 4e-4 if name == "percentile" else 0
    assert found == pytest.approx(tuple(map(float, expected)), abs=slack + 3 * BIN, rel=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_entropy_clips_between_the_bulk_and_rare_far_outliers(symmetric):
    x = gaussian(1_000_000)
    x[:10] = torch.linspace(20, 25, 10)
    low, high = observed(Entropy(symmetric=symmetric), x)
    assert 2.5 < high < 20
    assert low == (-high if symmetric else max(x.min(), -high))


def test_entropy_of_8_bits_asymmetric_uses_all_levels_on_one_sided_values():
    """With 256 levels on one side, as many bins are kept at least: 1/8 of the maximum, not 1/16."""
    x = gaussian(200_000).relu()
    x[0] = 1000
    half, full = (observed(Entropy(symmetric=s), x)[1] for s in (True, False))
    assert half >= 1000 / 16 and full >= 1000 / 8
    assert observed(Entropy(), -x) == (-full, 0)


def kl_clip(counts, levels):
    """The search of `entropy_clip` in plain loops, from its description."""
    counts = np.array(counts, dtype=float)
    counts[0] = counts[1]
    best, least = 0, np.inf
    for i in range(levels, len(counts) + 1):
        p = counts[:i].copy()
        p[-1] += counts[i:].sum()
        q = np.zeros(i)
        level = np.arange(i) * levels // i
        for k in range(levels):
            full = (level == k) & (counts[:i] > 0)
            q[full] = counts[:i][level == k].sum() / max(full.sum(), 1)
        alone = (counts[:i] > 0).sum() == 1 and counts[i:].sum() > 0
        if alone or p.sum() == 0 or q.sum() == 0 or (q[p > 0] == 0).any():
            continue
        p, q = p[p > 0] / p.sum(), q[p > 0] / q.sum()
        divergence = (p * np.log(p / q)).sum()
        if divergence <= least + 1e-12:
            best, least = i, min(divergence, least)
    return best


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(8, 60), st.sampled_from([2, 4, 8]))
def test_entropy_clip_equals_the_search_in_plain_loops(seed, bins, levels):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.poisson(40 * torch.rand(bins, generator=generator) ** 3, generator=generator)
    counts[1] += 1
    assert entropy_clip(counts, levels) == kl_clip(counts.tolist(), levels)


def test_entropy_clip_never_falls_into_a_gap_and_keeps_all_of_a_flat_histogram():
    counts = torch.zeros(2048)
    counts[:200], counts[1500] = 1000, 1
    clip = entropy_clip(counts)
    assert clip <= 200 or clip > 1500
    assert entropy_clip(torch.full((2048,), 7)) == 2048


def test_entropy_clip_does_not_fall_to_the_first_bin_of_values_far_from_zero():
    """A single bin is like itself, whatever is clipped: uniform values in 1..2 were clipped at 1.004."""
    x = -1 - torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert observed(Entropy(), x)[0] < -1.9
    assert observed(Entropy(), torch.tensor([50.0, 100.0])) == (50, 100)


def test_entropy_clip_does_not_depend_on_the_number_of_zeros():
    counts = torch.histc(gaussian(100_000).abs(), 2048, 0, 5)
    more = counts.clone()
    more[0] += 1e6
    assert entropy_clip(more) == entropy_clip(counts) < 2048


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(-20, 20), st.booleans())
def test_a_stream_in_pieces_gives_the_range_of_one_piece(seed, n_pieces, exponent, symmetric):
    x = gaussian(3000, seed) * 2.0**exponent
    x[0] *= 10
    for cls in HISTOGRAMS.values():
        whole = observed(cls(symmetric=symmetric), x)
        assert observed(cls(symmetric=symmetric), *x.chunk(n_pieces)) == whole
        assert observed(cls(symmetric=symmetric), torch.zeros(1), x) == whole


@pytest.mark.parametrize("name", HISTOGRAMS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_scale_with_their_values_and_mirror(name, symmetric):
    x = gaussian(20_000).square()
    low, high = observed(HISTOGRAMS[name](symmetric=symmetric), x)
    scaled = observed(HISTOGRAMS[name](symmetric=symmetric), x * 2.0**-30)
    assert scaled == (low * 2.0**-30, high * 2.0**-30)
    assert observed(HISTOGRAMS[name](symmetric=symmetric), -x) == pytest.approx((-high, -low))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([90.0, 99.0, 99.9, 100.0]), st.booleans())
def test_percentile_leaves_its_share_outside(seed, percentile, symmetric):
    x = gaussian(7001, seed).exp() - 1
    low, high = observed(Percentile(percentile, symmetric=symmetric), x)
    outside = int(((x < low) | (x > high)).sum())
    share = len(x) * (1 - percentile / 100)
    assert outside <= share
    width = BIN * x.abs().max()  # the next smaller bins would leave more than the share outside
    low, high = low + width, high - width
    sides = [((x < low) | (x > high)).sum()]
    if not symmetric:
        sides, share = [(x < low).sum(), (x > high).sum()], share / 2
    assert all(side >= share - 1 for side in sides)


@pytest.mark.parametrize("symmetric", [False, True])
def test_least_squares_beats_other_ranges_and_shrinks_a_gaussian_at_4_bits(symmetric):
    x = gaussian(100_000)
    low, high = observed(MeanSquaredError(n_bits=4, symmetric=symmetric), x)
    assert all(2.3 < end < 2.8 for end in (-low, high)) and x.abs().max() > 4
    error = squared_error(
        x[None], torch.tensor([low]), torch.tensor([high]), n_bits=4, symmetric=symmetric
    )
    for other in (MinMax(symmetric=symmetric), Percentile(symmetric=symmetric)):
        ends = (torch.tensor([end]) for end in observed(other, x))
        assert error < squared_error(x[None], *ends, n_bits=4, symmetric=symmetric)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 70), st.integers(2, 8), st.booleans(), st.booleans())
def test_the_search_over_rows_is_never_worse_than_the_rows_own_ranges(
    seed, n, n_bits, symmetric, one_sided
):
    x = gaussian(5 * n, seed).view(5, n) ** 3
    x = x.abs() + 1 if one_sided else x
    minimum, maximum = mse_range(x, n_bits, symmetric)
    assert minimum.shape == maximum.shape == (5,)
    assert (minimum <= 0).all() and (maximum >= 0).all()
    own = squared_error(x, *x.aminmax(dim=1), n_bits, symmetric)
    found = squared_error(x, minimum, maximum, n_bits, symmetric)
    assert (found <= own * 1.0001).all()
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(mse_range(x[order], n_bits, symmetric)[1], maximum[order])


def test_the_search_over_rows_lowers_the_error_of_long_gaussian_rows():
    x = gaussian(8 * 4096).view(8, 4096)
    own = squared_error(x, *x.aminmax(dim=1), 4, False)
    assert (squared_error(x, *mse_range(x, 4, False), 4, False) < 0.7 * own).all()


def test_percentile_of_rows_counts_what_it_leaves_outside():
    x = torch.stack([torch.arange(1.0, 101), torch.arange(100.0, 0, -1) * -2])
    assert [e.tolist() for e in percentile_range(x, 98, symmetric=False)] == [[2, -198], [99, -4]]
    assert [e.tolist() for e in percentile_range(x, 97.5, symmetric=True)] == [
        [-98, -196],
        [98, 196],
    ]
    few = percentile_range(x, symmetric=False)
    assert torch.equal(torch.stack(few), torch.stack(x.aminmax(dim=1)))


def test_a_percentile_leaves_out_whole_values_despite_rounding():
    """1,000 * (1 - 0.999) is 0.9999999999999, and once left no value outside."""
    x = torch.arange(1.0, 1001)
    assert percentile_range(x[None], 99.9, symmetric=True)[1].item() == 999
    assert observed(Percentile(99.9, symmetric=True), x)[1] < 1000


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("value", [0.0, 3.0, -2e-45, 1e-40, 1e38])
@pytest.mark.parametrize("symmetric", [False, True])
def test_constants_give_a_range_that_reaches_them(name, value, symmetric):
    x = torch.full((10,), value)
    value = x[0].item()
    low, high = observed(OBSERVERS[name](symmetric=symmetric), x)
    assert min(low, 0) <= value <= max(high, 0)
    assert abs(low) <= abs(value) * 1.0001 and abs(high) <= abs(value) * 1.0001


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_values_are_observed_as_the_float32_they_are(name, dtype):
    x = gaussian(1000).to(dtype)
    assert observed(OBSERVERS[name](), x) == observed(OBSERVERS[name](), x.float())


def test_moving_average_weighs_the_newest_by_its_constant():
    assert observed(MovingAverage(0.5), torch.tensor([0.0, 4.0]), torch.tensor([-2.0, 0.0])) == (
        -1.0,
        2.0,
    )


@pytest.mark.parametrize("name", OBSERVERS)
def test_bad_values_are_refused(name):
    observer = OBSERVERS[name]()
    with pytest.raises(ValueError, match="seen no values"):
        observer.range()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{bad}.*no place in a range"):
            observer.update(torch.tensor([1.0, bad]))
    with pytest.raises(ValueError, match=r"no values: \(0, 4\)"):
        observer.update(torch.zeros(0, 4))
    assert observed(observer, torch.tensor([1.0, 2.0]))[1] == 2.0  # what was refused left no trace


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="constant 0"):
        MovingAverage(0)
    with pytest.raises(ValueError, match=r"percentile 0\.9999: give percent"):
        Percentile(0.9999)
    with pytest.raises(ValueError, match="percentile 101"):
        percentile_range(torch.ones(1, 4), 101, symmetric=True)
    with pytest.raises(ValueError, match="n_bits 9"):
        Entropy(n_bits=9)
    with pytest.raises(ValueError, match="n_bits 0"):
        MeanSquaredError(n_bits=0)
    with pytest.raises(ValueError, match=r"at least 128, got \(100,\)"):
        entropy_clip(torch.ones(100))
