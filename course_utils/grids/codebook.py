"""Codebooks: codes that stand for values which need not be evenly spaced.

NF4 is from Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314,
section 3, with the values of bitsandbytes; the 8-bit dynamic map, which its double quantization takes for
the absmax, from Dettmers 2016, arXiv 1511.04561. Codebooks of least squared error are Lloyd's (1982, "Least
squares quantization in PCM", section IV, method I). Built step by step in `chronology/nf4_demo`.
"""

from statistics import NormalDist

import torch
from torch import Tensor

# "cpu" by name: `from_pretrained` imports a packed model's method, and so this, with "meta" as the default.
# The published values. `normal_levels()` gives them to 2e-7: the quantile function's last digits differ
# from library to library, so the table is what is stored against.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], device="cpu")  # fmt: skip

# bitsandbytes' 4-bit floats, ascending: sign, 2 bits of exponent, 1 of mantissa, divided by the largest. Two
# of the 16 are zeros.
_FP4 = [size / 12 for size in (0, 0.0625, 2, 3, 4, 6, 8, 12)]
FP4 = torch.tensor([*(-size for size in reversed(_FP4)), *_FP4], device="cpu")

PART = 2**16  # values that get their codes at a time: they fit into a processor's cache

# Where the outermost quantiles lie: half way between those of 1/32 and 1/30 of the mass, one for each side.
OFFSET = 1 - (1 / 32 + 1 / 30) / 2


def normal_levels(offset: float = OFFSET) -> Tensor:
    """16 levels in -1..1 with an exact 0, by quantiles of the normal distribution, float32, ascending.

    8 positive ones and 7 negative ones, evenly spaced in probability from 1/2 to `offset` on each side, and
    divided by the largest. Raises ValueError for an offset outside 1/2..1.
    """
    if not 0.5 < offset < 1:
        raise ValueError(f"offset {offset}: a probability between 1/2 and 1, NF4's is {OFFSET:.7f}")
    quantile = NormalDist().inv_cdf
    positive = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    negative = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    levels = torch.tensor(sorted([*negative, 0.0, *positive]), dtype=torch.float64)
    return (levels / levels.max()).float()


def dynamic_map() -> Tensor:
    """The 256 values of the signed 8-bit dynamic data type, float32, ascending.

    127 negative ones, 0, and 128 positive ones up to 1.0; the least is -0.99296875. Seven decades, each
    with twice as many values as the one below, evenly spaced between 0.1 and 1 of it.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        means = (edges[:-1] + edges[1:]) / 2
        values += (10.0 ** (decade - 6) * means).tolist()
        values += (-(10.0 ** (decade - 6)) * means).tolist()
    return torch.tensor(sorted(values))


def nearest_codes(x: Tensor, codebook: Tensor) -> Tensor:
    """The code (int32, as `x`) of the value of `codebook` `[n]`, ascending, that is nearest to each of `x`.

    A tie goes to the lower code. Compared are thresholds half way between neighbours, not distances; and
    where cells of equal width hold one threshold each at most, as those of 4-bit codebooks do, each of `x` is
    compared with the one of its cell.
    """
    thresholds = (codebook[:-1] + codebook[1:]) / 2
    cells = _cells(thresholds) if x.dtype == torch.float32 and x.numel() >= 2**12 else None
    if cells is None:
        return torch.bucketize(x, thresholds, out_int32=True)
    per_unit, below, inside = cells
    codes = torch.empty(x.numel(), dtype=torch.int32, device=x.device)
    for part, out in zip(x.flatten().split(PART), codes.split(PART), strict=True):
        place = _place(part, thresholds, per_unit).clamp_(0, len(below) - 1)  # clamped for NaN
        torch.add(below.index_select(0, place), part > inside.index_select(0, place), out=out)
    return codes.view(x.shape)


def _place(x: Tensor, thresholds: Tensor, per_unit: float) -> Tensor:
    """The cell (int32) of each of `x`: it never falls as `x` grows, in floats too, so codes are exact."""
    low, high = float(thresholds[0]), float(thresholds[-1])
    return x.clamp(low, high).sub_(low).mul_(per_unit).int()


def _cells(thresholds: Tensor) -> tuple[float, Tensor, Tensor] | None:
    """Cells in a unit, thresholds below each cell (int32), and the one inside it (inf: none); or None.

    None where cells would have to be many to hold one threshold each at most.
    """
    if len(thresholds) < 2 or not (gap := thresholds.diff().min()) > 0.001 * (
        thresholds[-1] - thresholds[0]
    ):
        return None
    per_unit = float(1.01 / gap)
    of_threshold = _place(thresholds, thresholds, per_unit)
    count = of_threshold.bincount()
    if (count > 1).any():
        return None
    below = (count.cumsum(0) - count).int()
    inside = thresholds.new_full(below.shape, torch.inf)
    inside[of_threshold.long()] = thresholds
    return per_unit, below, inside


def lloyd_max(
    x: Tensor, n_levels: int = 16, weights: Tensor | None = None, *, tolerance: float = 1e-7
) -> Tensor:
    """The codebook of least squared error for `x` `[n]`: float32 `[n_levels]`, ascending.

    Lloyd's method takes turns: each value goes to its nearest level, and each level to the mean of its
    values; one that is nearest to none stays. It stops when no level moves by more than `tolerance` times the
    range of `x`, at the latest after 10,000 turns. The squared error falls with every turn. For a log-concave
    density there is one minimum; elsewhere it may be a local one, and the better of two starts is taken, at
    quantiles and evenly spaced.
    `weights` `[n]`, not negative, say how much each value's error counts: for values divided by their
    block's absmax it is the absmax squared. Raises ValueError for values or weights that are not finite, and
    for fewer distinct values than levels.
    """
    x = x.flatten().double()
    weights = torch.ones_like(x) if weights is None else weights.flatten().double()
    if x.shape != weights.shape:
        raise ValueError(f"{len(weights)} weights for {len(x)} values: give one for each")
    if not (x.isfinite().all() and weights.isfinite().all() and (weights >= 0).all()):
        raise ValueError(
            "values and weights have to be finite, and weights not negative: repair the input"
        )
    x, order = x.sort()
    distinct = int((x.diff() > 0).sum()) + min(len(x), 1)
    if not 1 <= n_levels <= distinct:
        raise ValueError(f"{n_levels} levels for {distinct} distinct values: ask for fewer levels")
    # Sums over the values below each place, so that a turn costs a search for each threshold only.
    mass = torch.cat([x.new_zeros(1), weights[order].cumsum(0)])
    moment = torch.cat([x.new_zeros(1), (weights[order] * x).cumsum(0)])
    places = (torch.arange(n_levels) + 0.5) / n_levels
    # Quantiles serve the many values in the middle, even spaces the few in long tails.
    starts = x[(places * len(x)).long()], x[0] + places * (x[-1] - x[0])
    found = [_lloyd(x, mass, moment, levels, tolerance * (x[-1] - x[0])) for levels in starts]
    return max(found, key=lambda gained: gained[1])[0].float()


def _lloyd(
    x: Tensor, mass: Tensor, moment: Tensor, levels: Tensor, tolerance: Tensor
) -> tuple[Tensor, float]:
    """Where Lloyd's method ends from `levels`, and how far that is below the squared error of one level 0."""
    for _ in range(10_000):
        inner = torch.searchsorted(x, (levels[:-1] + levels[1:]) / 2, right=True)
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(x))])
        of_level, sums = mass[edges].diff(), moment[edges].diff()
        means = torch.where(of_level > 0, sums / of_level, levels)
        moved, levels = (means - levels).abs().max(), means
        if moved <= tolerance:
            break
    return levels, float((sums * levels).sum())  # sum w (x^2 - (x - level)^2), level the mean
