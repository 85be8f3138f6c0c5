"""Walks over a model's blocks."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from course_utils.plotting.diagrams.drawing import arrow, canvas, refuse_above
from course_utils.plotting.style import COLOURS, new_figure, styled

MAX_BLOCKS = 6


@styled
def block_walk(n_blocks: int = 4) -> Figure:
    """Block-by-block calibration in its first three steps: which blocks made the inputs of the next one.

    On the left the calibration text passes the blocks that are quantized already (GPTQ), on the right the
    float ones (AWQ). For `chronology/gptq_demo` and `chronology/awq_demo`. Raises ValueError for fewer
    than 3 or more than 6 blocks.
    """
    if n_blocks < 3:
        raise ValueError(f"three steps need 3 blocks, got {n_blocks}")
    refuse_above(MAX_BLOCKS, n_blocks, "blocks", "show the idea with fewer")
    figure, axes = new_figure(1, 2, height=3.4)
    for axis, quantized in zip(axes, (True, False), strict=True):
        canvas(axis, n_blocks + 0.8, 4.0)
        prefix = "quantized" if quantized else "float"
        axis.set_title(f"{prefix} prefix: inputs come from {prefix} blocks", fontsize=10)
        for step in range(3):
            _walk(axis, step, n_blocks, 3.4 - 1.2 * step, quantized)
    handles = [
        axes[0].plot([], [], "o", color=colour, markerfacecolor=face, markersize=9, label=label)[0]
        for colour, face, label in (
            (COLOURS["orange"], COLOURS["orange"], "quantized"),
            (COLOURS["blue"], "white", "float"),
            (COLOURS["blue"], COLOURS["sky"], "being calibrated: statistics, then codes"),
        )
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _walk(axis: Axes, step: int, n_blocks: int, y: float, quantized: bool) -> None:
    """One step: the blocks before `step` are done, `step` is being calibrated, the rest is to come."""
    blue, orange, grey = (COLOURS[name] for name in ("blue", "orange", "grey"))
    axis.text(0, y, f"step {step + 1}:\n   text", va="center", fontsize=8)
    for block in range(n_blocks):
        x, reached = 1.4 + block, block <= step
        way = orange if quantized and block > 0 else blue
        arrow(axis, (x - 0.78 if block else x - 0.75, y), (x - 0.2, y), way if reached else grey,
              linewidth=2.0 if reached else 0.8)  # fmt: skip
        done = block < step and quantized
        face = orange if done else COLOURS["sky"] if block == step else "white"
        edge = orange if done else blue if reached else grey
        axis.plot(x, y, "o", color=edge, markerfacecolor=face, markersize=13)
        axis.text(x, y, str(block + 1), ha="center", va="center", fontsize=8)
        if block < step and not quantized:  # the codes are kept, and not used on the way
            axis.plot(x, y - 0.52, "o", color=orange, markersize=9)
            axis.plot([x, x], [y - 0.2, y - 0.38], color=orange, linestyle=":")
