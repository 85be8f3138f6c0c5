"""The figures of grids without a zero: what stands in them is what was given."""

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from course_utils.plotting.ultra_low import error_over_depth, error_over_scale, levels_on_histogram

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def closed():
    """pyplot keeps every figure until it is closed."""
    yield
    plt.close("all")


def test_a_dot_lies_on_each_curve_at_its_scale():
    scales = torch.linspace(0, 2, 201)
    curves = {
        name: (scales, 1 - 2 * a * scales + scales**2) for name, a in (("x", 0.8), ("y", 0.5))
    }
    axis = error_over_scale(curves, {"x": 0.8, "y": 0.5}).axes[0]
    dots = [line.get_xydata()[0] for line in axis.lines if line.get_marker() == "o"]
    assert [dot.tolist() for dot in dots] == [
        pytest.approx([0.8, 0.36], abs=1e-5), pytest.approx([0.5, 0.75], abs=1e-5)
    ]  # fmt: skip


def test_levels_are_drawn_in_root_mean_squares():
    values = 3 * torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    axes = levels_on_histogram({"two": (values, torch.tensor([3.0, -3.0, 6.0]))}).axes
    drawn = [line.get_xdata()[0] for line in axes[0].lines]
    assert drawn == pytest.approx([-1, 1, 2, 0, 1.5])
    assert axes[0].get_title() == "two"


def test_a_label_has_one_look_in_all_panels_over_depth():
    panels = {"a": {"1 bit": [0.5, 1.0], "2 bits": [0.1, 0.2]}, "b": {"1 bit": [0.4, 0.6, 0.9]}}
    axes = error_over_depth(panels).axes
    lines = [[line for line in axis.lines if len(line.get_xdata()) > 2 or line.get_marker() != "None"]
             for axis in axes]  # fmt: skip
    assert [list(line.get_ydata()) for line in lines[0]] == [[0.5, 1.0], [0.1, 0.2]]
    assert lines[0][0].get_color() == lines[1][0].get_color() != lines[0][1].get_color()
    assert list(lines[1][0].get_xdata()) == [1, 2, 3]
