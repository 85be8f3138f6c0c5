"""Figures of uniform grids: the mapping itself, values on their grid, an error against the bits."""

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from torch import Tensor

from course_utils.plotting.style import COLOURS, new_figure, series_styles, styled


@styled
def staircase(scale: float, zero_point: int, low: int, high: int) -> Figure:
    """What `S * (q - Z)` makes of every real number, and the error: rounding inside, clipping outside."""
    levels = scale * (torch.arange(low, high + 1) - zero_point)
    span = levels[-1] - levels[0]
    r = torch.linspace(levels[0] - 0.25 * span, levels[-1] + 0.25 * span, 2001)
    back = scale * ((r / scale).round() + zero_point).clamp(low, high).sub(zero_point)
    figure, (left, right) = new_figure(1, 2, height=3.4)
    left.plot(r, r, color=COLOURS["grey"], linestyle="--", label="no quantization")
    left.plot(r, back, color=COLOURS["blue"], label="S (q - Z)")
    left.set_ylabel("value after the round trip")
    left.legend(fontsize=8)
    right.plot(r, r - back, color=COLOURS["blue"])
    for sign in (-1, 1):
        right.axhline(sign * scale / 2, color=COLOURS["green"], linestyle=":")
    for edges in ((r[0], levels[0] - scale / 2), (levels[-1] + scale / 2, r[-1])):
        right.axvspan(*edges, color=COLOURS["red"], alpha=0.12)
    right.text(r[0], scale / 2, "half a step", va="bottom", ha="left", fontsize=8)
    right.text(r[-1], r[-1] - levels[-1], "clipped ", va="bottom", ha="right", fontsize=8)
    right.set_ylabel("error r - S (q - Z)")
    for axis in (left, right):
        axis.set_xlabel("real number r")
    return figure


@styled
def values_on_grid(panels: dict[str, tuple[Tensor, Tensor]]) -> Figure:
    """Histogram of values with the levels they are rounded to, `panels[title] = (values, levels)`."""
    figure, axes = new_figure(len(panels), 1, height=2.0 * len(panels), sharex=True, squeeze=False)
    for axis, (title, (values, levels)) in zip(axes[:, 0], panels.items(), strict=True):
        axis.hist(values.numpy(), bins=61, color=COLOURS["blue"], label="values")
        for i, level in enumerate(levels.tolist()):
            axis.axvline(level, color=COLOURS["red"], linewidth=1, label=None if i else "levels")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("value")
        axis.set_ylabel("how many")
    axes[0, 0].legend(fontsize=8, frameon=True)
    return figure


@styled
def error_against_bits(
    panels: dict[str, dict[str, tuple[list[float], list[float]]]],
    ylabel: str,
    *,
    xlabel: str = "bits per code",
    theory: dict[str, dict[str, tuple[list[float], list[float]]]] | None = None,
    log: bool = False,
) -> Figure:
    """Measured curves against bits: `panels[title][label] = (bits, values)`, one axis a panel.

    A label has the same colour in all panels. `theory` holds curves of the same form: each is drawn as
    a dashed line in the colour of the measured curve of its panel and label, and one that has no such
    curve is a `ValueError`. Panels share the vertical axis, unless it is logarithmic.
    """
    theory = theory or {}
    for title, curves in theory.items():
        if alone := curves.keys() - panels.get(title, {}).keys():
            raise ValueError(
                f"theory of {sorted(alone)} in panel {title!r}, where nothing of that name is measured: "
                f"the panels hold { {title: list(curves) for title, curves in panels.items()} }"
            )
    styles = series_styles(
        (label for curves in panels.values() for label in curves), "linestyle", "marker"
    )
    figure, axes = new_figure(1, len(panels), height=3.6, sharey=not log, squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for label, (bits, values) in curves.items():
            axis.plot(bits, values, label=label, **styles[label])
        for label, curve in theory.get(title, {}).items():
            axis.plot(*curve, linestyle="--", color=styles[label]["color"], alpha=0.7)
        if theory:
            axis.plot([], [], linestyle="--", color=COLOURS["grey"], label="theory")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(xlabel)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        # Below the axis: curves that go from corner to corner, or lie level, leave no room inside.
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4)
        if log:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
    axes[0][0].set_ylabel(ylabel)
    return figure


@styled
def rounding_distances(errors: dict[str, Tensor]) -> Figure:
    """Histograms of (w - value) / S in steps, one for each way of rounding, over each other."""
    figure, axis = new_figure(height=3.0)
    reach = max(float(e.abs().max()) for e in errors.values())
    bins = torch.linspace(-reach, reach, 101).tolist()
    styles = series_styles(errors, "hatch")
    for name, steps in errors.items():
        weights = torch.full_like(steps, 100 / len(steps)).numpy()
        axis.hist(steps.numpy(), bins, weights=weights, alpha=0.6, label=name, **styles[name])
    for sign in (-1, 1):
        axis.axvline(sign / 2, color=COLOURS["grey"], linestyle=":")
    axis.set_xlabel("weight minus its code's value, in steps (dotted: half a step)")
    axis.set_ylabel("% of the weights")
    axis.legend(fontsize=8)
    return figure
