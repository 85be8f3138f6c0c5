"""Figures of solutions step by step: what a step is computed from, where it breaks, who solves what."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from course_utils.plotting.diagrams.drawing import arrow, canvas, cell, refuse_above
from course_utils.plotting.style import COLOURS, new_figure, series_styles, styled

PALE, RIGHT, WRONG, UNCHECKED = "#E5E5E5", "#8FC1DE", "#EBAE8A", "#F7F7F7"
MAX_SYMBOLS = 13


@styled
def one_step_or_all(problem: str, steps: str) -> Figure:
    """What each symbol written is computed from: with steps (left), and the answer alone (right).

    `problem` is a chain such as "7+5-3", `steps` its digits, "729". For
    `distillation/reasoning_distillation`. Raises `ValueError` for more than 13 symbols, and for steps that
    are not one for each digit of the problem.
    """
    refuse_above(MAX_SYMBOLS, len(problem), "symbols", "show the idea with fewer")
    if len(steps) != len(problem[::2]):
        raise ValueError(
            f"{problem!r} has {len(problem[::2])} digits, and {len(steps)} steps are given"
        )
    figure, axes = new_figure(1, 2, height=2.6)
    for axis, title in zip(axes, ("with steps", "answer alone"), strict=True):
        canvas(axis, len(problem) + 1.0, 4.2)
        axis.set_title(title, fontsize=10)
        for place, symbol in enumerate(problem):
            cell(axis, place + 0.5, 2.7, PALE, symbol, fontsize=10)
    with_steps, alone = axes
    for number, step in enumerate(steps):
        x = 2 * number + 0.5
        cell(with_steps, x, 0.6, RIGHT, step, fontsize=10)
        arrow(with_steps, (x + 0.5, 2.65), (x + 0.5, 1.7))
        if number:
            arrow(with_steps, (x - 0.5, 2.65), (x + 0.3, 1.7), COLOURS["grey"])
            arrow(with_steps, (x - 0.95, 1.1), (x - 0.05, 1.1), COLOURS["red"])
    x = 2 * (len(steps) - 1) + 0.5
    cell(alone, x, 0.6, RIGHT, steps[-1], fontsize=10)
    for place in range(len(problem)):
        arrow(alone, (place + 1, 2.65), (x + 0.5, 1.7), COLOURS["grey"])
    return figure


@styled
def written_steps(lines: Mapping[str, tuple[str, str, int | None]]) -> Figure:
    """What several models wrote behind one problem each, a row for each label, a cell for each symbol.

    `lines[label]` is (problem, what was written, number of the first wrong symbol or None). Symbols before
    that number are blue, that one is orange, and those after it white: a step that follows a wrong one says
    nothing about the answer. For `distillation/reasoning_distillation`. Raises `ValueError` for a problem of
    more than 13 symbols.
    """
    left, longest = 5.2, max(len(problem) for problem, _, _ in lines.values())
    refuse_above(MAX_SYMBOLS, longest, "symbols", "show a shorter problem")
    width = left + longest + 1.2 + max(len(written) for _, written, _ in lines.values()) + 0.3
    figure, axis = new_figure(height=0.42 * len(lines) + 0.3, width=0.42 * width)
    canvas(axis, width, 1.15 * len(lines))
    for row, (label, (problem, written, wrong)) in enumerate(reversed(lines.items())):
        y = 1.15 * row + 0.08
        axis.text(left - 0.3, y + 0.5, label, ha="right", va="center", fontsize=9)
        for place, symbol in enumerate(problem):
            cell(axis, left + place, y, PALE, symbol, fontsize=9)
        for place, symbol in enumerate(written):
            late = wrong is not None and place >= wrong
            colour = RIGHT if not late else WRONG if place == wrong else UNCHECKED
            square = cell(axis, left + longest + 1.0 + place, y, colour, symbol, fontsize=9)
            if late and place > wrong:
                square.set_edgecolor(COLOURS["grey"])
        if wrong is not None and wrong >= len(written):  # it stopped where a symbol was due
            cell(axis, left + longest + 1.0 + len(written), y, WRONG, "?", fontsize=9)
    return figure


@styled
def solved_by_length(
    curves: Mapping[str, Mapping[int, tuple[float, float, float]]], trained: Sequence[int]
) -> Figure:
    """Share of problems solved against their length, with intervals: `curves[label][length]`.

    A value is (share, low, high). Lengths that nobody was trained on lie on a grey ground, and the dashed
    line is chance for ten digits. For `distillation/reasoning_distillation`.
    """
    figure, axis = new_figure(height=3.8)
    styles = series_styles(curves, "marker", "linestyle")
    for number, (label, of) in enumerate(curves.items()):
        shift = 0.05 * (number - (len(curves) - 1) / 2)
        places = [length + shift for length in of]
        shares = [share for share, _, _ in of.values()]
        below = [max(0.0, share - low) for share, low, _ in of.values()]
        above = [max(0.0, high - share) for share, _, high in of.values()]
        axis.errorbar(places, shares, yerr=[below, above], capsize=2, linewidth=1.2,
                      markersize=5, label=label, **styles[label])  # fmt: skip
    _held_out(axis, trained, max(max(of) for of in curves.values()))
    axis.axhline(0.1, color="black", linestyle="--", linewidth=0.8, label="chance")
    axis.set_ylim(-0.03, 1.05)
    axis.set_xlabel("operations in the problem")
    axis.set_ylabel("share of problems solved")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _held_out(axis: Axes, trained: Sequence[int], longest: int) -> None:
    axis.axvspan(max(trained) + 0.5, longest + 0.5, color="#EEEEEE", zorder=0)
    axis.text(max(trained) + 0.6, 1.0, "never trained on", fontsize=8, va="center")
    axis.set_xticks(range(min(trained), longest + 1))
    axis.set_xlim(min(trained) - 0.5, longest + 0.5)
