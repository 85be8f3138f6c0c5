"""Figure of where an output's noise comes from."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from course_utils.plotting.style import COLOURS, new_figure, styled

SMALLEST = 0.05  # a share below it has no room for its number


@styled
def noise_by_source(bars: Mapping[str, Mapping[str, float]]) -> Figure:
    """Stacked bars of noise power: `bars[title][source]`, in any unit that the sources of a bar share.

    Each bar is scaled to 100%, and its shares stand in it. All bars have the same sources. For
    `foundations/integer_arithmetic`. Raises ValueError for a bar of other sources, and for one whose
    powers are negative or all 0.
    """
    sources = list(next(iter(bars.values())))
    for title, powers in bars.items():
        if list(powers) != sources:
            raise ValueError(f"bar {title!r} has the sources {list(powers)}, the first {sources}")
        if min(powers.values()) < 0 or sum(powers.values()) <= 0:
            raise ValueError(
                f"bar {title!r} has the powers {dict(powers)}: give positive noise powers"
            )
    figure, axis = new_figure(height=0.9 + 0.5 * len(bars))
    colours = dict(zip(sources, COLOURS.values(), strict=False))
    for place, powers in enumerate(reversed(bars.values())):
        total, left = sum(powers.values()), 0.0
        for source, power in powers.items():
            share = power / total
            axis.barh(place, 100 * share, left=100 * left, height=0.6, color=colours[source],
                      label=source if place == 0 else None)  # fmt: skip
            if share >= SMALLEST:
                axis.text(100 * (left + share / 2), place, f"{share:.0%}", ha="center", va="center",
                          fontsize=9, color="white", weight="bold")  # fmt: skip
            left += share
    axis.set_yticks(range(len(bars)), reversed(bars))
    axis.set_xlabel("share of the noise power (%)")
    axis.set_xlim(0, 100)
    axis.grid(False)
    figure.legend(loc="outside upper center", ncols=len(sources), fontsize=9)
    return figure
