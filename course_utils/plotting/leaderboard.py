"""Figures of the measured comparison: losses in pairs, bits against nats, ranks on two texts.

For `chronology/comparison`.
"""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from course_utils.plotting.ladder import pareto
from course_utils.plotting.style import COLOURS, new_figure, series_styles, styled

Points = tuple[list[float], list[float], list[float]]


@styled
def paired_documents(losses: Mapping[str, Sequence[float]], of_float: Sequence[float]) -> Figure:
    """Nats per token of each document: left as they are, right less those of the float model.

    `losses[label]` and `of_float` have a value for each document; the dashed lines on the right are the means
    over documents. Raises ValueError for lists of different lengths.
    """
    if any(len(values) != len(of_float) for values in losses.values()):
        raise ValueError("each list has one value for each document of the float model's")
    figure, (left, right) = new_figure(1, 2, height=3.4)
    styles = series_styles(losses, "marker")
    places = range(1, len(of_float) + 1)
    left.plot(places, of_float, "_", color=COLOURS["grey"], markersize=10, label="float")
    for label, values in losses.items():
        style = {"linestyle": "none", "markersize": 5, **styles[label]}
        left.plot(places, values, label=label, **style)
        lost = [value - reference for value, reference in zip(values, of_float, strict=True)]
        right.plot(places, lost, **style)
        right.axhline(sum(lost) / len(lost), color=style["color"], linestyle="--", linewidth=1)
    right.axhline(0, color=COLOURS["grey"], linewidth=1)
    left.set_ylabel("nats per token")
    right.set_ylabel("nats per token, less float")
    for axis in (left, right):
        axis.set_xlabel("document")
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(1.1, -0.18), ncols=3)
    return figure


@styled
def bits_and_nats(points: Mapping[str, Points], near: tuple[float, float], most: float) -> Figure:
    """Nats lost against measured bits, all rows on the left, on the right those of `near` bits alone.

    `points[label] = (bits, nats, standard errors)`; bars reach 2 errors. The grey line is the Pareto front.
    What lies above `most` nats is left out on the left, and told in its corner.
    """
    figure, (whole, close) = new_figure(1, 2, height=4.0)
    styles = series_styles(points, "marker")
    triples = [t for series in points.values() for t in zip(*series, strict=True)]
    inside = [t for t in triples if near[0] <= t[0] <= near[1] and t[1] <= most]
    for axis, shown in ((whole, [t for t in triples if t[1] <= most]), (close, inside)):
        axis.axhline(0, color=COLOURS["grey"], linestyle="--", linewidth=1, label="float")
        best = pareto([t[:2] for t in shown])
        axis.plot(*zip(*best, strict=True), color=COLOURS["grey"], linewidth=4, alpha=0.4,
                  label="Pareto front")  # fmt: skip
        for label, series in points.items():
            kept = [t for t in zip(*series, strict=True) if t in shown]
            for bits, nats, error in kept:
                axis.errorbar(bits, nats, 2 * error, linestyle="none", capsize=2, markersize=5,
                              **styles[label])  # fmt: skip
            axis.plot([], [], linestyle="none", label=label, **styles[label])
        axis.set_xlabel("measured bits per weight")
    whole.set_ylabel("nats lost per token (bars: 2 errors)")
    whole.set_title("all rows", fontsize=10)
    close.set_title(f"{near[0]:g} to {near[1]:g} bits", fontsize=10)
    if left_out := sum(t[1] > most for t in triples):
        whole.text(0.98, 0.97, f"{left_out} above {most:g} nats", ha="right", va="top", fontsize=8,
                   transform=whole.transAxes)  # fmt: skip
    handles, labels = whole.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=5)
    return figure


@styled
def ranks(places: Mapping[str, tuple[int, int]], titles: tuple[str, str]) -> Figure:
    """The rank of each row on one text and on another, joined by a line; red where it moves by 2 or more."""
    figure, axis = new_figure(width=7.0, height=1.0 + 0.24 * len(places))
    for label, (one, other) in places.items():
        colour = COLOURS["red"] if abs(one - other) >= 2 else COLOURS["blue"]
        axis.plot([0, 1], [one, other], marker="o", markersize=4, linewidth=1, color=colour)
        axis.text(-0.04, one, label, ha="right", va="center", fontsize=8)
        axis.text(1.04, other, label, ha="left", va="center", fontsize=8)
    axis.set_xlim(-0.8, 1.8)
    axis.invert_yaxis()
    axis.set_xticks([0, 1], titles)
    axis.set_ylabel("rank by nats lost")
    axis.grid(axis="x", visible=False)
    return figure
