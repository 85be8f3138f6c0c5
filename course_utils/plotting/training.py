"""Figures of training: curves over updates, and what a learned step feels."""

from matplotlib.figure import Figure
from torch import Tensor

from course_utils.plotting.style import COLOURS, new_figure, styled


@styled
def training_curves(
    curves: dict[str, tuple[list[int], list[float]]],
    ylabel: str,
    *,
    levels: dict[str, float] | None = None,
) -> Figure:
    """Values over updates, `curves[label] = (updates, values)`, and `levels` as dashed lines.

    A level with the label of a curve is drawn in its colour, and any other in grey.
    """
    figure, axis = new_figure(height=3.6)
    colour_of = dict(zip(curves, COLOURS.values(), strict=False))
    for label, (updates, values) in curves.items():
        marker = "o" if len(updates) <= 20 else None
        axis.plot(updates, values, marker=marker, color=colour_of[label], label=label)
    for label, value in (levels or {}).items():
        own = label in colour_of
        axis.axhline(value, linestyle="--", linewidth=1, alpha=0.8, label=None if own else label,
                     color=colour_of.get(label, COLOURS["grey"]))  # fmt: skip
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
