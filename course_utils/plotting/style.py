"""One style for all figures: colour-blind safe, and readable on a dark page."""

import functools
from collections.abc import Iterable

import matplotlib.pyplot as plt

# Okabe and Ito's palette, told apart with every common form of colour blindness
# (https://jfly.uni-koeln.de/color/).
COLOURS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "sky": "#56B4E9",
    "purple": "#CC79A7",
    "grey": "#7F7F7F",
}

# What tells two series of one colour apart. Nothing here is plainly dashed: dashes are for what a figure
# compares a series with (a level, a theory), in that series' colour.
LINES = ("-", "-.", ":", (0, (4, 1, 1, 1, 1, 1)))
HATCHES = (None, "///", "...", "xxx")
MARKERS = (
    "o",
    "^",
    "s",
    "D",
    "v",
)  # another for each series, not for each round: colour is not alone

STYLE = {
    "figure.facecolor": "white",  # opaque: the axes stay readable where the page is dark
    "savefig.facecolor": "white",
    "figure.dpi": 80,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def series_styles(names: Iterable[str], *parts: str) -> dict[str, dict]:
    """How to draw each series: keyword arguments of matplotlib, by the names in their order.

    Colours come in turn, and again when they are used up. `parts` says what then tells series apart, of
    "linestyle" and "hatch" (another with each round of the colours) and "marker". A name that comes
    twice is one series. Raises `ValueError` for more series than can be told apart.
    """
    names, colours = list(dict.fromkeys(names)), list(COLOURS.values())
    if len(names) > len(colours) * len(LINES):
        raise ValueError(
            f"{len(names)} series in one figure: at most {len(colours) * len(LINES)} can be told apart; "
            "draw fewer, or several figures"
        )
    styles = {}
    for i, name in enumerate(names):
        turn = i // len(colours)
        known = {
            "linestyle": LINES[turn],
            "hatch": HATCHES[turn],
            "marker": MARKERS[i % len(MARKERS)],
        }
        styles[name] = {"color": colours[i % len(colours)], **{part: known[part] for part in parts}}
    return styles


def styled(draw):
    """Decorator of a function that draws a figure: it draws in the course's style."""

    @functools.wraps(draw)
    def wrapper(*args, **kwargs):
        with plt.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


@styled
def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = 9.0, height: float = 3.4, **options
):
    """`plt.subplots` in the course's style; sizes in inches for the whole figure."""
    return plt.subplots(rows, columns, figsize=(width, height), **options)
