"""Figures of ternary weights: where latent weights lie, how trits fill bytes, and sums of signs."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from course_utils.kernels.ternary import pack_trits
from course_utils.plotting.diagrams.drawing import arrow, box, canvas, cell, refuse_above, signed
from course_utils.plotting.style import COLOURS, new_figure, series_styles, styled

MAX_TERMS = 8
TRITS = {-1: "#8FC1DE", 0: "#E5E5E5", 1: "#EBAE8A"}  # pale blue, grey, pale red: as signs elsewhere
NAMES = {-1: "\N{MINUS SIGN}1", 0: "0", 1: "+1"}


@styled
def latent_weights(panels: Mapping[str, Tensor]) -> Figure:
    """Histograms of latent weights over their gamma, coloured by the code that each rounds to.

    `panels[title]` holds W / gamma, of any shape. Dashed lines stand at the thresholds, half a gamma on
    each side. Values beyond 3 are drawn at 3. For `chronology/bitnet_demo`.
    """
    figure, axes = new_figure(1, len(panels), height=3.0, squeeze=False, sharey=True)
    edges = torch.linspace(-3, 3, 61).numpy()
    for axis, (title, ratio) in zip(axes[0], panels.items(), strict=True):
        ratio = ratio.detach().float().flatten().clamp(-3, 3)
        codes = ratio.round().clamp(-1, 1)
        for code, colour in TRITS.items():
            share = (codes == code).float().mean().item()
            axis.hist(ratio[codes == code].numpy(), bins=edges, color=colour,
                      label=f"code {NAMES[code]}: {share:.0%}")  # fmt: skip
        for threshold in (-0.5, 0.5):
            axis.axvline(threshold, color="black", linestyle="--", linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("latent weight / gamma")
        axis.legend(fontsize=8, loc="upper left")
    axes[0][0].set_ylabel("weights")
    return figure


@styled
def twin_curves(
    curves: Mapping[str, Sequence[tuple[list[float], list[float]]]], ylabel: str
) -> Figure:
    """Two kinds of models, trained from several seeds: their curves, and the first less the second.

    `curves[kind]` holds `(millions of tokens, values)` of each seed, in the same order for both. The thick
    line on the right is the mean of the seeds. For `chronology/bitnet_demo`. Raises `ValueError` for
    another number of kinds than 2.
    """
    if len(curves) != 2:
        raise ValueError(f"twins are two kinds of models, got {len(curves)}: {', '.join(curves)}")
    figure, (left, right) = new_figure(1, 2, height=3.4)
    for (kind, of_kind), style in zip(
        curves.items(), series_styles(curves, "linestyle").values(), strict=True
    ):
        for seed, (tokens, values) in enumerate(of_kind):
            left.plot(tokens, values, linewidth=1.2, label=None if seed else kind, **style)
    differences = []
    for seed, ((tokens, first), (_, second)) in enumerate(zip(*curves.values(), strict=True)):
        differences.append([a - b for a, b in zip(first, second, strict=True)])
        right.plot(tokens, differences[-1], color=COLOURS["grey"], linewidth=1,
                   label=None if seed else "each seed")  # fmt: skip
    mean = torch.tensor(differences).mean(0).tolist()
    right.plot(tokens, mean, color="black", linewidth=2, label="mean of the seeds")
    right.axhline(0, color="black", linestyle="--", linewidth=0.8)
    left.set_ylabel(ylabel)
    right.set_ylabel(" less ".join(curves))
    for axis in (left, right):
        axis.set_xlabel("tokens seen (millions)")
        axis.legend(fontsize=8)
    return figure


@styled
def gaps_by_size(gaps: Mapping[int, Sequence[float]]) -> Figure:
    """What twins differ by in nats, over their size: a dot for each pair, the mean where there are several.

    `gaps[parameters]` holds the differences of the pairs of that size. Bars are one standard error of the
    mean. For `chronology/bitnet_demo`.
    """
    figure, axis = new_figure(height=3.2)
    for parameters, found in gaps.items():
        axis.plot([parameters] * len(found), found, "o", color=COLOURS["sky"], markersize=5)
        if len(found) > 1:
            pairs = torch.tensor(found, dtype=torch.float64)
            error = (pairs.std() / len(found) ** 0.5).item()
            axis.errorbar([parameters], [pairs.mean().item()], yerr=error, fmt="_", markersize=22,
                          capsize=5, color=COLOURS["red"])  # fmt: skip
    axis.axhline(0, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlim(min(gaps) / 1.5, max(gaps) * 1.5)
    axis.set_xticks(list(gaps), [f"{parameters / 1e6:.1f} M" for parameters in gaps])
    axis.minorticks_off()
    axis.set_xlabel("parameters")
    axis.set_ylabel("ternary less float\n(nats per token)")
    return figure


@styled
def signed_sum(x: Tensor, trits: Tensor) -> Figure:
    """One output of a ternary layer: int8 codes `x` `[n]` go to the sum of +1, of -1, or nowhere.

    At most 8 terms. The values in the boxes are computed from those given. For `chronology/bitnet_demo`.
    Raises `ValueError` for more terms, and for other shapes.
    """
    if x.ndim != 1 or x.shape != trits.shape:
        raise ValueError(f"x and trits are [n] both, got {tuple(x.shape)} and {tuple(trits.shape)}")
    refuse_above(MAX_TERMS, len(x), "terms", "show the idea with fewer")
    figure, axis = new_figure(height=3.2)
    n, (plus, minus) = len(x), ((2.2, 0.75), (5.8, 0.75))
    canvas(axis, 12.6, 4.2)
    left, x = (8 - n) / 2, x.int()
    axis.text(8.25, 3.65, "inputs, int8", va="center", fontsize=9)
    axis.text(8.25, 2.75, "weights, trits", va="center", fontsize=9)
    for i, (code, trit) in enumerate(zip(x.tolist(), trits.tolist(), strict=True)):
        cell(axis, left + i, 3.15, "#F7F7F7", signed(code, 0), fontsize=10)
        cell(axis, left + i, 2.1, TRITS[trit], NAMES[trit], fontsize=10)
        if trit:
            target = plus if trit > 0 else minus
            end = (target[0] + 0.13 * (left + i + 0.5 - target[0]), target[1] + 0.45)
            arrow(axis, (left + i + 0.5, 2.08), end, COLOURS["red" if trit > 0 else "blue"])
    added, taken = int(x[trits == 1].sum()), int(x[trits == -1].sum())
    second = signed(taken, 0) if taken >= 0 else f"({signed(taken, 0)})"
    box(axis, *plus, 2.2, 0.85, f"add: {signed(added, 0)}", COLOURS["red"])
    box(axis, *minus, 2.2, 0.85, f"subtract: {signed(taken, 0)}", COLOURS["blue"])
    box(axis, 10.6, 0.75, 3.0, 0.95, f"int32: {signed(added, 0)} \N{MINUS SIGN} {second}\n"
        f"= {signed(added - taken, 0)}", COLOURS["orange"])  # fmt: skip
    arrow(axis, (6.95, 0.75), (9.05, 0.75))
    axis.text(8.25, 2.2, "(zeros are skipped)", va="center", fontsize=9)
    return figure


@styled
def trits_in_bytes(trits: Tensor) -> Figure:
    """Twenty `trits` `[20]` in bytes: four in each ("2bit", above) and five in each ("base3", below).

    Bits and byte values are what `kernels.pack_trits` makes. The last row unpacks the first byte of base 3:
    three times what is left carries one digit after the other out of eight bits. For
    `chronology/bitnet_demo`. Raises `ValueError` for another number.
    """
    if trits.shape != (20,):
        raise ValueError(
            f"twenty trits fill five bytes and four, got {tuple(trits.shape)}: pass 20"
        )
    figure, axis = new_figure(height=4.4)
    canvas(axis, 23.6, 8.4)
    for i, trit in enumerate(trits.tolist()):
        cell(axis, 3.4 + i, 5.4, TRITS[trit], NAMES[trit], fontsize=9)
    axis.text(0, 5.9, "20 trits", va="center", fontsize=9)
    two, three = pack_trits(trits, "2bit").tolist(), pack_trits(trits, "base3").tolist()
    axis.text(0, 7.35, f"2 bits:\n{len(two)} bytes", va="center", fontsize=9)
    axis.text(0, 4.1, f"1.6 bits:\n{len(three)} bytes", va="center", fontsize=9)
    for i, byte in enumerate(two):
        left = 3.4 + 4 * i
        _bracket(axis, left, 4, 6.55)
        bits = " ".join(f"{trit + 1:02b}" for trit in reversed(trits[4 * i : 4 * i + 4].tolist()))
        axis.text(left + 2, 7.1, bits, ha="center", va="center", fontsize=9, family="monospace")
        axis.text(left + 2, 7.75, f"byte {byte}", ha="center", va="center", fontsize=9)
    for i, byte in enumerate(three):
        left = 3.4 + 5 * i
        _bracket(axis, left, 5, 5.25)
        digits = [trit + 1 for trit in trits[5 * i : 5 * i + 5].tolist()]
        q = sum(d * p for d, p in zip(digits, (81, 27, 9, 3, 1), strict=True))
        text = "".join(map(str, digits))
        axis.text(left + 2.5, 4.75, f"{text} in base 3", ha="center", va="center", fontsize=9)
        axis.text(left + 2.5, 4.15, f"= {q}", ha="center", va="center", fontsize=9)
        axis.text(left + 2.5, 3.5, f"byte {byte}", ha="center", va="center", fontsize=9)
    _unpacked(axis, three[0])
    return figure


def _bracket(axis: Axes, left: float, width: float, y: float) -> None:
    axis.plot([left + 0.12, left + width - 0.12], [y, y], color="black", linewidth=1.2)


def _unpacked(axis: Axes, byte: int) -> None:
    """The steps that take five digits out of a byte."""
    axis.text(0, 1.45, f"byte {byte}\nunpacked", va="center", fontsize=9)
    rest = byte
    for i in range(5):
        digit, left = divmod(3 * rest, 256)
        x = 5.4 + 4 * i
        box(axis, x, 1.45, 3.6, 2.2, f"3 \N{MULTIPLICATION SIGN} {rest} = {3 * rest}\n"
            f"= {digit} \N{MULTIPLICATION SIGN} 256 + {left}\ndigit {digit}, trit {NAMES[digit - 1]}",
            COLOURS["orange"])  # fmt: skip
        if i:
            arrow(axis, (x - 2.2, 1.45), (x - 1.8, 1.45), mutation_scale=8)
        rest = left


@styled
def estimates(rows: Mapping[str, tuple[float, float]], xlabel: str) -> Figure:
    """A row for each label: a value and bars of 2 standard errors, beside a dashed line at 0.

    A value within 2 errors of 0 is hollow. For `chronology/bitnet_demo`.
    """
    figure, axis = new_figure(height=0.9 + 0.36 * len(rows), width=8)
    axis.axvline(0, color=COLOURS["grey"], linestyle="--", linewidth=1)
    for place, (value, error) in enumerate(rows.values()):
        face = COLOURS["blue"] if abs(value) >= 2 * error else "white"
        axis.errorbar(value, place, xerr=2 * error, marker="o", capsize=3, color=COLOURS["blue"],
                      markerfacecolor=face)  # fmt: skip
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.margins(y=0.2)
    axis.set_xlabel(xlabel)
    return figure
