"""Figures of pruning: masks, what each layer loses, bytes and time against sparsity, and training."""

from collections.abc import Mapping

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from course_utils.plotting.diagrams.drawing import refuse_above
from course_utils.plotting.style import COLOURS, new_figure, series_styles, styled

MAX_SIDE, MAX_PANELS = 256, 4
Curve = tuple[list[float], list[float]]


@styled
def mask_pictures(masks: Mapping[str, Tensor]) -> Figure:
    """Masks (bool `[out, in]`) side by side, a pixel a weight: dark stays, pale is removed.

    At most 4 of at most 256 by 256, so that no weight is lost between pixels. For `pruning/pruning_demo`.
    Raises ValueError for more.
    """
    refuse_above(MAX_PANELS, len(masks), "masks", "draw fewer")
    figure, axes = new_figure(1, len(masks), height=9.2 / len(masks) + 0.4, squeeze=False)
    shades = ListedColormap(["#F0F0F0", "#003A5C"])
    for axis, (title, mask) in zip(axes[0], masks.items(), strict=True):
        refuse_above(MAX_SIDE, max(mask.shape), "weights in a row or column", "pass a corner")
        axis.imshow(mask.int().numpy(), cmap=shades, vmin=0, vmax=1, interpolation="nearest")
        axis.grid(False)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("column (input)")
    axes[0][0].set_ylabel("row (output)")
    return figure


@styled
def share_of_layers(shares: Mapping[str, Mapping[str, float]], asked: float) -> Figure:
    """The share of weights that each layer loses, `shares[way][layer]`; `asked` is the dashed line."""
    figure, axis = new_figure(height=3.8)
    styles = series_styles(shares, "marker")
    for way, of_layer in shares.items():
        places = range(len(of_layer))
        axis.plot(places, of_layer.values(), linestyle="none", label=way, **styles[way])
    axis.axhline(asked, color=COLOURS["grey"], linestyle="--", linewidth=1, label="asked for")
    names = list(next(iter(shares.values())))
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axis.set_ylim(0, 1)
    axis.set_ylabel("share removed")
    axis.legend(fontsize=8, ncols=3)
    return figure


@styled
def against_sparsity(
    panels: Mapping[str, Mapping[str, Curve]], ylabels: list[str], level: str
) -> Figure:
    """Curves over the share removed, a panel each: `panels[title][label] = (shares, values)`.

    The curve called `level`, the dense form, is dashed; a dotted line stands where another goes below it.
    """
    figure, axes = new_figure(1, len(panels), height=3.9, squeeze=False)
    names = [label for curves in panels.values() for label in curves if label != level]
    styles = series_styles(names, "marker")
    for axis, ylabel, (title, curves) in zip(axes[0], ylabels, panels.items(), strict=True):
        dense = curves[level]
        axis.plot(*dense, color="black", linestyle="--", linewidth=1.2, label=level)
        for label, (shares, values) in curves.items():
            if label == level:
                continue
            axis.plot(shares, values, label=label, markersize=5, **styles[label])
            same = list(shares) == list(dense[0])  # a format of one sparsity crosses nothing
            crossing = break_even(shares, values, dense[1]) if same else None
            if crossing is not None:
                axis.axvline(crossing, color=styles[label]["color"], linestyle=":", linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("share of weights removed")
        axis.set_ylabel(ylabel)
        axis.set_ylim(0, 2.2 * max(dense[1]))
        axis.legend(fontsize=8)
    return figure


def break_even(shares: list[float], values: list[float], dense: list[float]) -> float | None:
    """The share from which on `values` stay below `dense`, by straight lines between the points.

    None where they do not at the last share, or do so at all of them.
    """
    above = [v >= d for v, d in zip(values, dense, strict=True)]
    if above[-1] or not any(above):
        return None
    i = max(place for place, is_above in enumerate(above) if is_above)
    before, after = values[i] - dense[i], dense[i + 1] - values[i + 1]
    return shares[i] + (shares[i + 1] - shares[i]) * before / (before + after)


@styled
def schedule_and_loss(
    shares: Mapping[str, Curve], losses: Mapping[str, Curve], level: float
) -> Figure:
    """What is removed, and the training loss, over the updates: `[label] = (updates, values)`.

    `level` is the dense model's loss before, dashed.
    """
    figure, (left, right) = new_figure(1, 2, height=3.4)
    styles = series_styles([*shares, *losses], "linestyle")
    for label, (updates, values) in shares.items():
        left.step(updates, values, where="post", label=label, **styles[label])
    for label, curve in losses.items():
        right.plot(*curve, label=label, **styles[label])
    right.axhline(level, color="black", linestyle="--", linewidth=1, label="before, dense")
    left.set_ylabel("share of weights removed")
    left.set_ylim(0, 1)
    right.set_ylabel("training loss (nats per token)")
    for axis in (left, right):
        axis.set_xlabel("updates")
        axis.legend(fontsize=8)
    return figure
