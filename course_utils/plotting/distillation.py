"""Figures of distillation: what a teacher says, who learns what from whom, and where two divergences lead."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from torch import Tensor

from course_utils.plotting.diagrams.drawing import arrow, box, canvas
from course_utils.plotting.style import COLOURS, new_figure, series_styles, styled


@styled
def soft_targets(panels: Mapping[str, Tensor], words: Sequence[str], label: int) -> Figure:
    """Probabilities of `words`, one axis a panel: `panels[title]` is `[words]`; `label` is the text's own.

    The bar of the label is orange. For `distillation/distillation_demo`. Raises `ValueError` for a panel
    of another length.
    """
    figure, axes = new_figure(
        1, len(panels), height=0.8 + 0.27 * len(words), width=9, squeeze=False, sharey=True
    )
    for axis, (title, probabilities) in zip(axes[0], panels.items(), strict=True):
        if probabilities.shape != (len(words),):
            raise ValueError(f"{title}: {tuple(probabilities.shape)} for {len(words)} words")
        colours = [COLOURS["orange" if i == label else "blue"] for i in range(len(words))]
        axis.barh(range(len(words)), probabilities.tolist(), color=colours)
        for place, value in enumerate(probabilities.tolist()):
            axis.text(value, place, f" {value:.3f}", va="center", fontsize=8)
        axis.set_yticks(
            range(len(words)), [f"\N{OPEN BOX}{w[1:]}" if w[:1] == " " else w for w in words]
        )
        axis.set_xlim(0, 1.28 * max(float(p.max()) for p in panels.values()))
        axis.grid(axis="y", visible=False)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("probability")
    axes[0][0].invert_yaxis()
    return figure


@styled
def two_losses() -> Figure:
    """Where a student's two losses come from: the teacher's softened probabilities, and the text.

    Solid arrows carry values forward, the dashed one the gradient: to the student alone. Hinton et al. 2015,
    arXiv 1503.02531. For `distillation/distillation_demo`.
    """
    figure, axis = new_figure(height=3.2)
    canvas(axis, 12, 4)
    blue, green, orange, red = (COLOURS[name] for name in ("blue", "green", "orange", "red"))
    box(axis, 1.0, 2.0, 1.7, 0.9, "text\n[tokens]", COLOURS["grey"])
    box(axis, 3.5, 3.3, 2.0, 0.9, "teacher\nfrozen, eval()", blue)
    box(axis, 3.5, 1.5, 2.0, 0.9, "student\ntrained", green)
    box(axis, 6.5, 3.3, 2.1, 0.9, "P = softmax(v / T)", blue)
    box(axis, 6.5, 1.9, 2.1, 0.8, "Q = softmax(z / T)", green)
    box(axis, 6.5, 0.8, 2.1, 0.8, "softmax(z)", green)
    box(axis, 9.5, 2.6, 2.0, 0.9, "T² KL(P || Q)\nsoft loss", orange)
    box(axis, 9.5, 0.8, 2.0, 0.9, "cross-entropy\nhard loss", orange)
    box(axis, 11.5, 1.7, 0.9, 0.8, "mix", red)
    arrow(axis, (1.85, 2.2), (2.5, 3.1))
    arrow(axis, (1.85, 1.9), (2.5, 1.6))
    arrow(axis, (4.5, 3.3), (5.45, 3.3))
    axis.text(4.97, 3.42, "logits v", ha="center", fontsize=8)
    arrow(axis, (4.5, 1.65), (5.45, 1.9))
    arrow(axis, (4.5, 1.4), (5.45, 0.9))
    axis.text(4.8, 1.98, "logits z", ha="center", fontsize=8)
    arrow(axis, (7.55, 3.2), (8.5, 2.8))
    arrow(axis, (7.55, 2.0), (8.5, 2.4))
    arrow(axis, (7.55, 0.8), (8.5, 0.8))
    arrow(axis, (10.5, 2.4), (11.1, 2.05))
    arrow(axis, (10.5, 1.0), (11.1, 1.4))
    axis.plot([1.0, 1.0, 9.5], [1.55, 0.12, 0.12], color=COLOURS["grey"], linewidth=1)
    arrow(axis, (9.5, 0.12), (9.5, 0.34), COLOURS["grey"])
    axis.text(6.5, 0.16, "the next token of the text: the label", ha="center", fontsize=8)
    axis.plot([11.5, 11.5, 3.5], [1.28, -0.2, -0.2], color=red, linestyle="--", linewidth=1)
    arrow(axis, (3.5, -0.2), (3.5, 1.04), red, linestyle="--")
    axis.text(6.5, -0.42, "gradient, to the student alone", ha="center", fontsize=8, color=red)
    axis.set_ylim(-0.5, 4)
    return figure


@styled
def gradient_against_temperature(
    temperatures: Sequence[float], norms: Mapping[str, Sequence[float]]
) -> Figure:
    """Norms of a gradient over the temperature, both axes logarithmic; a line a label.

    For `distillation/distillation_demo`.
    """
    figure, axis = new_figure(height=3.2, width=7)
    for (label, values), style in zip(
        norms.items(), series_styles(norms, "marker").values(), strict=True
    ):
        axis.plot(temperatures, values, label=label, **style)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(temperatures, [f"{t:g}" for t in temperatures])
    axis.set_xlabel("temperature T")
    axis.set_ylabel("norm of the gradient of the logits")
    axis.legend(fontsize=8)
    return figure


@styled
def fits(x: Tensor, teacher: Tensor, students: Mapping[str, Tensor]) -> Figure:
    """Distributions over `x` `[n]`: the teacher's as an area, and each student's as a line.

    For `distillation/distillation_demo`.
    """
    figure, axis = new_figure(height=3.0, width=7)
    axis.fill_between(
        x.numpy(), teacher.numpy(), color=COLOURS["grey"], alpha=0.35, label="teacher"
    )
    for (label, values), style in zip(
        students.items(), series_styles(students, "linestyle").values(), strict=True
    ):
        axis.plot(x.numpy(), values.numpy(), label=label, **style)
    axis.set_xlabel("outcome")
    axis.set_ylabel("probability")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    return figure
