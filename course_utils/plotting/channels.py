"""Figures of channels: how unequal they are, and what scaling them is worth."""

from matplotlib.figure import Figure
from torch import Tensor

from course_utils.plotting.style import COLOURS, new_figure, series_styles, styled


@styled
def sorted_sizes(curves: dict[str, Tensor]) -> Figure:
    """Sizes of channels `[channels]` in descending order, each curve over its median, on a log axis."""
    figure, axis = new_figure(height=3.2)
    styles = series_styles(curves, "linestyle")
    for label, sizes in curves.items():
        ordered = sizes.float().sort(descending=True).values
        axis.plot((ordered / ordered.median()).cpu(), label=label, **styles[label])
    axis.axhline(1, color=COLOURS["grey"], linestyle=":")
    axis.set_yscale("log")
    axis.set_xlabel("channel, from the largest to the smallest")
    axis.set_ylabel("size, over the median")
    axis.legend(fontsize=8)
    return figure


@styled
def loss_against_ratio(curves: dict[str, list[float]], ratios: list[float]) -> Figure:
    """Output error for each ratio of AWQ's search, over that of ratio 0; a dot at each curve's least.

    `curves[place]` are errors relative to round-to-nearest, the dashed line at 1, on a log axis.
    """
    figure, axis = new_figure(height=3.4)
    styles = series_styles(curves, "linestyle")
    axis.axhline(1, color=COLOURS["grey"], linestyle="--", label="round-to-nearest")
    for place, errors in curves.items():
        axis.plot(ratios, errors, label=place, **styles[place])
        least = min(range(len(errors)), key=errors.__getitem__)
        axis.plot(ratios[least], errors[least], "o", color=styles[place]["color"])
    axis.set_yscale("log")
    axis.set_xlabel("ratio")
    axis.set_ylabel("output error, over round-to-nearest's")
    axis.legend(fontsize=8)
    return figure
