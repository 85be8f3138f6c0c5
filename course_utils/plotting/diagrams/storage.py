"""Where codes lie on the number line, and where their bits lie in bytes."""

from collections import Counter

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from course_utils.kernels.packing import pack
from course_utils.plotting.diagrams.drawing import arrow, canvas, cell, refuse_above, signed
from course_utils.plotting.style import COLOURS, new_figure, styled

MAX_CODES, MAX_VALUES = 16, 8
MAX_BITS = 32  # in one row
TINTS = ("#9AC9E3", "#F3CC80", "#8FD6BF", "#E6BBD3")


@styled
def grids_on_a_line(
    grids: dict[str, tuple[float, int, int, int]], values: Tensor, watched: float
) -> Figure:
    """Grids on one number line: where each code lies, where zero is, which values share a code.

    `grids[name] = (scale, zero_point, low, high)`, with at most 16 codes each: symmetric, asymmetric and
    restricted ones of few bits. `values` `[n]` (at most 8) are rounded to each of them (half to even) and
    clamped, as arrows; what becomes of `watched`, one of them, is written beside each line. The band
    is the range that rounds to no more than half a step away: it ends half a code beyond the last codes.
    For 14 in a range of +-14 on three bits, a symmetric grid of codes -4..3 has S = 14 / 3.5 = 4, and
    brings 14 back as 12. For `foundations/linear_mapping`. Raises ValueError for more than can be read.
    """
    refuse_above(MAX_VALUES, len(values), "values", "pass those that show the difference")
    if watched not in values.tolist():
        raise ValueError(f"the watched value {watched} is not among the values {values.tolist()}")
    figure, axes = new_figure(len(grids), 1, height=1.45 * len(grids), sharex=True, squeeze=False)
    for axis, (name, grid) in zip(axes[:, 0], grids.items(), strict=True):
        _grid(axis, name, grid, values, watched)
    ends = [edge for scale, zero, low, high in grids.values()
            for edge in (scale * (low - zero - 0.5), scale * (high - zero + 0.5))]  # fmt: skip
    reach = max(*ends, *values.tolist()) - min(*ends, *values.tolist())
    axes[-1, 0].set_xlim(min(*ends, *values.tolist()) - 0.02 * reach,
                         max(*ends, *values.tolist()) + 0.02 * reach)  # fmt: skip
    axes[-1, 0].spines["bottom"].set_visible(True)
    axes[-1, 0].tick_params(bottom=True)
    axes[-1, 0].set_xlabel(
        "real number (dots: codes, zero in green; orange: values that share a code)"
    )
    return figure


def _grid(
    axis: Axes, name: str, grid: tuple[float, int, int, int], values: Tensor, watched: float
) -> None:
    scale, zero_point, low, high = grid
    refuse_above(MAX_CODES, high - low + 1, "codes", "show the idea with 4 bits or fewer")
    codes = range(low, high + 1)
    levels = [scale * (q - zero_point) for q in codes]
    axis.axvspan(levels[0] - scale / 2, levels[-1] + scale / 2, color=COLOURS["sky"], alpha=0.15)
    for level in levels[:-1]:  # where rounding goes from one code to the next
        axis.axvline(
            level + scale / 2, 0, 0.42, color=COLOURS["grey"], linewidth=0.8, linestyle=":"
        )
    axis.axhline(0, color="black", linewidth=0.8)
    chosen = (values / scale).round().add(zero_point).clamp(low, high).int().tolist()
    shared = {code for code, count in Counter(chosen).items() if count > 1}
    for q, level in zip(codes, levels, strict=True):
        colour = COLOURS["green"] if q == zero_point else COLOURS["blue"]
        axis.plot(level, 0, "o", color=colour, markersize=8)
        axis.text(level, -0.3, signed(q, 0), ha="center", va="top", fontsize=8, color=colour)
    for value, code in zip(values.tolist(), chosen, strict=True):
        colour = COLOURS["orange"] if code in shared else COLOURS["grey"]
        level = scale * (code - zero_point)
        axis.plot(value, 1, "|", color="black", markersize=7)
        axis.text(value, 1.15, f"{value:g}".replace("-", "\N{MINUS SIGN}"), ha="center", va="bottom",
                  fontsize=8, weight="bold" if value == watched else "normal")  # fmt: skip
        arrow(axis, (value, 0.88), (level, 0.18), colour, linewidth=1.4)
    code = chosen[values.tolist().index(watched)]
    back = scale * (code - zero_point)
    axis.text(1.01, 0.5, f"{watched:g} becomes code {signed(code, 0)}\nand comes back as\n{back:.4g}",
              transform=axis.transAxes, va="center", fontsize=9)  # fmt: skip
    last, edge = levels[-1], levels[-1] + scale / 2
    arrow(axis, (last, -0.6), (edge, -0.6), arrowstyle="<->", mutation_scale=7, linewidth=0.8)
    axis.text(edge, -0.6, " S/2", ha="left", va="center", fontsize=8)
    axis.set_title(f"{name}: codes {signed(low, 0)} to {signed(high, 0)}, S = {scale:.4g}, "
                   f"Z = {signed(zero_point, 0)}", fontsize=10, loc="left")  # fmt: skip
    axis.set_ylim(-0.85, 1.7)
    axis.set_yticks([])
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(bottom=False)
    axis.grid(False)


@styled
def bits_in_bytes(codes: Tensor, *widths: int) -> Figure:
    """The bits of `codes` `[n]` in packed bytes, a row for each width in bits: 2, 3, 4 and 8, say.

    Drawn from the bytes that `kernels.packing.pack` makes. Byte 0 is on the right, and so is bit 0 of
    each byte: read so, all bytes are one long binary number, and each code is a binary number in it.
    Bits of padding are grey. For `foundations/linear_mapping` and `foundations/packed_kernels`. Raises
    ValueError for rows of more than 32 bits, and what `pack` raises for codes that do not fit.
    """
    rows = [(width, pack(codes, width)) for width in widths]  # bytes [ceil(n width / 8)]
    for width, packed in rows:
        refuse_above(
            MAX_BITS, 8 * len(packed), f"bits ({len(codes)} codes of {width})", "pass fewer codes"
        )
    figure, axes = new_figure(len(rows), 1, height=1.1 * len(rows), squeeze=False)
    for axis, (width, packed) in zip(axes[:, 0], rows, strict=True):
        canvas(axis, 4.5 + MAX_BITS, 2.9)
        size = f"{len(packed)} byte" + "s" * (len(packed) != 1)
        axis.text(0, 1.4, f"{width} bits:\n{size}", ha="left", va="center", fontsize=9)
        _bytes(axis, codes.tolist(), width, packed, 4.5 + MAX_BITS)
    return figure


def _bytes(axis: Axes, codes: list[int], width: int, packed: Tensor, right: float) -> None:
    bits = (packed[:, None].int() >> torch.arange(8)) & 1  # [bytes, 8], lowest first
    for place, bit in enumerate(bits.flatten().tolist()):
        code = place // width
        colour = TINTS[code % len(TINTS)] if code < len(codes) else "#E5E5E5"
        cell(axis, right - place - 1, 0.9, colour, str(bit), fontsize=9)
    for i, code in enumerate(codes):
        middle = right - (i + 0.5) * width
        axis.text(middle, 2.0, f"{code}", ha="center", va="bottom", fontsize=9, weight="bold")
    for i, byte in enumerate(packed.tolist()):
        end = right - 8 * i
        axis.plot([end - 7.85, end - 0.15], [0.75, 0.75], color="black", linewidth=1)
        axis.text(end - 4, 0.6, f"byte {i} = {byte}", ha="center", va="top", fontsize=8)
