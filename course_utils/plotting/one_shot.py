"""Figures of pruning in one shot: whom a score removes, how errors move, and where the bits go."""

from collections.abc import Mapping

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from course_utils.plotting.diagrams.drawing import (
    DIVERGING,
    DONE,
    SEQUENTIAL,
    arrow,
    canvas,
    cell,
    decimals,
    refuse_above,
    signed,
)
from course_utils.plotting.style import COLOURS, new_figure, series_styles, styled

MAX_ROWS, MAX_COLUMNS, STEPS = 4, 4, 3


@styled
def chosen_weights(W: Tensor, norms: Tensor, masks: Mapping[str, Tensor]) -> Figure:
    """A small matrix under several masks, below the norms of the inputs that its columns meet.

    `W` `[out, in]`, at most 4 by 4, `norms` `[in]`, and masks bool `[out, in]` by the score that made them.
    Removed weights are grey and struck out. Raises ValueError for larger matrices.
    """
    refuse_above(MAX_ROWS, len(W), "rows", "draw a corner of the matrix")
    refuse_above(MAX_COLUMNS, W.shape[1], "columns", "draw a corner of the matrix")
    rows, columns = W.shape
    reach, largest = float(W.abs().max()) or 1.0, float(norms.max()) or 1.0
    figure, axes = new_figure(1, len(masks), height=3.3, squeeze=False)
    for axis, (title, mask) in zip(axes[0], masks.items(), strict=True):
        canvas(axis, columns + 0.9, rows + 1.3)
        axis.set_aspect("equal")
        axis.set_title(title, fontsize=10)
        for j, norm in enumerate(norms.tolist()):
            colour = SEQUENTIAL(0.8 * norm / largest)
            cell(axis, j + 0.9, rows + 0.25, colour, signed(norm, decimals(norms, 2)))
        axis.text(0.75, rows + 0.75, "|X|", ha="right", va="center", fontsize=9)
        axis.text(0.75, rows / 2, "W", ha="right", va="center", fontsize=9)
        for i, row in enumerate(W.tolist()):
            for j, value in enumerate(row):
                kept = bool(mask[i, j])
                colour = DIVERGING(0.5 + 0.4 * value / reach) if kept else DONE
                x, y = j + 0.9, rows - 1 - i
                cell(axis, x, y, colour, signed(value, decimals(W, 2)))
                if not kept:
                    axis.plot([x + 0.1, x + 0.9], [y + 0.1, y + 0.9], color="black", linewidth=1)
    return figure


@styled
def sparsegpt_steps(W: Tensor, mask: Tensor, U: Tensor) -> Figure:
    """SparseGPT's first three columns: what goes becomes 0, and its error moves the columns to its right.

    `W` `[out, in]`, at most 4 by 4 and at least 3 columns, `mask` bool `[out, in]`, `U` `[in, in]` the upper
    factor of the inverse Hessian. A removed w leaves the error e = w / U_ii, and column j to the right moves
    by -e U_ij (Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1). A cell holds its weight after the
    step, and below it what the step added. Raises ValueError for other shapes.
    """
    refuse_above(MAX_ROWS, len(W), "rows", "draw a corner of the matrix")
    refuse_above(MAX_COLUMNS, W.shape[1], "columns", "draw a corner of the matrix")
    if W.shape[1] < STEPS:
        raise ValueError(f"{STEPS} steps need {STEPS} columns, W has {W.shape[1]}")
    before, steps = W.clone(), []
    for i in range(STEPS):
        error = torch.where(mask[:, i], 0, before[:, i]) / U[i, i]  # [out]
        after = before.clone()
        after[:, i] = before[:, i].where(mask[:, i], 0)
        after[:, i + 1 :] -= error[:, None] * U[i, i + 1 :]
        steps.append((i, after, after - before))
        before = after
    reach = max(float(moved[:, i + 1 :].abs().max()) for i, _, moved in steps if i + 1 < W.shape[1])
    figure, axes = new_figure(1, STEPS, height=0.75 + 2.9 * (len(W) + 1) / W.shape[1])
    figure.get_layout_engine().set(wspace=0.04, h_pad=0.1)
    for axis, (i, after, moved) in zip(axes, steps, strict=True):
        canvas(axis, W.shape[1], len(W) + 1)
        axis.set_aspect("equal")
        axis.set_title(f"step {i + 1}: column {i + 1}", fontsize=10)
        _step(axis, i, after, moved, mask, reach or 1.0)
    figure.supxlabel(
        "black frame: the column of the step; grey 0: removed; small: what this step added",
        fontsize=9,
    )
    return figure


def _step(axis: Axes, i: int, after: Tensor, moved: Tensor, mask: Tensor, reach: float) -> None:
    rows, columns = after.shape
    for r in range(rows):
        for j in range(columns):
            value, change = float(after[r, j]), float(moved[r, j])
            text = signed(value, 2)
            gone = j <= i and not mask[r, j]
            if gone:
                text = "0"
            elif j > i and abs(change) > 1e-9:
                text += f"\n({'+' if change > 0 else ''}{signed(change, 2)})"
            behind = j > i
            colour = DIVERGING(0.5 + 0.4 * change / reach) if behind else "#F7F7F7"
            cell(axis, j, rows - 1 - r, DONE if gone else colour, text)
    frame = Rectangle((i, 0), 1, rows, fill=False, edgecolor="black", linewidth=2)
    axis.add_patch(frame)
    for j in range(i + 1, columns):
        bend = f"arc3,rad=-{0.9 / (j - i + 1):.2f}"
        start, end = (i + 0.5, rows + 0.05), (j + 0.5, rows + 0.05)
        arrow(axis, start, end, COLOURS["red"], connectionstyle=bend)


@styled
def gain_against_outliers(points: Mapping[str, tuple[list[float], list[float]]]) -> Figure:
    """Wanda's output error over magnitude's, against how unequal a layer's inputs are.

    `points[model] = (largest over median input norm, error over error)`, a point a layer. Below the dashed
    line Wanda errs less.
    """
    figure, axis = new_figure(height=3.6)
    axis.axhline(1, color=COLOURS["grey"], linestyle="--", linewidth=1, label="the same error")
    styles = series_styles(points, "marker")
    for name, (ratios, errors) in points.items():
        axis.plot(ratios, errors, linestyle="none", markersize=6, label=name, **styles[name])
    axis.set_xscale("log")
    axis.set_ylim(0, None)
    axis.set_xlabel("largest input norm over the median one (logarithmic)")
    axis.set_ylabel("error of Wanda / error of magnitude")
    axis.legend(fontsize=8)
    return figure


@styled
def bits_of_parts(weights: Mapping[str, Mapping[str, float]]) -> Figure:
    """Where the bits of a weight go: a bar each, `weights[name][part] = bits per weight`."""
    figure, axis = new_figure(height=0.9 + 0.45 * len(weights))
    parts = list(dict.fromkeys(part for of_one in weights.values() for part in of_one))
    styles = series_styles(parts, "hatch")
    for part, style in styles.items():
        axis.barh(0, 0, label=part, **style)  # for the legend: a weight may lack a part
    for place, of_one in enumerate(weights.values()):
        left = 0.0
        for part, bits in of_one.items():
            axis.barh(place, bits, left=left, edgecolor="white", **styles[part])
            left += bits
        axis.text(left + 0.03, place, f"{left:.3f}", va="center", fontsize=9)
    axis.set_yticks(range(len(weights)), list(weights))
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.set_xlim(0, 1.15 * max(sum(of_one.values()) for of_one in weights.values()))
    axis.set_xlabel("measured bits per weight")
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.45), ncols=3)
    return figure
