"""Figures of fine-tuning: a low-rank update, what a step holds in memory, and what merging keeps."""

from collections.abc import Mapping

import torch
from matplotlib.figure import Figure
from torch import Tensor

from course_utils.plotting.diagrams.drawing import DIVERGING, canvas, cell, signed
from course_utils.plotting.style import COLOURS, new_figure, series_styles, styled

MAX_SIDE = 6


@styled
def low_rank_update(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Figure:
    """`W` + `scaling` B A as coloured cells: W `[out, in]`, B `[out, rank]`, A `[rank, in]`, product and sum.

    One colour scale for all, from blue (negative) to red. Sides are at most 6. For `chronology/nf4_qlora`.
    Raises `ValueError` for other shapes.
    """
    (out, columns), rank = W.shape, len(A)
    if A.shape != (rank, columns) or B.shape != (out, rank) or max(out, columns) > MAX_SIDE:
        raise ValueError(
            f"W {tuple(W.shape)}, A {tuple(A.shape)} and B {tuple(B.shape)} have to be [out, in], [rank, in] "
            f"and [out, rank] with sides of at most {MAX_SIDE}"
        )
    update = scaling * B @ A
    panels = {
        "frozen W": W, "B, trained": B, "A, trained": A, f"{scaling:g} B A": update,
        f"W + {scaling:g} B A": W + update,
    }  # fmt: skip
    reach = max(float(matrix.abs().max()) for matrix in panels.values()) or 1.0
    gap, widths = 0.7, [matrix.shape[1] for matrix in panels.values()]
    figure, axis = new_figure(height=0.9 + 0.42 * out)
    canvas(axis, sum(widths) + gap * (len(widths) - 1), out + 0.8)
    axis.set_aspect("equal")
    left = 0.0
    signs = ["", "×", "=", "", ""]  # between B and A, and before their product
    for (title, matrix), sign in zip(panels.items(), signs, strict=True):
        rows, width = matrix.shape
        bottom = (out - rows) / 2
        places = next((p for p in range(3) if torch.equal(matrix.round(decimals=p), matrix)), 2)
        for i, row in enumerate(matrix.tolist()):
            for j, value in enumerate(row):
                colour = DIVERGING(0.5 + 0.4 * value / reach)
                cell(
                    axis, left + j, bottom + rows - 1 - i, colour, signed(value, places), fontsize=8
                )
        axis.text(left + width / 2, bottom + rows + 0.15, title, ha="center", fontsize=9)
        axis.text(left + width + gap / 2, out / 2, sign, ha="center", va="center", fontsize=12)
        left += width + gap
    return figure


@styled
def memory_bars(panels: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Figure:
    """Stacked bars of bytes, one axis a panel: `panels[title][bar][part] = bytes`, drawn in MB.

    The total is written beside each bar. For `chronology/nf4_qlora`.
    """
    figure, axes = new_figure(
        1, len(panels), height=2.6, width=9 if len(panels) > 1 else 7, squeeze=False
    )
    parts = list(dict.fromkeys(p for bars in panels.values() for bar in bars.values() for p in bar))
    styles = series_styles(parts, "hatch")
    for axis, (title, bars) in zip(axes[0], panels.items(), strict=True):
        for place, of_bar in enumerate(bars.values()):
            left = 0.0
            for part, nbytes in of_bar.items():
                axis.barh(place, nbytes / 1e6, left=left, label=part if place == 0 else None,
                          edgecolor="white", **styles[part])  # fmt: skip
                left += nbytes / 1e6
            axis.text(left, place, f" {left:,.0f}", va="center", fontsize=9)
        axis.set_yticks(range(len(bars)), list(bars))
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.margins(x=0.14)
        axis.set_title(title)
        axis.set_xlabel("MB")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(parts),
                  fontsize=8)  # fmt: skip
    return figure


@styled
def updates_in_half_steps(ratio: Tensor, changed: Mapping[str, Tensor]) -> Figure:
    """How large updates are, in half steps of their grid, and which of them change a code.

    `ratio` `[n]` is each weight's update over the half step in its direction; `changed[label]` (bool `[n]`)
    says whose code another rounding changed. On the left a histogram, on the right the share of changed
    codes among weights of like ratio, where there are at least 50. For `chronology/nf4_qlora`.
    """
    figure, (left, right) = new_figure(1, 2, height=3.2)
    ratio = ratio.float().clamp(min=1e-4)
    bins = torch.logspace(-3, 1, 33)
    left.hist(ratio.numpy(), bins=bins.numpy(), color=COLOURS["blue"])
    left.axvline(1, color=COLOURS["red"], linestyle="--")
    left.text(1, 1.01, "half a step", color=COLOURS["red"], fontsize=9, ha="center", va="bottom",
              transform=left.get_xaxis_transform())  # fmt: skip
    left.set_ylabel("weights")
    edges = torch.linspace(0, 2, 21)
    place = torch.bucketize(ratio, edges) - 1
    styles = series_styles(changed, "marker")
    for label, of_label in changed.items():
        shares = [
            (float(edges[i : i + 2].mean()), float(of_label[place == i].float().mean()))
            for i in range(len(edges) - 1)
            if int((place == i).sum()) >= 50
        ]
        right.plot(*zip(*shares, strict=True), label=label, **styles[label])
    right.axvline(1, color=COLOURS["red"], linestyle="--")
    right.set_ylim(-0.03, 1.05)
    right.set_ylabel("share of codes that change")
    right.legend(fontsize=8)
    left.set_xscale("log")
    for axis in (left, right):
        axis.set_xlabel("update / half step")
    return figure


@styled
def kept_against_scale(
    curves: Mapping[str, tuple[list[float], list[float]]], *, xlabel: str = "update times"
) -> Figure:
    """Share of an update that rounding keeps, against its size: `curves[label] = (scales, shares)`.

    The dashed line at 1 is an update that arrives whole. For `chronology/nf4_qlora`.
    """
    figure, axis = new_figure(height=3.2, width=7)
    axis.axhline(1, color=COLOURS["grey"], linestyle="--", linewidth=1, label="all of it")
    for label, style in series_styles(curves, "marker").items():
        axis.plot(*curves[label], label=label, **style)
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set_xlabel(xlabel)
    axis.set_ylabel("share of the update kept")
    axis.legend(fontsize=8)
    return figure
