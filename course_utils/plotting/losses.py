"""Figures of what quantization costs: nats lost, with their errors."""

from matplotlib.figure import Figure

from course_utils.plotting.style import COLOURS, new_figure, styled

Points = tuple[list[float], list[float], list[float]]


@styled
def nats_against_bits(
    panels: dict[str, dict[str, Points]], *, xlabel: str = "measured bits per weight"
) -> Figure:
    """Nats lost against bits, one axis a panel: `panels[title][label] = (bits, nats, standard errors)`.

    A bar reaches 2 standard errors to each side. Points within 2 of the float model, the dashed line at
    0, are not distinguished from it, and hollow. Methods that share their bits lie side by side.
    """
    figure, axes = new_figure(1, len(panels), height=3.8, squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        axis.axhline(0, color=COLOURS["grey"], linestyle="--", linewidth=1, label="float")
        for place, ((label, points), colour) in enumerate(
            zip(curves.items(), COLOURS.values(), strict=False)
        ):
            shift = 0.04 * (place - (len(curves) - 1) / 2)  # so that bars do not cover each other
            bits = [x + shift for x in points[0]]
            axis.plot(bits, points[1], color=colour, linewidth=1, label=label)
            for x, nats, error in zip(bits, *points[1:], strict=True):
                face = colour if nats != 0 and abs(nats) >= 2 * error else "white"
                axis.errorbar(x, nats, 2 * error, marker="o", capsize=3, color=colour,
                              markerfacecolor=face)  # fmt: skip
        axis.plot([], [], "o", color=COLOURS["grey"], markerfacecolor="white",
                  label="not distinguished from float")  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(xlabel)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    axes[0][0].set_ylabel("nats lost per token (bars: 2 standard errors)")
    return figure
