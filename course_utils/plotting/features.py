"""Figures of feature distillation: what is compared with what, and how alike representations are."""

from collections.abc import Mapping

from matplotlib.figure import Figure
from torch import Tensor

from course_utils.plotting.diagrams.drawing import arrow, box, canvas
from course_utils.plotting.style import COLOURS, new_figure, styled


@styled
def matched_layers() -> Figure:
    """A teacher of four blocks and a student of two: which hidden states and attention scores are compared.

    TinyBERT's uniform map, arXiv 1909.10351. For `distillation/feature_distillation`.
    """
    figure, axis = new_figure(height=3.4)
    canvas(axis, 14, 4.2)
    blue, green, orange, red = (COLOURS[name] for name in ("blue", "green", "orange", "red"))
    rows = (("teacher", 3.4, blue, (3.6, 5.8, 8.0, 10.2)), ("student", 0.8, green, (5.8, 10.2)))
    for who, y, colour, places in rows:
        axis.text(0.0, y, who, va="center", fontsize=10, color=colour)
        box(axis, 1.9, y, 1.3, 0.8, "embed", colour)
        box(axis, 12.6, y, 1.4, 0.8, "softmax", colour)
        at = 2.55
        for number, x in enumerate(places, 1):
            box(axis, x, y, 1.3, 0.8, f"block {number}", colour)
            arrow(axis, (at, y), (x - 0.65, y))
            at = x + 0.65
        arrow(axis, (at, y), (11.9, y))
    for x, number in ((5.8, 1), (10.2, 2)):
        arrow(axis, (x, 1.25), (x, 2.95), orange, linestyle="--")
        axis.text(x - 0.1, 2.1, "attention", ha="right", va="center", fontsize=8, color=orange)
        arrow(axis, (x + 0.9, 0.85), (x + 0.9, 3.35), red, linestyle="--")
        said = f"hidden\nstate {number}"
        axis.text(x + 1.0, 2.1, said, ha="left", va="center", fontsize=8, color=red)
    arrow(axis, (12.6, 1.25), (12.6, 2.95), COLOURS["grey"], linestyle="--")
    axis.text(12.7, 2.1, "soft\ntargets", ha="left", va="center", fontsize=8)
    return figure


@styled
def similarity_maps(panels: Mapping[str, Tensor]) -> Figure:
    """Linear CKA of a teacher's hidden states (rows, 0 at the bottom) and a student's (columns), from 0 to 1.

    `panels[title]` is `[teacher's states, student's states]`. For `distillation/feature_distillation`.
    Raises `ValueError` for anything but a matrix.
    """
    figure, axes = new_figure(1, len(panels), height=3.6, width=2.9 * len(panels), squeeze=False)
    for axis, (title, values) in zip(axes[0], panels.items(), strict=True):
        if values.ndim != 2:
            raise ValueError(f"{title}: a map is a matrix, got {tuple(values.shape)}")
        axis.imshow(values.numpy(), cmap="viridis", vmin=0, vmax=1, origin="lower", aspect="auto")
        for row, of_row in enumerate(values.tolist()):
            for column, value in enumerate(of_row):
                colour = "black" if value > 0.6 else "white"
                axis.text(
                    column, row, f"{value:.2f}", ha="center", va="center", fontsize=9, color=colour
                )
        axis.set_xticks(range(values.shape[1]))
        axis.set_yticks(range(values.shape[0]))
        axis.grid(visible=False)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("student's hidden state")
    axes[0][0].set_ylabel("teacher's hidden state")
    return figure
