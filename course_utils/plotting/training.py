"""Figures of training: curves over updates, and what a learned step feels."""

from matplotlib.figure import Figure
from torch import Tensor

from course_utils.plotting.style import COLOURS, new_figure, series_styles, styled


@styled
def training_curves(
    curves: dict[str, tuple[list[int], list[float]]],
    ylabel: str,
    *,
    levels: dict[str, float] | None = None,
) -> Figure:
    """Values over updates, `curves[label] = (updates, values)`, and `levels` as dashed lines.

    A level with the label of a curve is drawn in its colour, with its marker at the ends; the others
    are series of their own.
    """
    levels = levels or {}
    styles = series_styles([*curves, *levels], "linestyle", "marker")
    figure, axis = new_figure(height=3.6)
    for label, (updates, values) in curves.items():
        every = max(1, len(updates) // 20)
        axis.plot(updates, values, markevery=every, label=label, **styles[label])
    for label, value in levels.items():
        style = styles[label] | {"linestyle": "--", "linewidth": 1, "alpha": 0.8}
        axis.axhline(value, label=None if label in curves else label, **style)
    axis.set_xlabel("updates")
    axis.set_ylabel(ylabel)
    axis.legend(fontsize=8)
    return figure


@styled
def step_gradient(ratio: Tensor, value: Tensor, of_weight: Tensor, of_step: Tensor) -> Figure:
    """A weight's value on the grid, in steps, and its two gradients, all against w / S `[n]`."""
    figure, (left, right) = new_figure(1, 2, height=3.4)
    left.plot(ratio, ratio, color=COLOURS["grey"], linestyle="--", label="no grid")
    left.plot(ratio, value, color=COLOURS["blue"], label="value on the grid / S")
    right.plot(ratio, of_weight, color=COLOURS["orange"], label="with respect to the weight")
    right.plot(ratio, of_step, color=COLOURS["blue"], label="with respect to the step")
    left.set_ylabel("in steps")
    right.set_ylabel("gradient of the value")
    for axis in (left, right):
        axis.set_xlabel("weight / step")
        axis.legend(fontsize=8)
    return figure
