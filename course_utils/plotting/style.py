"""One style for all figures: colour-blind safe, and readable on a dark page."""

import functools

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
