"""Diagram of ranges of activations: the codes that a few tokens get."""

from collections.abc import Mapping

from matplotlib import colormaps
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from torch import Tensor

from course_utils.plotting.diagrams.drawing import canvas, cell, refuse_above, signed
from course_utils.plotting.style import new_figure, styled

MAX_TOKENS, MAX_FEATURES, MAX_RANGES = 8, 6, 2


@styled
def codes_of_tokens(x: Tensor, codes: Mapping[str, Tensor]) -> Figure:
    """Activations `x` `[tokens, features]`, and beside them `codes[title]` of the same shape.

    Red is positive, blue negative, white zero; within a panel colours follow magnitudes, so that zeros
    stand out. At most 8 tokens, 6 features and 2 ranges. For `foundations/dynamic_range` and
    `foundations/smoothing`. Raises
    ValueError for more, and for codes of another shape.
    """
    refuse_above(MAX_TOKENS, len(x), "tokens", "show a few of them")
    refuse_above(MAX_FEATURES, x.shape[1], "features", "show a few of them")
    refuse_above(MAX_RANGES, len(codes), "ranges", "draw several figures")
    for title, q in codes.items():
        if q.shape != x.shape:
            raise ValueError(f"{title!r} has codes {tuple(q.shape)}, and x is {tuple(x.shape)}")
    panels = {"values x": (x.float(), 2)} | {t: (q.float(), 0) for t, q in codes.items()}
    figure, axes = new_figure(1, len(panels), height=0.6 + 0.36 * len(x))
    colours = colormaps["RdBu_r"]
    for axis, (title, (matrix, digits)) in zip(axes, panels.items(), strict=True):
        canvas(axis, matrix.shape[1], len(matrix))
        axis.set_title(title, fontsize=9)
        reach = max(float(matrix.abs().max()), 1.0)
        norm = SymLogNorm(
            1.0, vmin=-reach, vmax=reach
        )  # one huge value leaves colour to the others
        for i, row in enumerate(matrix.tolist()):
            for j, value in enumerate(row):
                text = signed(value, digits if abs(value) < 100 else 0)
                cell(axis, j, len(matrix) - 1 - i, colours(0.15 + 0.7 * float(norm(value))), text,
                     fontsize=8)  # fmt: skip
    return figure
