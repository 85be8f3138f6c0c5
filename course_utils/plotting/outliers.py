"""Figures of outliers, and of what they cost."""

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from course_utils.plotting.style import COLOURS, new_figure, series_styles, styled


@styled
def codes_against_outlier(row: Tensor, outliers: list[float]) -> Figure:
    """How many entries of `row` `[n]` get each int8 code, its last entry replaced by each outlier.

    One bar a code, and one axis below the other: side by side, a bar would be thinner than a pixel.
    """
    figure, axes = new_figure(len(outliers), 1, height=1.9 * len(outliers), sharex=True)
    for axis, outlier in zip(np.atleast_1d(axes), outliers, strict=True):
        changed = row.clone()
        changed[-1] = outlier
        codes = (changed * (127 / changed.abs().max())).round()
        found, entries = codes.unique(return_counts=True)
        axis.bar(found.numpy(), entries.numpy(), width=1.0, color=COLOURS["blue"])
        used = len(codes[:-1].unique())
        axis.set_title(f"last entry {outlier:g}: {used} codes for the rest", fontsize=10)
        axis.set_yscale("log")
        axis.set_ylim(bottom=0.7)  # a single entry is seen, too
        axis.set_ylabel("entries")
        axis.set_xlabel("int8 code")
    return figure


@styled
def feature_maxima(panels: dict[str, Tensor], threshold: float) -> Figure:
    """Largest |x| of every input feature, one panel per title, with the threshold as a line."""
    figure, axes = new_figure(1, len(panels), height=3.2, squeeze=False)
    for axis, (title, maxima) in zip(axes[0], panels.items(), strict=True):
        features = torch.arange(len(maxima))
        above = maxima >= threshold
        axis.scatter(features[~above], maxima[~above], s=6, color=COLOURS["blue"], label="regular")
        axis.scatter(features[above], maxima[above], s=22, color=COLOURS["red"], marker="^",
                     label="outlier feature")  # fmt: skip
        axis.axhline(
            threshold, color=COLOURS["grey"], linestyle="--", label=f"threshold {threshold:g}"
        )
        axis.set_yscale("log")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("input feature")
    axes[0][0].set_ylabel("largest |x| over the tokens")
    entries = {
        text: handle
        for axis in axes[0]
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


@styled
def error_against_threshold(
    kept: list[int], errors: dict[str, list[float]], thresholds: list
) -> Figure:
    """Relative output error (log scale) against the number of float columns; thresholds annotated."""
    figure, axis = new_figure(height=3.6)
    styles = series_styles(errors, "linestyle", "marker")
    for label, values in errors.items():
        axis.plot(kept, values, label=label, **styles[label])
    labels: dict[tuple[int, float], list[str]] = {}
    for x, y, threshold in zip(kept, next(iter(errors.values())), thresholds, strict=True):
        labels.setdefault((x, y), []).append("none" if threshold is None else f"{threshold:g}")
    for place, names in labels.items():
        axis.annotate(", ".join(names), place, textcoords="offset points", xytext=(0, -14),
                      ha="left" if place[0] == 0 else "center", fontsize=8)  # fmt: skip
    axis.set_xscale("symlog")
    axis.set_yscale("log")
    axis.set_xlabel("feature columns kept in float (labels: the threshold)")
    axis.set_ylabel("relative output error")
    axis.legend()
    return figure


@styled
def relative_bars(groups: dict[str, dict[str, float]], ylabel: str) -> Figure:
    """Bars by group, each divided by the group's first: `groups[group][variant] = value`.

    A group may lack variants, but not the first: the one that all are divided by is the same.
    """
    figure, axis = new_figure(height=3.2)
    styles = series_styles((variant for group in groups.values() for variant in group), "hatch")
    first = next(iter(styles))
    if without := [name for name, group in groups.items() if first not in group]:
        raise ValueError(f"{without} hold no {first!r}, by which the others of a group are divided")
    width = 0.8 / len(styles)
    for i, (variant, style) in enumerate(styles.items()):
        having = [g for g, group in enumerate(groups.values()) if variant in group]
        values = [g[variant] / g[first] for g in groups.values() if variant in g]
        places = np.array(having) + (i - (len(styles) - 1) / 2) * width
        bars = axis.bar(places, values, width, label=variant, **style)
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_ylabel(ylabel)
    axis.legend(fontsize=8)
    return figure
