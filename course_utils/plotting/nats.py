"""Figures of nats lost by a few variants, or along a setting, with their errors."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from course_utils.plotting.style import COLOURS, new_figure, series_styles, styled

Losses = Mapping[str, tuple[float, float]]


@styled
def nats_by_variant(panels: Mapping[str, Losses]) -> Figure:
    """A row for each variant, one axis a panel: `panels[title][variant] = (nats, standard error)`.

    A bar reaches 2 standard errors to each side. A hollow point is not distinguished from the float model,
    the dashed line at 0. Panels have scales of their own. For `foundations/dynamic_range`. Raises
    ValueError for a panel without variants.
    """
    if empty := [title for title, losses in panels.items() if not losses]:
        raise ValueError(f"panel {empty[0]!r} has no variants to draw")
    rows = max(len(losses) for losses in panels.values())
    figure, axes = new_figure(1, len(panels), height=1.2 + 0.32 * rows, squeeze=False)
    for axis, (title, losses) in zip(axes[0], panels.items(), strict=True):
        axis.axvline(0, color=COLOURS["grey"], linestyle="--", linewidth=1)
        for place, (nats, error) in enumerate(losses.values()):
            face = COLOURS["blue"] if abs(nats) >= 2 * error and nats != 0 else "white"
            axis.errorbar(nats, place, xerr=2 * error, marker="o", capsize=3, color=COLOURS["blue"],
                          markerfacecolor=face, linestyle="none")  # fmt: skip
        axis.set_yticks(range(len(losses)), list(losses))
        axis.set_ylim(len(losses) - 0.5, -0.5)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("nats lost per token (bars: 2 standard errors)", fontsize=9)
    return figure


@styled
def nats_against_alpha(
    panels: Mapping[str, Mapping[str, Mapping[float, tuple[float, float]]]],
    without: Mapping[str, Mapping[str, float]],
) -> Figure:
    """Nats lost against alpha, `panels[title][kind][alpha] = (nats, standard error)`.

    `without[title][kind]` is the loss without smoothing, a dashed line in the kind's colour. Bars reach 2
    standard errors to each side, and the grey line at 0 is the float model. Panels have scales of their
    own. For `foundations/smoothing`.
    """
    styles = series_styles((kind for curves in panels.values() for kind in curves), "marker")
    figure, axes = new_figure(1, len(panels), height=3.6, squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for kind, points in curves.items():
            nats, errors = zip(*points.values(), strict=True)
            bars = [2 * error for error in errors]
            axis.errorbar(list(points), nats, bars, capsize=3, label=kind, **styles[kind])
            axis.axhline(without[title][kind], color=styles[kind]["color"], linestyle="--",
                         label=f"{kind}, not smoothed")  # fmt: skip
        axis.axhline(0, color=COLOURS["grey"], linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("alpha")
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("nats lost per token (bars: 2 standard errors)")
    return figure
