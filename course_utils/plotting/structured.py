"""Figures of structured pruning: a neuron that goes, and what each layer is worth."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from torch import Tensor

from course_utils.plotting.diagrams.drawing import (
    DIVERGING,
    DONE,
    canvas,
    cell,
    decimals,
    refuse_above,
    signed,
)
from course_utils.plotting.style import COLOURS, new_figure, styled

MAX_NEURONS, MAX_WIDTH = 6, 4


@styled
def neurons_removed(W_in: Tensor, W_out: Tensor, keep: Sequence[int]) -> Figure:
    """The two matrices of a small MLP, `[neurons, width]` and `[width, neurons]`, before and after.

    Rows and columns of neurons that go are grey; on the right is what is left. For
    `pruning/structured_pruning`. Raises ValueError for more than 6 neurons or a width above 4.
    """
    refuse_above(MAX_NEURONS, len(W_in), "neurons", "show the idea with few")
    refuse_above(MAX_WIDTH, W_in.shape[1], "features", "show the idea with few")
    reach = float(max(W_in.abs().max(), W_out.abs().max())) or 1.0
    digits = max(decimals(W.float(), 2) for W in (W_in, W_out))
    everything, kept = set(range(len(W_in))), sorted(keep)
    panels = [
        ("W_in: a row a neuron", W_in, everything, set(kept), 0),
        ("W_out: a column a neuron", W_out, everything, set(kept), 1),
        ("W_in, cut", W_in[kept], None, None, 0),
        ("W_out, cut", W_out[:, kept], None, None, 1),
    ]
    widths = [matrix.shape[1] + 0.6 for _, matrix, *_ in panels]
    figure, axes = new_figure(1, 4, height=2.9, gridspec_kw={"width_ratios": widths})
    tall = len(W_in)
    for axis, (title, matrix, before, stays, way) in zip(axes, panels, strict=True):
        canvas(axis, matrix.shape[1], tall)
        axis.set_aspect("equal")
        axis.set_title(title, fontsize=9)
        for i, row in enumerate(matrix.tolist()):
            for j, value in enumerate(row):
                gone = before is not None and (i, j)[way] not in stays
                colour = DONE if gone else DIVERGING(0.5 + 0.4 * value / reach)
                cell(axis, j, tall - 1 - i, colour, signed(value, digits))
    return figure


@styled
def layers_worth(
    influence: Sequence[float], losses: Sequence[float], errors: Sequence[float]
) -> Figure:
    """For each layer a score, and what the model loses without it; bars are 2 standard errors."""
    figure, (left, right) = new_figure(1, 2, height=3.2)
    places = range(len(influence))
    left.bar(places, influence, color=COLOURS["sky"], hatch="///", edgecolor="white")
    right.bar(places, losses, yerr=[2 * e for e in errors], capsize=4, color=COLOURS["orange"])
    left.set_ylabel("Block Influence (1 - cosine)")
    right.set_ylabel("nats lost without the layer")
    for axis in (left, right):
        axis.set_xticks(list(places), [str(place) for place in places])
        axis.set_xlabel("layer")
    return figure


@styled
def prune_and_recover(stages: Mapping[str, tuple[float, float]]) -> Figure:
    """Nats lost after each stage, `stages[label] = (nats, standard error)`; bars are 2 errors."""
    figure, axis = new_figure(height=0.5 * len(stages) + 1)
    labels = list(stages)
    values, errors = zip(*stages.values(), strict=True)
    axis.barh(labels, values, xerr=[2 * e for e in errors], capsize=4, color=COLOURS["sky"])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.axvline(0, color=COLOURS["grey"], linestyle="--", linewidth=1)
    axis.set_xlabel("nats per token lost against the unpruned model (bars: 2 standard errors)")
    return figure
