"""Figures of the way to two bits: codebooks of pairs, a moving window, rungs of a ladder, its front."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from torch import Tensor

from course_utils.plotting.diagrams.drawing import DIVERGING, canvas, cell, refuse_above, signed
from course_utils.plotting.style import COLOURS, new_figure, series_styles, styled

MAX_BITS, MAX_WINDOWS = 16, 6


@styled
def codebooks_of_pairs(x: Tensor, codebooks: Mapping[str, Tensor]) -> Figure:
    """Pairs of numbers `x` `[n, 2]` under several codebooks `codebooks[title]` `[entries, 2]`, side by side.

    For `chronology/tpoti_two_bit_ladder`. Raises ValueError for vectors of another length.
    """
    if x.ndim != 2 or x.shape[1] != 2:
        raise ValueError(f"x {tuple(x.shape)}: a plane shows pairs [n, 2]")
    figure, axes = new_figure(1, len(codebooks), height=3.4, squeeze=False)
    for axis, (title, book) in zip(axes[0], codebooks.items(), strict=True):
        axis.plot(*x.T.tolist(), ".", color=COLOURS["sky"], markersize=2, label="pairs of weights")
        axis.plot(*book.T.tolist(), "o", color=COLOURS["red"], markersize=6, label="entries")
        axis.set_aspect("equal")
        axis.set_xlim(-3.5, 3.5)
        axis.set_ylim(-3.5, 3.5)
        axis.set_title(title)
        axis.set_xlabel("first weight of a pair")
    axes[0][0].set_ylabel("second weight")
    axes[0][0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
    return figure


@styled
def moving_window(stream: Sequence[int], state_bits: int, n_bits: int, values: Tensor) -> Figure:
    """A stream of bits, and below it each window of `state_bits`, its state and the state's value.

    `values` `[2^state_bits]` are those of the states; each window lies `n_bits` further. At most 16 bits and
    6 windows. For `chronology/tpoti_two_bit_ladder`.
    """
    windows = (len(stream) - state_bits) // n_bits + 1
    refuse_above(MAX_BITS, len(stream), "bits", "show the beginning")
    refuse_above(MAX_WINDOWS, windows, "windows", "show the beginning")
    figure, axis = new_figure(height=0.7 + 0.42 * (windows + 1.4))
    canvas(axis, len(stream) + 7.5, windows + 1.6)
    axis.set_aspect("equal")
    top, reach = windows + 0.4, float(values.abs().max())
    axis.text(0, top + 0.5, "stored bits", ha="left", va="center", fontsize=9)
    left = 3.2
    for j, bit in enumerate(stream):
        cell(axis, left + j, top, "#003A5C" if bit else "#CFE6F5", str(bit))
    for t in range(windows):
        bits, y = stream[t * n_bits : t * n_bits + state_bits], windows - 1 - t
        for i, bit in enumerate(bits):
            kept = t > 0 and i < state_bits - n_bits
            colour = "#D9D9D9" if kept else "#003A5C" if bit else "#CFE6F5"
            cell(axis, left + t * n_bits + i, y, colour, str(bit))
        state = int("".join(map(str, bits)), 2)
        value = float(values[state])
        axis.text(0, y + 0.5, f"weight {t + 1}", ha="left", va="center", fontsize=9)
        axis.text(left + len(stream) + 0.3, y + 0.5, f"state {state}", va="center", fontsize=9)
        colour = DIVERGING(0.5 + 0.4 * value / reach)
        cell(axis, left + len(stream) + 2.8, y, colour, signed(value, 1))
    return figure


@styled
def distortions(
    levels: Mapping[str, Sequence[float]], bits: Sequence[int], points: Mapping[str, float]
) -> Figure:
    """Squared error on normal weights, a curve of `levels[label]` over `bits`, `points[label]` at 2 bits.

    Errors are shares of the weights' square, on a logarithmic axis; the least curve should be the limit. For
    `chronology/tpoti_two_bit_ladder`.
    """
    figure, axis = new_figure(height=3.8)
    styles = series_styles([*levels, *points], "marker")
    for label, errors in levels.items():
        axis.plot(bits, errors, label=label, **styles[label])
    for label, error in points.items():
        axis.plot(2, error, linestyle="none", markersize=8, label=label, **styles[label])
    axis.set_yscale("log")
    axis.set_xticks(list(bits))
    axis.set_xlabel("bits per weight (codes alone)")
    axis.set_ylabel("error (share of the square)")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


@styled
def rungs(losses: Mapping[str, tuple[float, float]], groups: Mapping[str, str]) -> Figure:
    """A bar for each rung: `losses[label] = (nats lost, standard error)`, coloured by `groups[label]`.

    A bar's line reaches 2 standard errors to each side. For `chronology/tpoti_two_bit_ladder`.
    """
    figure, axis = new_figure(height=1.1 + 0.27 * len(losses))
    styles = series_styles(groups[label] for label in losses)
    named = set()
    for place, (label, (nats, error)) in enumerate(losses.items()):
        group = groups[label]
        axis.barh(place, nats, xerr=2 * error, capsize=2, height=0.7, edgecolor="white",
                  label=None if group in named else group, **styles[group])  # fmt: skip
        axis.text(max(nats, 0) + 2 * error, place, f"  {nats:.3f}", va="center", fontsize=8)
        named.add(group)
    axis.set_yticks(range(len(losses)), list(losses), fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.12)
    axis.set_xlabel("nats lost per token (lines: 2 standard errors)")
    axis.legend(fontsize=8, loc="lower right")
    return figure


@styled
def front(points: Mapping[str, tuple[list[float], list[float], list[float]]]) -> Figure:
    """Nats lost against bits: `points[label] = (bits, nats, standard errors)`, and the Pareto front.

    The grey line joins the points that no other beats in both. Bars reach 2 standard errors. For
    `chronology/tpoti_two_bit_ladder`.
    """
    figure, axis = new_figure(height=4.0)
    styles = series_styles(points, "marker")
    axis.axhline(0, color=COLOURS["grey"], linestyle="--", linewidth=1, label="float")
    everything = [
        (b, n) for bits, nats, _ in points.values() for b, n in zip(bits, nats, strict=True)
    ]
    best = pareto(everything)
    axis.plot(*zip(*best, strict=True), color=COLOURS["grey"], linewidth=4, alpha=0.4,
              label="Pareto front")  # fmt: skip
    for label, (bits, nats, errors) in points.items():
        bars = [2 * error for error in errors]
        axis.errorbar(bits, nats, bars, linestyle="none", capsize=3, label=label, **styles[label])
    axis.set_ylim(-0.05, None)
    axis.set_xlabel("measured bits per weight")
    axis.set_ylabel("nats lost per token")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of pairs (bits, nats) those that no other beats or equals in both, by bits ascending."""
    best: list[tuple[float, float]] = []
    for bits, nats in sorted(set(points)):
        if not best or nats < best[-1][1]:
            best.append((bits, nats))
    return best
