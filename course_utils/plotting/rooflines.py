"""What a machine can reach at most, and what kernels reach on it."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from course_utils.plotting.style import COLOURS, new_figure, series_styles, styled


@styled
def roofline(points: Mapping[str, tuple[float, float]], bandwidth: float, peak: float) -> Figure:
    """The roofline of a machine (Williams, Waterman and Patterson 2009), and kernels as points below it.

    `points[name] = (operations per byte, operations per second)`. `bandwidth` is in bytes per second,
    `peak` in operations per second. The roof is min(peak, bandwidth * operations per byte), both axes are
    logarithmic. For `foundations/packed_kernels`. Raises ValueError for a value that is not positive.
    """
    numbers = [bandwidth, peak, *(value for point in points.values() for value in point)]
    if bad := [value for value in numbers if not value > 0]:
        raise ValueError(f"{bad[0]} is not positive: a roofline has logarithmic axes")
    ridge = peak / bandwidth
    ends = [x for x, _ in points.values()] + [ridge]
    intensities = np.geomspace(min(ends) / 2, max(ends) * 3, 200)
    figure, axis = new_figure(height=4)
    roof = np.minimum(peak, bandwidth * intensities)
    axis.plot(intensities, roof / 1e9, color="black", linewidth=1.5)
    axis.annotate(f"reading {bandwidth / 1e9:.1f} GB/s", (ridge / 3, bandwidth * ridge / 3e9),
                  (-6, 6), textcoords="offset points", ha="right", fontsize=9)  # fmt: skip
    axis.annotate(f"arithmetic {peak / 1e9:.0f} billion/s", (ridge * 1.05, peak / 1e9), (0, 5),
                  textcoords="offset points", fontsize=9)  # fmt: skip
    axis.axvline(ridge, color=COLOURS["grey"], linestyle=":", linewidth=1)
    for (name, (x, y)), style in zip(
        points.items(), series_styles(points, "marker").values(), strict=True
    ):
        axis.plot(x, y / 1e9, linestyle="none", markersize=9, markerfacecolor="none",
                  markeredgewidth=2, label=name, **style)  # fmt: skip
    axis.set(xscale="log", yscale="log")
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter(lambda value, _: f"{value:g}")
        one.set_minor_formatter(lambda *_: "")
    axis.set_xlabel("operations per byte that is read")
    axis.set_ylabel("billion operations a second")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure
