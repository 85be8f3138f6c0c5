"""Figures of codebooks: how often each code is used, and errors against the size of blocks."""

from matplotlib.figure import Figure
from torch import Tensor

from course_utils.plotting.style import COLOURS, new_figure, series_styles, styled


@styled
def code_usage(shares: dict[str, Tensor]) -> Figure:
    """How often each code is used, a panel for each of `shares[title]` `[codes]`, which sum to 1.

    The dashed line is equal use. Panels share their axes.
    """
    figure, axes = new_figure(1, len(shares), height=2.8, sharey=True, squeeze=False)
    for axis, (title, share) in zip(axes[0], shares.items(), strict=True):
        axis.bar(range(len(share)), (100 * share).tolist(), color=COLOURS["blue"], width=0.85)
        axis.axhline(100 / len(share), color=COLOURS["grey"], linestyle="--", label="equal use")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("code")
        axis.set_xticks(range(0, len(share), 3 if len(share) > 8 else 1))
    axes[0, 0].set_ylabel("% of the weights")
    axes[0, -1].legend(fontsize=8)
    return figure


@styled
def against_block_size(
    panels: dict[str, dict[str, tuple[list[float], ...]]], *, level: float | None = None
) -> Figure:
    """Curves over the size of blocks, `panels[ylabel][label] = (sizes, values)`, an axis a panel.

    A third list holds standard errors: then a bar reaches 2 of them to each side. Sizes are on a logarithmic
    scale of base 2. A label has the same look in all panels. `level` is a dashed line.
    """
    labels = (label for curves in panels.values() for label in curves)
    styles = series_styles(labels, "linestyle", "marker")
    figure, axes = new_figure(1, len(panels), height=3.6, squeeze=False)
    for axis, (ylabel, curves) in zip(axes[0], panels.items(), strict=True):
        for label, (sizes, values, *errors) in curves.items():
            bars = [2 * error for error in errors[0]] if errors else None
            axis.errorbar(sizes, values, bars, label=label, capsize=3, **styles[label])
        if level is not None:
            axis.axhline(level, color=COLOURS["grey"], linestyle="--", linewidth=1)
        axis.set_xscale("log", base=2)
        ticks = sorted({size for sizes, *_ in curves.values() for size in sizes})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        axis.minorticks_off()
        axis.set_xlabel("weights in a block")
        axis.set_ylabel(ylabel)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return figure
