"""Data on its way: through integer arithmetic, and forward and back through fake quantization."""

from itertools import pairwise

import torch
from matplotlib.figure import Figure
from torch import Tensor

from course_utils.kernels.fixed_point import requantize
from course_utils.plotting.diagrams.drawing import arrow, box, canvas, refuse_above, signed
from course_utils.plotting.style import COLOURS, new_figure, styled

MAX_PRODUCTS = 6


@styled
def integer_data_flow(
    x: Tensor, w: Tensor, multiplier: int, shift: int, zero_point: int = 0
) -> Figure:
    """One output of an integer layer: int8 times int8, an int32 sum, multiplier and shift, int8.

    `x` and `w` `[n]` are int8 codes with zero point 0, at most 6 of each; `multiplier` and `shift` come
    from `kernels.fixed_point.quantize_multiplier`, and `zero_point` is the output's. The values in the
    boxes are computed by the package. Jacob et al. 2018, arXiv 1712.05877, section 2.2. For
    `foundations/integer_arithmetic`. Raises ValueError for more values, TypeError for another dtype.
    """
    for name, codes in (("x", x), ("w", w)):
        if codes.dtype != torch.int8:
            raise TypeError(f"{name} holds int8 codes, got {codes.dtype}")
    if x.ndim != 1 or x.shape != w.shape:
        raise ValueError(f"x and w are [n] both, got {tuple(x.shape)} and {tuple(w.shape)}")
    refuse_above(MAX_PRODUCTS, len(x), "products", "show the idea with fewer")
    total = (x.int() * w.int()).sum(dtype=torch.int32)
    scaled = int(requantize(total, multiplier, shift, 0, -(2**31), 2**31 - 1))
    code = int(requantize(total, multiplier, shift, zero_point, -128, 127))
    factor = multiplier / 2 ** (31 + shift)
    figure, axis = new_figure(height=2.9)
    canvas(axis, 12, 3.6)
    blue, green, orange, red = (COLOURS[name] for name in ("blue", "green", "orange", "red"))
    box(axis, 1.45, 2.65, 2.7, 1.4, f"inputs x\nint8: \N{MINUS SIGN}128 to 127\n{_row(x)}", blue)
    box(axis, 1.45, 0.95, 2.7, 1.4, f"weights w\nint8: \N{MINUS SIGN}128 to 127\n{_row(w)}", green)
    box(axis, 4.85, 1.8, 2.5, 1.6, "sum of products\nint32: \N{MINUS SIGN}2³¹ to 2³¹\N{MINUS SIGN}1\n"
        f"{_thousands(int(total))}", orange)  # fmt: skip
    box(axis, 8.0, 1.8, 2.6, 2.2, f"\N{MULTIPLICATION SIGN} multiplier, shift\nint32 and 0 to 31\n"
        f"\N{MULTIPLICATION SIGN} {_thousands(multiplier)}\n/ 2³¹, then / 2{_raised(shift)}\n"
        f"(about \N{MULTIPLICATION SIGN} {factor:.4g})", red)  # fmt: skip
    clamped = "clamped " if scaled + zero_point != code else ""
    box(axis, 10.95, 1.8, 2.0, 1.6, f"output code\nint8: \N{MINUS SIGN}128 to 127\n"
        f"{clamped}{_thousands(code)}", blue)  # fmt: skip
    arrow(axis, (2.8, 2.65), (3.6, 2.1))
    arrow(axis, (2.8, 0.95), (3.6, 1.5))
    arrow(axis, (6.1, 1.8), (6.7, 1.8))
    arrow(axis, (9.3, 1.8), (9.95, 1.8))
    axis.text(9.65, 0.35, f"rounded to {_thousands(scaled)}, then + Z = {signed(zero_point, 0)}",
              ha="center", fontsize=9)  # fmt: skip
    return figure


@styled
def fake_quantization_paths() -> Figure:
    """Fake quantization as two paths: forward through rounding, backward past it.

    The gradient passes the rounding as if it were not there (straight-through estimator; Bengio et al. 2013,
    arXiv 1308.3432) and stops where the clamp cut a value off. For `foundations/ptq_vs_qat`.
    """
    figure, axis = new_figure(height=3.0)
    canvas(axis, 12, 3.8)
    blue, red, grey = COLOURS["blue"], COLOURS["red"], COLOURS["grey"]
    clamp, back_to_real = "clamp to\nlow..high", "S (q \N{MINUS SIGN} Z)"
    stages = ["float\nweight W", "W / S + Z", "round", clamp, back_to_real, "loss"]
    places = [1.0 + 2.0 * i for i in range(len(stages))]
    for x, stage in zip(places, stages, strict=True):
        box(
            axis,
            x,
            2.5,
            1.45,
            0.9,
            stage,
            grey if stage in ("round", clamp) else blue,
        )
    for left, right in pairwise(places):
        arrow(axis, (left + 0.75, 2.5), (right - 0.75, 2.5), blue)
    back = 1.35  # the height of the way back
    axis.plot([places[-1], places[-1]], [2.02, back], color=red)
    for right, left in pairwise(reversed(places)):
        arrow(axis, (right, back), (left, back), red, linestyle="-")
    arrow(axis, (places[0], back), (places[0], 2.02), red)
    axis.text(
        6, 3.35, "forward: the loss sees rounded weights", ha="center", color=blue, fontsize=10
    )
    for x, told in (
        (places[1], "\N{MULTIPLICATION SIGN} 1/S"),
        (places[2], "\N{MULTIPLICATION SIGN} 1, not the true\nderivative 0"),
        (places[3], "\N{MULTIPLICATION SIGN} 1 inside the range,\n0 where clamped"),
        (places[4], "\N{MULTIPLICATION SIGN} S"),
    ):
        axis.plot(x, back, "o", color=red, markersize=5)
        axis.text(x, back - 0.18, told, ha="center", va="top", fontsize=8, color=red)
    axis.text(
        6, 0.1, "backward: the float weight gets the gradient", ha="center", color=red, fontsize=10
    )
    return figure


def _row(codes: Tensor) -> str:
    return ", ".join(signed(code, 0) for code in codes.tolist())


def _raised(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _thousands(number: int) -> str:
    return f"{number:,}".replace("-", "\N{MINUS SIGN}")
