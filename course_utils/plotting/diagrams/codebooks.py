"""Codebooks: levels from the quantiles of a density, a block on the levels of several, nibbles in bytes."""

from itertools import pairwise
from statistics import NormalDist

import torch
from matplotlib.figure import Figure
from torch import Tensor

from course_utils.plotting.diagrams.drawing import arrow, canvas, cell, refuse_above, signed
from course_utils.plotting.style import COLOURS, new_figure, styled

MAX_CODES, MAX_VALUES, MAX_LINES = 8, 32, 4
TINTS = ("#9AC9E3", "#F3CC80", "#8FD6BF", "#E6BBD3")


@styled
def quantile_levels(offset: float, positive: int = 8, negative: int = 7) -> Figure:
    """The normal density, cut at the quantiles that become NF4's levels.

    From 1/2 to `offset` the positive side is cut into `positive` parts of equal mass, and the negative one
    into `negative`. Each cut is a level, and the parts are tinted in turn; the tails are left grey. Dettmers
    et al. 2023, arXiv 2305.14314, section 3. For `chronology/nf4_demo`. Raises ValueError for an offset
    outside 1/2..1.
    """
    if not 0.5 < offset < 1:
        raise ValueError(f"offset {offset}: a probability between 1/2 and 1")
    normal = NormalDist()
    sides = [
        [sign * normal.inv_cdf(0.5 + (offset - 0.5) * i / parts) for i in range(parts + 1)]
        for sign, parts in ((1, positive), (-1, negative))
    ]
    figure, axis = new_figure(height=3.2)
    x = torch.linspace(-3, 3, 601)
    density = (-(x**2) / 2).exp() / (2 * torch.pi) ** 0.5
    axis.fill_between(x, density, color="#E5E5E5", linewidth=0)
    for cuts, colours in zip(sides, (("#F3CC80", "#FAE6BF"), ("#9AC9E3", "#CDE4F1")), strict=True):
        for i, ends in enumerate(pairwise(cuts)):
            inside = torch.linspace(min(ends), max(ends), 60)
            height = (-(inside**2) / 2).exp() / (2 * torch.pi) ** 0.5
            axis.fill_between(inside, height, color=colours[i % 2], linewidth=0)
    axis.plot(x, density, color="black", linewidth=1)
    levels = sorted({cut for cuts in sides for cut in cuts})
    for level in levels:
        axis.plot([level] * 2, [0, normal.pdf(level)], color="black", linewidth=0.8)
    axis.plot(levels, [0] * len(levels), "o", color=COLOURS["red"], markersize=5, clip_on=False,
              zorder=5, label="level (before the division by the largest)")  # fmt: skip
    for sign, parts in ((1, positive), (-1, negative)):
        axis.text(sign * 2.35, 0.2, f"{parts} parts of {(offset - 0.5) / parts:.4f}\neach on this side",
                  ha="center", fontsize=9)  # fmt: skip
        axis.annotate(f"{1 - offset:.4f} beyond", (sign * 2.15, 0.015), (sign * 2.5, 0.09), fontsize=8,
                      ha="center", arrowprops={"arrowstyle": "-", "linewidth": 0.6})  # fmt: skip
    axis.set_ylim(0)
    axis.set_xlabel("value, in standard deviations")
    axis.set_ylabel("density")
    axis.grid(False)
    axis.legend(fontsize=8, loc="upper left")
    return figure


@styled
def block_on_levels(values: Tensor, lines: dict[str, Tensor]) -> Figure:
    """The weights of one block `[n]` and, a line each, the levels that a codebook offers them.

    `lines[name]` `[levels]` are real values. Ticks are the weights, dots the levels, and a line joins each
    weight to its nearest. At most 32 weights and 4 lines. For `chronology/nf4_demo`.
    """
    refuse_above(MAX_VALUES, len(values), "weights", "take a smaller block")
    refuse_above(MAX_LINES, len(lines), "lines", "compare fewer codebooks")
    figure, axes = new_figure(
        len(lines), 1, height=1.15 * len(lines) + 0.3, sharex=True, squeeze=False
    )
    for axis, (name, levels) in zip(axes[:, 0], lines.items(), strict=True):
        nearest = levels[(values[:, None] - levels).abs().argmin(1)]
        axis.axhline(0, color="black", linewidth=0.8)
        axis.plot(levels, [0] * len(levels), "o", color=COLOURS["blue"], markersize=6)
        axis.plot(values, [1] * len(values), "|", color="black", markersize=9)
        for value, level in zip(values.tolist(), nearest.tolist(), strict=True):
            axis.plot([value, level], [0.86, 0.12], color=COLOURS["orange"], linewidth=1)
        error = (values - nearest).square().sum() / values.square().sum()
        axis.set_title(f"{name}: relative squared error {error:.4f}", fontsize=10, loc="left")
        axis.set_ylim(-0.3, 1.35)
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
        axis.grid(False)
    axes[-1, 0].set_xlabel("weight (ticks above) and levels (dots below)")
    return figure


@styled
def nibbles_in_bytes(codes: Tensor, packed: Tensor) -> Figure:
    """4-bit `codes` `[n]` above the bytes `[ceil(n / 2)]` that hold them, the first of two in the high half.

    Bits are written from the highest to the lowest, as numbers are. A last half byte without a code is grey.
    At most 8 codes. For `chronology/nf4_demo`. Raises ValueError where the bytes do not hold the codes.
    """
    refuse_above(MAX_CODES, len(codes), "codes", "pass fewer")
    halves = torch.stack([packed >> 4, packed & 15], 1).flatten()
    if len(halves) - len(codes) not in (0, 1) or (halves[: len(codes)] != codes).any():
        raise ValueError(
            f"bytes {packed.tolist()} do not hold the codes {codes.tolist()}, first in the high half"
        )
    figure, axis = new_figure(height=1.7)
    canvas(axis, 4 * MAX_CODES + 4, 5)
    for place, half in enumerate(halves.tolist()):
        known = place < len(codes)
        left = 4 * place + place // 2 + 0.5
        colour = TINTS[place % len(TINTS)] if known else "#E5E5E5"
        for bit in range(4):
            cell(axis, left + bit, 1.4, colour, str(half >> (3 - bit) & 1), fontsize=9)
        if known:
            axis.text(left + 2, 4.1, f"code {half}", ha="center", fontsize=9, weight="bold")
            arrow(axis, (left + 2, 3.8), (left + 2, 2.6))
    for i, byte in enumerate(packed.tolist()):
        left = 9 * i + 0.5
        axis.plot([left + 0.1, left + 7.9], [1.2, 1.2], color="black", linewidth=1)
        axis.text(left + 4, 0.9, f"byte {i} = {signed(byte, 0)} = 0x{byte:02X}", ha="center", va="top",
                  fontsize=9)  # fmt: skip
    return figure
