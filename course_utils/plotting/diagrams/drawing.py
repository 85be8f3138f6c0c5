"""What the diagrams are made of: numbered cells, boxes, arrows."""

import math

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor

from course_utils.plotting.style import COLOURS

# From negative to positive values; both ends differ in brightness from the middle.
DIVERGING = LinearSegmentedColormap.from_list(
    "course", [COLOURS["blue"], "#F7F7F7", COLOURS["red"]]
)
SEQUENTIAL = LinearSegmentedColormap.from_list("course_up", ["#F7F7F7", COLOURS["sky"], "#003A5C"])
DONE = "#D9D9D9"  # what no longer changes


def canvas(axis: Axes, width: float, height: float) -> None:
    """Make an axis a sheet of `width` by `height`, (0, 0) below on the left."""
    axis.set_xlim(0, width)
    axis.set_ylim(0, height)
    axis.axis("off")


def decimals(values: Tensor, digits: int = 3) -> int:
    """Places after the point, so that the largest of `values` shows so many digits; 0 to 4."""
    largest = float(values.abs().max())
    return 0 if largest == 0 else min(max(digits - 1 - math.floor(math.log10(largest)), 0), 4)


def signed(value: float, digits: int) -> str:
    """A number with a true minus sign, and without one at zero."""
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def cell(axis: Axes, x: float, y: float, colour, text: str, **font) -> Rectangle:
    """A coloured square of side 1 with its lower left corner at (x, y), and a text in it."""
    square = axis.add_patch(
        Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=1)
    )
    font = {"ha": "center", "va": "center", "fontsize": 8} | font
    axis.text(x + 0.5, y + 0.5, text, color=readable_on(colour), **font)
    return square


def readable_on(colour) -> str:
    """Black or white, whichever stands out from `colour`."""
    red, green, blue = to_rgb(colour)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def box(
    axis: Axes, x: float, y: float, width: float, height: float, text: str, colour: str
) -> None:
    """A box around (x, y) with text in it: a pale ground, an edge in `colour`."""
    ground = [1 - 0.15 * (1 - channel) for channel in to_rgb(colour)]
    corner, shape = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.08"
    patch = FancyBboxPatch(corner, width, height, shape, facecolor=ground, edgecolor=colour)
    axis.add_patch(patch)
    axis.text(x, y, text, ha="center", va="center", fontsize=9, linespacing=1.35)


def arrow(axis: Axes, start: tuple, end: tuple, colour: str = "black", **style) -> None:
    """An arrow from `start` to `end`; `style` goes to matplotlib's `FancyArrowPatch`."""
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0} | style
    axis.add_patch(FancyArrowPatch(start, end, color=colour, **style))


def refuse_above(limit: int, size: int, what: str, remedy: str) -> None:
    """Raise ValueError for a picture that nobody could read."""
    if size > limit:
        raise ValueError(f"{size} {what} are too many to read, at most {limit}: {remedy}")
