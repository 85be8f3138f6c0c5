"""Figures of distillation: what stands in them, and what they refuse."""

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from course_utils.plotting.distillation import (
    fits,
    gradient_against_temperature,
    soft_targets,
    two_losses,
)

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def closed():
    """pyplot keeps every figure until it is closed."""
    yield
    plt.close("all")


def texts(figure) -> set[str]:
    return {text.get_text() for axis in figure.axes for text in axis.texts}


def test_soft_targets_show_each_probability_and_the_label_in_another_colour():
    panels = {"T = 1": torch.tensor([0.6, 0.3, 0.1]), "T = 2": torch.tensor([0.4, 0.3, 0.3])}
    figure = soft_targets(panels, [" in", " from", "s"], 1)
    assert [axis.get_title() for axis in figure.axes] == list(panels)
    assert {" 0.600", " 0.300", " 0.100", " 0.400"} <= texts(figure)
    colours = [patch.get_facecolor() for patch in figure.axes[0].patches]
    assert colours[0] == colours[2] != colours[1]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["\N{OPEN BOX}in", "\N{OPEN BOX}from", "s"]
    with pytest.raises(ValueError, match=r"T = 1: \(3,\) for 2 words"):
        soft_targets(panels, ["a", "b"], 0)


def test_two_losses_names_both_and_whom_the_gradient_goes_to():
    found = texts(two_losses())
    assert {"T² KL(P || Q)\nsoft loss", "cross-entropy\nhard loss"} <= found
    assert "gradient, to the student alone" in found


def test_gradients_and_fits_are_drawn_as_given():
    figure = gradient_against_temperature([1, 2, 4], {"a": [1, 0.5, 0.1], "b": [1, 1, 1]})
    [axis] = figure.axes
    assert [line.get_label() for line in axis.lines] == ["a", "b"]
    assert list(axis.lines[0].get_ydata()) == [1, 0.5, 0.1]
    x = torch.linspace(-1, 1, 5)
    [axis] = fits(x, x.softmax(0), {"one": (-x).softmax(0)}).axes
    assert axis.lines[0].get_ydata().tolist() == (-x).softmax(0).tolist()
