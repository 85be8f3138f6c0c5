"""Matrices as coloured, numbered cells, and as a heatmap."""

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from course_utils.plotting.diagrams.drawing import (
    DIVERGING,
    DONE,
    SEQUENTIAL,
    arrow,
    canvas,
    cell,
    decimals,
    refuse_above,
    signed,
)
from course_utils.plotting.style import COLOURS, new_figure, styled

MAX_ROWS, MAX_COLUMNS = 8, 6
MAX_STEP_ROWS, MAX_STEP_COLUMNS, STEPS = 4, 5, 3
MAX_TOKENS, MAX_FEATURES = 256, 600  # about one pixel each


@styled
def four_matrices(W: Tensor, codes: Tensor, reconstruction: Tensor) -> Figure:
    """A small matrix four times: its floats, their codes, what the codes stand for, and the error.

    All three are `[out, in]`, at most 8 by 6. Float and reconstruction share one colour scale, from
    blue (negative) to red; the error has its own. For `foundations/linear_mapping`, and wherever a
    method is first shown by hand. Raises ValueError for other shapes.
    """
    for name, matrix in (("codes", codes), ("reconstruction", reconstruction)):
        if matrix.shape != W.shape:
            raise ValueError(f"{name} {tuple(matrix.shape)} are not of W's shape {tuple(W.shape)}")
    _refuse_matrix(W, MAX_ROWS, MAX_COLUMNS)
    W, reconstruction = W.float(), reconstruction.float()
    error = W - reconstruction
    reach = max(float(W.abs().max()), float(reconstruction.abs().max()))
    narrow = W.shape[1] > 4  # cells hold fewer digits
    places = decimals(W, 2 if narrow else 3)
    span = Normalize(int(codes.min()), int(codes.max()))
    panels = {
        "float W": (W, places, _diverging(reach)),
        "integer codes q": (codes, 0, lambda code: SEQUENTIAL(0.8 * span(code))),
        "reconstruction S (q \N{MINUS SIGN} Z)": (reconstruction, places, _diverging(reach)),
        "error, W \N{MINUS SIGN} S (q \N{MINUS SIGN} Z)": (
            error, decimals(error, 2), _diverging(float(error.abs().max()))
        ),
    }  # fmt: skip
    figure, axes = new_figure(1, 4, height=0.5 + 2.1 * len(W) / W.shape[1])
    figure.get_layout_engine().set(wspace=0.05)
    for axis, (title, (matrix, digits, colour_of)) in zip(axes, panels.items(), strict=True):
        canvas(axis, matrix.shape[1], len(matrix))
        axis.set_aspect("equal")
        axis.set_title(title, fontsize=9)
        for i, row in enumerate(matrix.tolist()):
            for j, value in enumerate(row):
                cell(axis, j, len(matrix) - 1 - i, colour_of(value), signed(value, digits),
                     fontsize=7.5 if narrow else 8.5)  # fmt: skip
    return figure


@styled
def gptq_steps(W: Tensor, Q: Tensor, U: Tensor) -> Figure:
    """GPTQ's first three columns: each is rounded, and its error moves the columns to its right.

    `W` `[out, in]` are the float weights, `Q` `[out, in]` the values that the columns are rounded to, one
    after the other, and `U` `[in, in]` the upper factor of the inverse Hessian. Step i leaves the error
    E = (W_i - Q_i) / U_ii, and column j to the right moves by -E U_ij (Frantar et al. 2022, arXiv
    2210.17323, algorithm 1). A cell holds its weight after the step, and below it what the step added.
    At most 4 by 5, at least 3 columns. For `chronology/gptq_demo`. Raises ValueError for other shapes.
    """
    if Q.shape != W.shape or U.shape != (W.shape[-1], W.shape[-1]):
        raise ValueError(
            f"W {tuple(W.shape)}, Q {tuple(Q.shape)} and U {tuple(U.shape)} have to be [out, in], "
            "[out, in] and [in, in]"
        )
    _refuse_matrix(W, MAX_STEP_ROWS, MAX_STEP_COLUMNS)
    if W.shape[1] < STEPS:
        raise ValueError(f"{STEPS} steps need {STEPS} columns, W has {W.shape[1]}")
    before, after, digits = W.clone(), W.clone(), decimals(W)
    steps = []
    for i in range(STEPS):
        error = (before[:, i] - Q[:, i]) / U[i, i]  # [out]
        after = before.clone()
        after[:, i] = Q[:, i]
        after[:, i + 1 :] -= error[:, None] * U[i, i + 1 :]
        steps.append((i, after, after - before))
        before = after
    reach = max(float(change.abs().max()) for *_, change in steps)
    rows, columns = W.shape
    figure, axes = new_figure(1, STEPS, height=0.75 + 2.9 * (rows + 1) / columns)
    figure.get_layout_engine().set(wspace=0.04, h_pad=0.1)
    for axis, (i, after, change) in zip(axes, steps, strict=True):
        canvas(axis, columns, rows + 1)
        axis.set_aspect("equal")
        axis.set_title(f"step {i + 1}: round column {i + 1}", fontsize=10)
        _step(axis, i, after, change, _diverging(reach), digits)
    figure.supxlabel(
        "black frame: the column being rounded; grey: done; small: what this step added", fontsize=9
    )
    return figure


def _step(axis: Axes, i: int, after: Tensor, change: Tensor, colour_of, digits: int) -> None:
    rows, columns = after.shape
    for r in range(rows):
        for j in range(columns):
            value, moved = float(after[r, j]), float(change[r, j])
            text = signed(value, digits)
            if j >= i:
                text += f"\n({'+' if moved > 0 else ''}{signed(moved, digits)})"
            cell(axis, j, rows - 1 - r, DONE if j < i else colour_of(moved), text)
    axis.add_patch(Rectangle((i, 0), 1, rows, fill=False, edgecolor="black", linewidth=2))
    for j in range(i + 1, columns):
        arrow(axis, (i + 0.5, rows + 0.05), (j + 0.5, rows + 0.05), COLOURS["red"],
              connectionstyle=f"arc3,rad=-{0.9 / (j - i + 1):.2f}")  # fmt: skip
    if i + 1 < columns:
        axis.text(columns, rows + 0.95, "the error moves right", ha="right", va="top",
                  fontsize=8, color=COLOURS["red"])  # fmt: skip


@styled
def activation_heatmap(x: Tensor, outliers: list[int]) -> Figure:
    """Activations `x` `[tokens, features]` as |x| on a logarithmic colour scale, outlier columns marked.

    `outliers` are the features to mark; the six largest of them are named. At most 256 tokens and 600
    features, so that no column is thinner than a pixel: pass a slice of wider ones. For
    `chronology/llm_int8_demo`. Raises ValueError for other shapes and for features that `x` lacks.
    """
    if x.ndim != 2:
        raise ValueError(f"x is [tokens, features], got {tuple(x.shape)}")
    refuse_above(MAX_TOKENS, len(x), "tokens", "pass fewer rows")
    refuse_above(MAX_FEATURES, x.shape[1], "features", "pass a slice that holds the outliers")
    beyond = [feature for feature in outliers if not 0 <= feature < x.shape[1]]
    if beyond:
        raise ValueError(
            f"feature {beyond[0]} is not one of {x.shape[1]}: count them in what is drawn"
        )
    sizes = x.abs().float()  # [tokens, features]
    positive = sizes[sizes > 0]
    if not len(positive):
        raise ValueError("x holds nothing but zeros: there is nothing to see in it")
    # 1% of the values lie below the scale: a few near zero would take up half of it.
    norm = LogNorm(float(positive.quantile(0.01)), float(positive.max()), clip=True)
    figure, axis = new_figure(height=3.2)
    image = axis.imshow(
        sizes.clamp(min=norm.vmin).numpy(), aspect="auto", norm=norm, cmap=SEQUENTIAL,
        interpolation="nearest",
    )  # fmt: skip
    axis.grid(False)
    axis.set_xlabel("feature")
    axis.set_ylabel("token")
    figure.colorbar(image, ax=axis, label="|x|", pad=0.01)
    height = axis.get_xaxis_transform()
    axis.plot(outliers, [1.03] * len(outliers), "v", color=COLOURS["red"], markersize=6,
              transform=height, clip_on=False)  # fmt: skip
    largest = sorted(outliers, key=lambda feature: -float(sizes[:, feature].max()))[:6]
    for place, name in _apart(sorted(largest), 0.05 * x.shape[1], x.shape[1]):
        axis.text(place, 1.07, str(name), transform=height, ha="center", va="bottom", fontsize=8,
                  color=COLOURS["red"])  # fmt: skip
    return figure


def _apart(places: list[int], gap: float, end: float) -> list[tuple[float, int]]:
    """(where to write, what) for labels at `places` in ascending order, at least `gap` apart."""
    written: list[float] = []
    for place in places:
        written.append(max(place, written[-1] + gap) if written else place)
    over = max(0.0, written[-1] - end) if written else 0.0
    return [(place - over, name) for place, name in zip(written, places, strict=True)]


def _refuse_matrix(W: Tensor, rows: int, columns: int) -> None:
    if W.ndim != 2 or W.numel() == 0:
        raise ValueError(f"W is [out, in], got {tuple(W.shape)}")
    refuse_above(rows, len(W), "rows", "draw a corner of the matrix")
    refuse_above(columns, W.shape[1], "columns", "draw a corner of the matrix")


def _diverging(reach: float):
    """The colour of a value between -reach and reach."""
    reach = reach or 1.0  # all zero: the middle colour
    return lambda value: DIVERGING(0.5 + 0.4 * value / reach)
