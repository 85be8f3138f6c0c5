"""Figures of grids without a zero: the error over their scale, levels among weights, error over depth."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from course_utils.plotting.style import COLOURS, new_figure, series_styles, styled

REACH = 4  # root mean squares to each side of a histogram


@styled
def error_over_scale(
    curves: Mapping[str, tuple[Tensor, Tensor]], chosen: Mapping[str, float]
) -> Figure:
    """Relative squared error over the scale of a grid: `curves[label] = (scales, errors)`, both `[n]`.

    A dot marks the curve at the scale `chosen[label]`. The dashed line at 1 is a matrix of zeros. For
    `chronology/tpoti_demo`.
    """
    figure, axis = new_figure(height=3.4, width=8)
    styles = series_styles(curves, "linestyle")
    axis.axhline(1, color=COLOURS["grey"], linestyle="--", linewidth=1, label="all zeros")
    for label, (scales, errors) in curves.items():
        axis.plot(scales, errors, label=label, **styles[label])
        at = (scales - chosen[label]).abs().argmin()
        axis.plot(scales[at], errors[at], "o", color=styles[label]["color"], markersize=8)
    axis.set_ylim(0, 1.6)
    axis.set_xlabel("scale, in root mean squares of the weights")
    axis.set_ylabel("error (share of the square)")
    axis.legend(fontsize=8, loc="upper right")
    return figure


@styled
def levels_on_histogram(panels: Mapping[str, tuple[Tensor, Tensor]]) -> Figure:
    """Histograms of values with a grid's levels as lines, `panels[title] = (values, levels)`, a row each.

    Values, of any shape, and levels `[n]` are divided by the values' root mean square. Dotted lines stand
    half way between levels: there the nearest one changes. What lies beyond 4 is drawn at 4. For
    `chronology/tpoti_demo`.
    """
    figure, axes = new_figure(1, len(panels), height=3.0, squeeze=False, sharey=True)
    edges = torch.linspace(-REACH, REACH, 81).numpy()
    for axis, (title, (values, levels)) in zip(axes[0], panels.items(), strict=True):
        unit = values.square().mean().sqrt()
        ratio = (values.flatten() / unit).clamp(-REACH, REACH).numpy()
        levels = (levels / unit).sort().values
        axis.hist(ratio, bins=edges, color="lightgrey")
        for i, level in enumerate(levels.tolist()):
            name = None if i else "levels"
            axis.axvline(level, color=COLOURS["red"], linewidth=2, label=name)
        for i, threshold in enumerate(((levels[1:] + levels[:-1]) / 2).tolist()):
            name = None if i else "half way"
            axis.axvline(threshold, color="black", linestyle=":", linewidth=1, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("weight / root mean square")
    axes[0, 0].set_ylabel("weights")
    axes[0, -1].legend(fontsize=8)
    return figure


@styled
def error_over_depth(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """A curve over the blocks of a model for each label, `panels[title][label]`, a panel for each title.

    The dashed line at 1 is an error as large as the hidden state. For `chronology/tpoti_demo`.
    """
    figure, axes = new_figure(1, len(panels), height=3.8, squeeze=False, sharey=True)
    labels = (label for curves in panels.values() for label in curves)
    styles = series_styles(labels, "linestyle", "marker")
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        axis.axhline(1, color=COLOURS["grey"], linestyle="--", linewidth=1)
        for label, values in curves.items():
            axis.plot(range(1, len(values) + 1), values, label=label, markersize=4, **styles[label])
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("after block")
    axes[0, 0].set_ylabel("error / hidden state")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8)
    return figure
