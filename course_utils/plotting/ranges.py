"""Figures of ranges and of what they cost: clips, sensitivities, predicted losses."""

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from course_utils.plotting.style import COLOURS, new_figure, series_styles, styled


@styled
def error_against_clip(panels: dict[str, tuple[Tensor, Tensor, Tensor]]) -> Figure:
    """Mean squared error against the clip, `panels[title] = (clips, rounding, clipping)` `[n]`.

    The sum of the two parts is drawn as well, with a dot at its minimum.
    """
    figure, axes = new_figure(1, len(panels), height=3.4, squeeze=False, sharey=True)
    for axis, (title, (clips, rounding, clipping)) in zip(axes[0], panels.items(), strict=True):
        total = rounding + clipping
        axis.plot(clips, rounding, color=COLOURS["blue"], linestyle="--", label="rounding")
        axis.plot(clips, clipping, color=COLOURS["red"], linestyle=":", label="clipping")
        axis.plot(clips, total, color="black", label="both")
        best = total.argmin()
        axis.plot(clips[best], total[best], "o", color="black")
        axis.set_yscale("log")
        axis.set_ylim(bottom=total.min().item() / 30, top=3 * total.max().item())
        axis.set_xscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("clip t")
    axes[0][0].set_ylabel("mean squared error")
    axes[0][0].legend(fontsize=8)
    return figure


@styled
def clips_on_histogram(panels: dict[str, tuple[Tensor, dict[str, float]]]) -> Figure:
    """Histogram of |x| with a line at each clip, `panels[title] = (values, clips by name)`.

    Each line is shorter than those drawn before it, so that clips that coincide are all seen.
    """
    figure, axes = new_figure(len(panels), 1, height=2.7 * len(panels), squeeze=False)
    styles = series_styles((name for _, clips in panels.values() for name in clips), "linestyle")
    for axis, (title, (values, clips)) in zip(axes[:, 0], panels.items(), strict=True):
        sizes = values.flatten().abs()
        low, high = float(sizes.median()) / 100, 1.2 * float(sizes.max())
        axis.hist(sizes.numpy(), bins=np.geomspace(low, high, 80), color="lightgrey")
        for i, (name, clip) in enumerate(clips.items()):
            top = 1 - i / (len(clips) + 2)  # of the axis' height
            axis.axvline(clip, 0, top, linewidth=2, label=f"{name}: {clip:,.2f}", **styles[name])
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("values")
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes[-1, 0].set_xlabel("|x|")
    return figure


@styled
def loss_against_alpha(
    panels: dict[str, dict[str, tuple[list[float], float]]], alphas: list[float], ylabel: str
) -> Figure:
    """A curve over `alphas` and a dashed line for none: `panels[title][kind] = (losses, without)`.

    A kind has the same colour in all panels, and its line for none the same marker, at the ends.
    """
    styles = series_styles((k for curves in panels.values() for k in curves), "linestyle", "marker")
    figure, axes = new_figure(1, len(panels), height=3.6, squeeze=False)
    entries = {}
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for kind, (losses, without) in curves.items():
            axis.plot(alphas, losses, label=f"{kind}, smoothed", **styles[kind])
            level = styles[kind] | {"linestyle": "--"}
            axis.axhline(without, label=f"{kind}, not smoothed", **level)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("alpha")
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    axes[0][0].set_ylabel(ylabel)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


@styled
def sensitivity_bars(losses: dict[str, dict[str, float]], xlabel: str) -> Figure:
    """A row for each part of a model, a bar for each variant that has it: `losses[variant][part]`."""
    parts = list(dict.fromkeys(part for of_part in losses.values() for part in of_part))
    styles = series_styles(losses, "hatch")
    figure, axis = new_figure(height=1.0 + 0.2 * len(parts) * max(1, len(losses) / 2))
    width = 0.8 / len(losses)
    for i, (variant, of_part) in enumerate(losses.items()):
        shift = (i - (len(losses) - 1) / 2) * width
        places = [parts.index(part) + shift for part in of_part]
        axis.barh(places, list(of_part.values()), width, label=variant, **styles[variant])
    axis.set_yticks(range(len(parts)), parts, fontsize=8)
    axis.set_ylabel("the part that is quantized")
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel(xlabel)
    axis.legend(fontsize=8)
    return figure


@styled
def predicted_against_measured(
    points: dict[str, tuple[list[float], list[float]]], unit: str
) -> Figure:
    """Scatter with the diagonal on logarithmic axes, `points[label] = (predicted, measured)`."""
    figure, axis = new_figure(width=6.0, height=4.2)
    both = [v for predicted, measured in points.values() for v in (*predicted, *measured) if v > 0]
    ends = [min(both) / 1.3, max(both) * 1.3]
    axis.plot(ends, ends, color=COLOURS["grey"], linestyle="--", label="as predicted")
    styles = series_styles(points, "marker")
    for label, values in points.items():
        axis.plot(*values, linestyle="none", label=label, **styles[label])
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(f"predicted: sum of single losses, {unit}")
    axis.set_ylabel(f"measured, {unit}")
    axis.legend(fontsize=8)
    return figure
