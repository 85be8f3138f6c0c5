"""Which range of values a grid shall span: observers of a stream, and searches over rows.

Values outside the range are clipped, and values inside are rounded, by up to half a step of a grid
that is the finer the narrower the range: each observer strikes that balance in its own way. Built step
by step in `foundations/dynamic_range`.
"""

import math

import numpy as np
import torch
from torch import Tensor

from course_utils.grids.uniform import code_range, scale_and_zero_point

BINS = 8192  # of a histogram, on each side of zero


class MinMax:
    """The smallest and the largest value seen: nothing is clipped.

    Every observer takes float tensors of any shape by `update`, and gives by `range` the minimum and the
    maximum of the range it proposes (float32, 0-d, on the CPU). With `symmetric` that is (-t, t). Raises
    ValueError for values that are NaN or infinite, for an empty tensor, and for `range` before any
    `update`.
    """

    def __init__(self, *, symmetric: bool = False):
        self.symmetric = symmetric
        self._extremes: tuple[Tensor, Tensor] | None = None

    def update(self, x: Tensor) -> None:
        """Take in the values `x`."""
        if x.numel() == 0:
            raise ValueError(f"an observer was given no values: {tuple(x.shape)}")
        minimum, maximum = (end.cpu() for end in x.detach().float().aminmax())
        if not (minimum.isfinite() and maximum.isfinite()):
            raise ValueError(
                f"observed values run from {minimum.item()} to {maximum.item()}: NaN and infinity have "
                "no place in a range; look for the layer that makes them"
            )
        first = self._extremes is None
        self._extremes = (minimum, maximum) if first else self._merge(minimum, maximum)

    def range(self) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of the proposed range."""
        if self._extremes is None:
            raise ValueError("the observer has seen no values: update it first")
        minimum, maximum = self._extremes
        if self.symmetric:
            maximum = torch.maximum(-minimum, maximum)
            minimum = -maximum
        return minimum, maximum

    def _merge(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        return torch.minimum(self._extremes[0], minimum), torch.maximum(self._extremes[1], maximum)


class MovingAverage(MinMax):
    """Exponential moving averages of the minimum and the maximum of each `update`.

    m <- m + constant * (new - m), starting from the first update's: `torch.ao.quantization`'s
    `MovingAverageMinMaxObserver`, whose `averaging_constant` is 0.01 as well; Jacob et al. 2018, arXiv
    1712.05877, section 3.1. Unlike the other observers' its range depends on the order of the updates.
    """

    def __init__(self, constant: float = 0.01, *, symmetric: bool = False):
        if not 0 < constant <= 1:
            raise ValueError(f"constant {constant}: the weight of the newest value is in (0, 1]")
        super().__init__(symmetric=symmetric)
        self.constant = constant

    def _merge(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        old = self._extremes
        return tuple(
            o + self.constant * (n - o) for o, n in zip(old, (minimum, maximum), strict=True)
        )


class Histogram(MinMax):
    """Base of the observers that search in a histogram; it remembers the extremes as well.

    `BINS` bins on each side of zero, from 0 to a power of two above the largest magnitude, so at least
    half of them lie within the values seen. Where larger ones arrive, the power of two grows and
    neighbouring bins are merged, which is exact: the counts are the same however a stream was cut into
    updates, and in whatever order. Memory is `2 * BINS` int64.
    """

    def __init__(self, *, symmetric: bool = False):
        super().__init__(symmetric=symmetric)
        self._exponent = -148  # 2^-149 is the smallest positive float32
        self._counts = torch.zeros(2 * BINS, dtype=torch.int64)

    def update(self, x: Tensor) -> None:
        """Take in the values `x`."""
        super().update(x)
        x = x.detach().flatten()
        self._grow()
        bins = (x.double().abs() / self._width).long()  # the width is a power of two: exact
        bins = torch.where(x < 0, -1 - bins, bins)
        self._counts += torch.bincount(bins + BINS, minlength=2 * BINS).cpu()

    @property
    def _width(self) -> float:
        return math.ldexp(1, self._exponent) / BINS

    def _grow(self) -> None:
        """Let the bins reach beyond the extremes."""
        largest = max(-float(self._extremes[0]), float(self._extremes[1]))
        exponent = math.frexp(largest)[1] if largest else self._exponent
        if (doublings := exponent - self._exponent) > 0:
            bins = torch.arange(-BINS, BINS)
            merged = (bins >> min(doublings, 63)) + BINS
            self._counts = torch.zeros_like(self._counts).index_add_(0, merged, self._counts)
            self._exponent = exponent

    def _magnitudes(self) -> Tensor:
        """Counts of |x| `[BINS]`."""
        return self._counts[BINS:] + self._counts[:BINS].flip(0)

    def _clipped(self, low: float, high: float) -> tuple[Tensor, Tensor]:
        """The range from `low` to `high`, as far as there are values."""
        minimum, maximum = super().range()
        return minimum.clamp(min=low), maximum.clamp(max=high)


class Percentile(Histogram):
    """The range that holds `percentile` percent of all values.

    Symmetric: the smallest t with that share of |x| <= t. Asymmetric: half of the rest is cut off at
    each end. t is an edge of a bin, so at most 2^-12 of the largest magnitude above the percentile.
    """

    def __init__(self, percentile: float = 99.99, *, symmetric: bool = False):
        _check_percentile(percentile)
        super().__init__(symmetric=symmetric)
        self.percentile = percentile

    def range(self) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of the proposed range."""
        cut = _outside(int(self._counts.sum()), self.percentile)
        if self.symmetric:
            t = self._reached(self._magnitudes(), cut)
            return self._clipped(-t, t)
        # Counted from the far end, so that a percentile of 100 reaches the last value seen.
        high = self._reached(self._counts, cut / 2) - BINS * self._width
        low = self._reached(self._counts.flip(0), cut / 2) - BINS * self._width
        return self._clipped(-low, high)

    def _reached(self, counts: Tensor, cut: float) -> float:
        """Distance from the first bin's start to the end of the bin beyond which at most `cut` values lie."""
        beyond = counts.flip(0).cumsum(0)
        empty = int((beyond <= cut).sum())
        return (len(counts) - empty) * self._width


class MeanSquaredError(Histogram):
    """The range whose grid of `n_bits` has the least mean squared error over the histogram.

    Candidates are the extremes shrunk to as little as 1/1000 in 100 geometric steps, both ends by the same
    factor with `symmetric`, else the upper end first and the lower one after it. A bin counts as its
    middle.
    """

    def __init__(self, n_bits: int = 8, *, symmetric: bool = False):
        code_range(n_bits)
        super().__init__(symmetric=symmetric)
        self.n_bits = n_bits

    def range(self) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of the proposed range."""
        minimum, maximum = super().range()
        bins = self._counts.nonzero().flatten()
        middles = ((bins - BINS + 0.5) * self._width).float()
        found = _least_squares(
            middles[None],
            minimum[None],
            maximum[None],
            self.n_bits,
            self.symmetric,
            factors=_factors(1e-3, 100),
            counts=self._counts[bins],
        )
        return found[0][0], found[1][0]


class Entropy(Histogram):
    """The clip whose quantized histogram differs least from the original one by Kullback-Leibler.

    Migacz, "8-bit Inference with TensorRT", GPU Technology Conference 2017 (talk S7310), with the details
    of NVIDIA's `pytorch_quantization.calib.HistogramCalibrator`: 2048 bins of |x| from 0 to its maximum,
    2^(n_bits - 1) levels (128 for 8 bits), see `entropy_clip`. One clip t serves both signs.
    Symmetric: (-t, t). Asymmetric: (max(minimum, -t), min(maximum, t)), and for values of one sign (after
    a ReLU) all 2^n_bits levels lie on that side.
    """

    def __init__(self, n_bits: int = 8, *, symmetric: bool = False):
        if not 2 <= n_bits <= 8:
            raise ValueError(f"n_bits {n_bits}: the 2048 bins are made for 2 to 8 bits")
        super().__init__(symmetric=symmetric)
        self.n_bits = n_bits

    def range(self) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of the proposed range."""
        minimum, maximum = super().range()
        largest = max(-float(minimum), float(maximum))
        if largest == 0:
            return minimum, maximum
        # Onto 2048 bins that end at the maximum, taking values as spread evenly within a bin of ours.
        edges = np.minimum(np.arange(BINS + 1) * self._width, largest)
        reached = np.concatenate([[0], self._magnitudes().cumsum(0).numpy()])
        counts = np.diff(np.interp(np.linspace(0, largest, 2049), edges, reached))
        one_sided = not self.symmetric and (minimum >= 0 or maximum <= 0)
        levels = 2**self.n_bits if one_sided else 2 ** (self.n_bits - 1)
        t = entropy_clip(torch.from_numpy(counts), levels) * largest / len(counts)
        return self._clipped(-t, t)


def entropy_clip(counts: Tensor, levels: int = 128) -> int:
    """How many of the bins `counts` `[bins]` of |x| to keep: `levels`..bins.

    For each i, P is the first i bins with all that lies beyond added to the last of them, as clipping
    does. Q is the first i bins, without that, merged into `levels` levels and spread out again evenly
    over the bins that were not empty. Returns the i with the least KL(P || Q), the largest of equals.

    Three properties to know. Empty bins stay empty in Q, and an i whose last bin is empty while there is
    mass beyond is out, since there P is not 0 and Q is: the clip falls among values, never into a gap. An i
    that keeps a single occupied bin while there is mass beyond is out too: P and Q are one bin each, so
    the divergence would be 0 whatever is clipped (NVIDIA's code takes it: values that all are far from
    zero are then clipped to the smallest of them). And the clip cannot fall below `levels` bins, 1/16 of
    the maximum with 2048 bins and 128 levels, however far away the outliers are.
    Bin 0 counts as bin 1, as in NVIDIA's code: zero is exact on every grid, and the zeros that a ReLU
    makes would pull the clip towards it.

    Source: see `Entropy`.
    """
    if counts.ndim != 1 or len(counts) < levels:
        raise ValueError(
            f"entropy_clip needs [bins] of at least {levels}, got {tuple(counts.shape)}"
        )
    c = counts.double().clone()
    c[0] = c[1]
    n = len(c)
    i = torch.arange(levels, n + 1, device=c.device)
    # Bin j of i belongs to level floor(j * levels / i), so level l starts at ceil(l * i / levels).
    starts = (torch.arange(levels + 1, device=c.device) * i[:, None] + levels - 1) // levels

    def total(values: Tensor) -> Tensor:
        """Sums over the first 0, 1, .. n bins."""
        return torch.nn.functional.pad(values.cumsum(0), (1, 0))

    mass, occupied = (total(v)[starts].diff() for v in (c, (c > 0).double()))
    # KL(P || Q) = sum p ln p - sum p ln q, up to what normalises them. Q is constant within a level, so
    # its sum runs over levels; the last bin, where P holds more than c, is added after.
    q = mass / occupied.clamp(min=1)
    kept, last = total(c)[i], c[i - 1]
    beyond = kept[-1] - kept
    p_ln_p = total(torch.xlogy(c, c))[i] - torch.xlogy(last, last)
    p_ln_p += torch.xlogy(last + beyond, last + beyond)
    q_last = torch.where(last > 0, q[:, -1], 0)
    p_ln_q = torch.xlogy(mass, q).sum(1) + torch.xlogy(beyond, q_last)
    divergence = (p_ln_p - p_ln_q) / kept[-1] - kept[-1].log() + kept.log()
    alone = (total((c > 0).double())[i] == 1) & (beyond > 0)
    divergence = torch.where((kept > 0) & ~alone, divergence, torch.inf)
    best = (divergence <= divergence.min()).nonzero()[-1]
    return int(i[best])


OBSERVERS: dict[str, type[MinMax]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "mse": MeanSquaredError,
    "entropy": Entropy,
}


def mse_range(x: Tensor, n_bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """For each row of `x` `[rows, n]` the range (`[rows]`, `[rows]`) with the least squared error.

    Candidates are the row's own range, widened to hold 0, and 39 more, each narrower by 3%, down to 0.3
    of it: with `symmetric` (-t, t); else the upper end is shrunk first, and then the lower one. The
    error is that of the grid of `n_bits` over the candidate, so never more than with the row's own range.
    """
    minimum, maximum = x.float().aminmax(dim=1)
    return _least_squares(x.float(), minimum, maximum, n_bits, symmetric, _factors(0.3, 40))


def percentile_range(
    x: Tensor, percentile: float = 99.99, *, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """For each row of `x` `[rows, n]` the range (`[rows]`, `[rows]`) that holds `percentile` percent.

    The number of values left outside is rounded down: with 99.99 a row of fewer than 10,000 (asymmetric:
    20,000, as half of them are left at each end) keeps all of its values.
    """
    _check_percentile(percentile)
    outside = _outside(x.shape[1], percentile)
    if symmetric:
        t = x.float().abs().sort(1).values[:, -1 - int(outside)]
        return -t, t
    ordered, cut = x.float().sort(1).values, int(outside / 2)
    return ordered[:, cut], ordered[:, -1 - cut]


def _outside(count: int, percentile: float) -> float:
    """How many of `count` values may lie outside; 99.9 leaves 1 of 1,000, and not 0.9999999999999."""
    return round(count * (100 - percentile) / 100, 6)


def _check_percentile(percentile: float) -> None:
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile {percentile}: give percent, above 50 and up to 100")


def _factors(smallest: float, steps: int) -> list[float]:
    """1 down to `smallest` in `steps` geometric steps."""
    return [smallest ** (i / (steps - 1)) for i in range(steps)]


def _least_squares(
    x: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    n_bits: int,
    symmetric: bool,
    factors: list[float],
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Search of `mse_range`, from the ranges `minimum`..`maximum`; `counts` weigh the columns."""
    low, high = code_range(n_bits)

    def error(minimum: Tensor, maximum: Tensor) -> Tensor:
        grid = scale_and_zero_point(minimum, maximum, low, high, symmetric=symmetric)
        scale, zero_point = (t[:, None] for t in grid)
        # `quantize` and `dequantize`, in place: the search is as fast as its temporaries are few.
        back = (x * (1 / scale)).round_().add_(zero_point).clamp_(low, high)
        squares = back.sub_(zero_point).mul_(scale).sub_(x).square_()
        return (squares if counts is None else squares.mul_(counts)).sum(1)

    def shrink(end: Tensor, error_of) -> Tensor:
        best, least = end, error_of(end)
        for factor in factors[1:]:
            errors = error_of(end * factor)
            best = torch.where(errors < least, end * factor, best)
            least = torch.minimum(errors, least)
        return best

    minimum, maximum = minimum.clamp(max=0), maximum.clamp(min=0)
    if symmetric:
        t = shrink(torch.maximum(-minimum, maximum), lambda t: error(-t, t))
        return -t, t
    maximum = shrink(maximum, lambda end: error(minimum, end))
    return shrink(minimum, lambda end: error(end, maximum)), maximum
