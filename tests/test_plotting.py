"""The course's figures: drawn without error, readable, and the README's picture up to date."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from course_utils.plotting import (
    clips_on_histogram,
    codes_against_outlier,
    error_against_bits,
    error_against_clip,
    error_against_threshold,
    feature_maxima,
    loss_against_alpha,
    loss_against_ratio,
    nats_against_bits,
    predicted_against_measured,
    relative_bars,
    rounding_distances,
    sensitivity_bars,
    series_styles,
    sorted_sizes,
    staircase,
    step_gradient,
    training_curves,
    values_on_grid,
)
from course_utils.plotting.palette import FIGURE, palette_picture, quantize_picture, scene

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def closed():
    """pyplot keeps every figure until it is closed."""
    yield
    plt.close("all")


ROW = torch.randn(64, generator=torch.Generator().manual_seed(0))
FIGURES = {
    "outlier": lambda: codes_against_outlier(ROW, [3.0, 60.0]),
    "maxima": lambda: feature_maxima({"a layer": ROW.abs(), "another": 10 * ROW.abs()}, 6.0),
    "threshold": lambda: error_against_threshold(
        [0, 1, 5], {"chosen": [1, 0.1, 0.01]}, [None, 6.0, 1.0]
    ),
    "bars": lambda: relative_bars({"model": {"float32": 2.0, "int8": 3.0}}, "time"),
    "staircase": lambda: staircase(0.5, 2, 0, 7),
    "grid": lambda: values_on_grid({"four": (ROW, torch.arange(4.0)), "two": (ROW, ROW[:2])}),
    "bits": lambda: error_against_bits({"a": {"x": ([2, 3], [5.0, 1.0])}}, "error", log=True),
    "distances": lambda: rounding_distances({"nearest": ROW / 6, "GPTQ": ROW / 3}),
    "training": lambda: training_curves({"a": ([0, 1], [2.0, 1.0])}, "loss", levels={"b": 1.5}),
    "clip": lambda: error_against_clip({"a": (ROW.abs() + 0.1, ROW.abs() + 1, ROW.abs() + 2)}),
    "clips": lambda: clips_on_histogram({"a layer": (ROW, {"min-max": 3.0, "entropy": 2.0})}),
    "alpha": lambda: loss_against_alpha({"m": {"static": ([0.1, 0.2], 0.3)}}, [0.0, 1.0], "loss"),
    "sensitivity": lambda: sensitivity_bars({"m": {"layer 0": 0.1, "layer 1": 0.2}}, "nats"),
    "predicted": lambda: predicted_against_measured({"a": ([0.1, 0.2], [0.1, 0.3])}, "nats"),
    "nats": lambda: nats_against_bits({"m": {"GPTQ": ([3.3, 4.3], [0.3, 0.01], [0.02, 0.01])}}),
    "step": lambda: step_gradient(ROW, ROW.round(), ROW, ROW),
    "channels": lambda: sorted_sizes({"mean |x|": ROW.abs(), "norm": ROW.abs() + 1}),
    "ratio": lambda: loss_against_ratio({"norm": [1.0, 0.7, 0.9]}, [0.0, 0.5, 0.95]),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_is_labelled_and_the_ground_is_opaque(name):
    figure = FIGURES[name]()
    figure.canvas.draw()
    assert figure.get_facecolor() == (1.0, 1.0, 1.0, 1.0)
    assert figure.axes[0].get_ylabel()
    assert all(axis.get_xlabel() or axis.get_xticklabels() for axis in figure.axes)


def test_bars_are_relative_to_the_first_variant():
    figure = relative_bars({"m": {"float32": 2.0, "int8": 3.0}}, "time")
    assert [patch.get_height() for patch in figure.axes[0].patches] == [1.0, 1.5]


def lines(axis) -> list[tuple[list, list, str]]:
    return [(list(li.get_xdata()), list(li.get_ydata()), li.get_linestyle()) for li in axis.lines]


def test_the_staircase_rounds_inside_and_clips_outside():
    left, right = staircase(0.5, 2, 0, 7).axes
    (r, identity, _), (_, back, _) = lines(left)
    assert r == identity
    assert sorted(set(back)) == [-1, -0.5, 0, 0.5, 1, 1.5, 2, 2.5]
    x, error, _ = lines(right)[0]
    inside = [abs(e) for place, e in zip(x, error, strict=True) if -1.25 <= place <= 2.75]
    assert max(inside) == pytest.approx(0.25, abs=0.01)
    assert error[0] == pytest.approx(x[0] + 1) and error[-1] == pytest.approx(x[-1] - 2.5)


def test_each_level_is_a_line_and_the_label_stands_once():
    figure = values_on_grid({"a": (torch.rand(9), torch.tensor([0.0, 0.5, 1.0]))})
    assert [x[0] for x, _, _ in lines(figure.axes[0])] == [0.0, 0.5, 1.0]
    assert figure.axes[0].get_legend_handles_labels()[1].count("levels") == 1


def test_theory_is_dashed_in_the_colour_of_its_measurement():
    measured = {"a": {"row": ([2, 4], [5.0, 17.0]), "group": ([2, 4], [7.0, 19.0])}}
    theory = {"a": {"group": ([2, 4], [6.9, 18.9])}}
    axis = error_against_bits(measured, "dB", theory=theory).axes[0]
    assert lines(axis)[2] == ([2, 4], [6.9, 18.9], "--")
    assert axis.lines[2].get_color() == axis.lines[1].get_color() != axis.lines[0].get_color()
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["row", "group", "theory"]


NAMES = [f"series {i}" for i in range(9)]
NUMBERS = {name: 1.0 + i for i, name in enumerate(NAMES)}
CURVES = {name: ([0, 1, 2], [y, y + 1, y + 3]) for name, y in NUMBERS.items()}
LOSSES = {name: ([y, y + 1, y + 3], y + 2) for name, y in NUMBERS.items()}
NINE_SERIES = {
    "threshold": lambda: error_against_threshold(
        [0, 1, 5], {name: ys for name, (_, ys) in CURVES.items()}, [None, 6.0, 1.0]
    ),
    "bars": lambda: relative_bars({"a model": NUMBERS, "another": NUMBERS}, "time"),
    "bits": lambda: error_against_bits({"a": CURVES}, "error", log=True),
    "distances": lambda: rounding_distances({name: ROW / y for name, y in NUMBERS.items()}),
    "training": lambda: training_curves(CURVES, "loss"),
    "levels": lambda: training_curves({}, "loss", levels=NUMBERS),
    "clips": lambda: clips_on_histogram({"a layer": (ROW, NUMBERS)}),
    "alpha": lambda: loss_against_alpha({"m": LOSSES}, [0.0, 0.5, 1.0], "loss"),
    "sensitivity": lambda: sensitivity_bars({name: {"a": 1.0, "b": 2.0} for name in NAMES}, "nats"),
    "predicted": lambda: predicted_against_measured(
        {name: ([y], [y + 1]) for name, y in NUMBERS.items()}, "nats"
    ),
    "channels": lambda: sorted_sizes({name: ROW.abs() + y for name, y in NUMBERS.items()}),
    "ratio": lambda: loss_against_ratio({name: ys for name, (_, ys) in CURVES.items()}, [0, 1, 2]),
}


def look(handle) -> tuple:
    """What a reader tells the entry of a legend by."""
    if hasattr(handle, "get_linestyle") and hasattr(handle, "get_marker"):
        return handle.get_color(), handle.get_linestyle(), handle.get_marker()
    patch = handle[0] if hasattr(handle, "patches") else handle
    return patch.get_facecolor(), patch.get_hatch()


@pytest.mark.parametrize("name", NINE_SERIES)
def test_series_beyond_the_seventh_colour_are_drawn_and_told_apart(name):
    """They were once left out without a word, or ended in a KeyError."""
    figure = NINE_SERIES[name]()
    figure.canvas.draw()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    for series in NAMES:
        assert any(series in label for label in labels), series
    looks = [look(handle) for handle in handles]
    assert len(set(looks)) == len(looks)


def test_more_series_than_can_be_told_apart_are_refused():
    assert (
        len({tuple(s.values()) for s in series_styles(map(str, range(28)), "hatch").values()}) == 28
    )
    with pytest.raises(ValueError, match="29 series in one figure: at most 28"):
        series_styles(map(str, range(29)), "hatch")


def test_a_series_that_only_a_later_panel_has_is_drawn_and_in_the_legend():
    """Names were once taken from the first group, panel or variant alone."""
    bars = relative_bars({"m": {"float32": 2.0}, "n": {"float32": 4.0, "int8": 2.0}}, "time")
    assert [patch.get_height() for patch in bars.axes[0].patches] == [1.0, 1.0, 0.5]
    with pytest.raises(ValueError, match=r"\['n'\] hold no 'float32'"):
        relative_bars({"m": {"float32": 2.0}, "n": {"int8": 4.0}}, "time")
    rows = sensitivity_bars({"4 bits": {"a": 1.0}, "3 bits": {"a": 2.0, "b": 3.0}}, "nats")
    assert [patch.get_width() for patch in rows.axes[0].patches] == [1.0, 2.0, 3.0]
    assert [text.get_text() for text in rows.axes[0].get_yticklabels()] == ["a", "b"]
    panels = {"m": {"static": ([1.0], 2.0)}, "n": {"dynamic": ([3.0], 4.0)}}
    (legend,) = loss_against_alpha(panels, [0.5], "loss").legends
    assert len(legend.get_texts()) == 4


def test_a_theory_of_nothing_that_is_measured_is_refused():
    with pytest.raises(ValueError, match=r"theory of \['grup'\] in panel 'a'"):
        error_against_bits(
            {"a": {"group": ([2], [7.0])}}, "dB", theory={"a": {"grup": ([2], [6.0])}}
        )


def test_clips_that_coincide_are_all_seen():
    """A later line once covered an earlier one, which then stood in the legend alone."""
    figure = clips_on_histogram({"a": (ROW, {"minmax": 3.0, "mse": 3.0, "entropy": 2.0})})
    tops = [top for _, (_, top), _ in lines(figure.axes[0])]
    assert tops[0] == 1 and tops[0] > tops[1] > tops[2] > 0.3


def test_nats_lost_carry_their_errors_and_the_float_line():
    curves = {
        "nearest": ([3.0, 4.0], [0.9, 0.1], [0.1, 0.02]),
        "GPTQ": ([3.0, 4.0], [0.4, -0.01], [0.1, 0.02]),
    }
    axis = nats_against_bits({"m": curves}).axes[0]
    assert lines(axis)[0][1:] == ([0, 0], "--")
    assert axis.lines[0].get_label() == "float"
    bars = {}
    for container in axis.containers:
        point, _, (bar,) = container
        [(x, low), (_, high)] = bar.get_segments()[0]
        hollow = point.get_markerfacecolor() == "white"
        bars[round(x), round((low + high) / 2, 9)] = (round((high - low) / 2, 9), hollow)
    assert bars == {
        (3, 0.9): (0.2, False), (4, 0.1): (0.04, False), (3, 0.4): (0.2, False), (4, -0.01): (0.04, True)
    }  # fmt: skip
    places = [container[0].get_xdata()[0] for container in axis.containers]
    assert len(set(places)) == 4  # side by side, so that no bar covers another
    assert "not distinguished from float" in axis.get_legend_handles_labels()[1]


def test_the_readmes_picture_is_the_one_that_the_code_draws():
    committed = np.asarray(Image.open(Path(__file__).parent.parent / FIGURE), dtype=int)
    now = np.asarray(palette_picture(), dtype=int)
    assert committed.shape == now.shape
    assert (committed != now).mean() < 1e-3  # another CPU may round a few pixels the other way


@pytest.mark.parametrize("n_bits", [8, 4, 2])
def test_a_picture_of_n_bits_has_its_levels_and_errs_by_half_a_step(n_bits):
    codes, back = quantize_picture(scene(), n_bits)
    assert len(np.unique(codes)) <= 2**n_bits
    assert np.abs(back - scene()).max() <= 0.5 / (2**n_bits - 1) + 1e-12


def test_the_least_error_of_every_place_is_marked():
    axis = loss_against_ratio({"norm": [1.0, 0.7, 0.9]}, [0.0, 0.5, 0.95]).axes[0]
    assert ([0.5], [0.7]) in [(x, y) for x, y, _ in lines(axis)]


def test_channels_are_sorted_and_divided_by_their_median():
    axis = sorted_sizes({"x": torch.tensor([1.0, 4.0, 2.0])}).axes[0]
    assert lines(axis)[0][1] == [2.0, 1.0, 0.5]
