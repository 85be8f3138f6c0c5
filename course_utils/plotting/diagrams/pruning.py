"""What a mask does to a small matrix, and how what it leaves is stored."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from course_utils.plotting.diagrams.drawing import (
    DIVERGING,
    DONE,
    SEQUENTIAL,
    canvas,
    cell,
    decimals,
    refuse_above,
    signed,
)
from course_utils.plotting.style import new_figure, styled

MAX_ROWS, MAX_COLUMNS = 6, 6
MAX_WEIGHTS = 8
VALUE, PLACE, ABSENT = "#9AC9E3", "#E69F00", "#F7E3BE"  # ABSENT: a bit that is 0


@styled
def masked_matrix(W: Tensor, mask: Tensor) -> Figure:
    """A small matrix, the ranks of its magnitudes, and what is left under `mask`.

    `W` is `[out, in]`, at most 6 by 6, and `mask` bool of the same shape. Rank 1 is the smallest
    magnitude; of equal ones the first in row order. Removed weights are grey. For `pruning/pruning_demo`.
    Raises ValueError for other shapes.
    """
    _check(W, mask)
    refuse_above(MAX_ROWS, len(W), "rows", "draw a corner of the matrix")
    refuse_above(MAX_COLUMNS, W.shape[1], "columns", "draw a corner of the matrix")
    sizes = W.abs().float()
    ranks = sizes.flatten().argsort(stable=True).argsort().view(W.shape) + 1
    reach, digits = float(sizes.max()) or 1.0, decimals(W.float(), 3)
    figure, axes = new_figure(1, 3, height=0.7 + 2.9 * len(W) / W.shape[1])
    titles = ("W", "rank of |W|: the lowest go", "W under the mask")
    for axis, title in zip(axes, titles, strict=True):
        canvas(axis, W.shape[1], len(W))
        axis.set_aspect("equal")
        axis.set_title(title, fontsize=9)
    for i, row in enumerate(W.tolist()):
        for j, value in enumerate(row):
            place = j, len(W) - 1 - i
            colour = DIVERGING(0.5 + 0.4 * value / reach)
            kept, rank = bool(mask[i, j]), int(ranks[i, j])
            cell(axes[0], *place, colour, signed(value, digits))
            size = SEQUENTIAL(0.8 * abs(value) / reach)
            cell(axes[1], *place, size if kept else DONE, str(rank))
            cell(axes[2], *place, colour if kept else DONE, signed(value, digits) if kept else "0")
    return figure


@styled
def row_in_formats(row: Tensor, mask: Tensor) -> Figure:
    """One row of weights as four formats store it, each bit of the same width.

    `row` `[in]`, at most 8, and `mask` bool `[in]`, which keeps 2 of each 4 neighbours, so that 2:4 can
    store it too. Values are float16, CSR's column indices int16; CSR's row pointer (32 bits a row) is
    drawn too. A bit of the bitmask that is 0 is pale. For `pruning/pruning_demo`. Raises ValueError for
    another length or mask.
    """
    _check(row, mask)
    refuse_above(MAX_WEIGHTS, len(row), "weights", "show the idea with 8")
    if len(row) % 4 or (mask.view(-1, 4).sum(1) != 2).any():
        raise ValueError(f"the mask {mask.int().tolist()} does not keep 2 of each 4 neighbours")
    columns = mask.nonzero()[:, 0].tolist()
    values = [(16, f"{row[j].item():g}".replace("-", "\N{MINUS SIGN}"), VALUE) for j in columns]
    zeros = [(16, "0", DONE)]
    everything = iter(values)
    formats = {
        "dense, with zeros": [part for kept in mask.tolist() for part in (
            [next(everything)] if kept else zeros)],
        "bitmask": [*((1, "", PLACE if kept else ABSENT) for kept in mask.tolist()), *values],
        "2:4": [*((2, str(j % 4), PLACE) for j in columns), *values],
        "CSR": [(32, "row starts at", PLACE), *((16, str(j), PLACE) for j in columns), *values],
    }  # fmt: skip
    longest = max(sum(width for width, *_ in parts) for parts in formats.values())
    figure, axes = new_figure(len(formats), 1, height=0.8 * len(formats))
    for axis, (name, parts) in zip(axes, formats.items(), strict=True):
        bits = sum(width for width, *_ in parts)
        canvas(axis, 1.42 * longest, 1.15)
        axis.text(0, 0.5, f"{name}\n{bits} bits", va="center", fontsize=9)
        _parts(axis, 0.2 * longest, parts)
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=colour, label=label)
        for colour, label in (
            (VALUE, "a value that stays"),
            (PLACE, "where it is"),
            (DONE, "a zero"),
        )
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _parts(axis: Axes, x: float, parts: list[tuple[int, str, str]]) -> None:
    """Boxes side by side from `x` on, as wide as their bits."""
    for width, text, colour in parts:
        axis.add_patch(
            Rectangle((x, 0.1), width, 0.8, facecolor=colour, edgecolor="white", linewidth=1)
        )
        size = 9 if width >= 16 else 6.5
        axis.text(x + width / 2, 0.5, text, ha="center", va="center", fontsize=size)
        x += width


def _check(W: Tensor, mask: Tensor) -> None:
    if W.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"the mask of weights {tuple(W.shape)} is bool in their shape, got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    if not W.numel():
        raise ValueError(f"weights {tuple(W.shape)} are empty: there is nothing to draw")
