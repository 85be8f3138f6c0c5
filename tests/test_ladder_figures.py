"""Figures of the way to two bits: what they show, and what they refuse."""

import matplotlib.pyplot as plt
import pytest
import torch

from course_utils.plotting import ladder


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_codebooks_lie_over_the_pairs():
    books = {"levels": torch.zeros(4, 2), "k-means": torch.ones(5, 2)}
    figure = ladder.codebooks_of_pairs(torch.zeros(9, 2), books)
    drawn = [[len(line.get_xdata()) for line in axis.lines] for axis in figure.axes]
    assert drawn == [[9, 4], [9, 5]]
    with pytest.raises(ValueError, match=r"x \(9, 3\): a plane shows pairs"):
        ladder.codebooks_of_pairs(torch.zeros(9, 3), books)


def test_each_window_names_its_state_and_value():
    values = torch.arange(8) - 4.0
    shown = texts(ladder.moving_window([1, 0, 1, 1, 0, 0], 3, 1, values).axes[0])
    assert [t for t in shown if "state" in t] == ["state 5", "state 3", "state 6", "state 4"]
    assert {"1.0", "−1.0", "2.0", "0.0"} <= set(shown)
    with pytest.raises(ValueError, match="17 bits are too many to read"):
        ladder.moving_window([0] * 17, 16, 1, torch.zeros(2**16))


def test_rungs_and_distortions_draw_all():
    losses = {"a": (1.0, 0.1), "b": (0.5, 0.1)}
    axis = ladder.rungs(losses, {"a": "scales", "b": "codes"}).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
    axis = ladder.distortions({"limit": [0.25, 0.06]}, [1, 2], {"E8": 0.09}).axes[0]
    assert len(axis.lines) == 2 and axis.get_yscale() == "log"


def test_the_front_holds_what_nothing_beats():
    points = [(2.0, 0.3), (1.0, 0.9), (2.1, 0.4), (3.0, 0.1), (1.0, 1.2), (2.0, 0.3)]
    assert ladder.pareto(points) == [(1.0, 0.9), (2.0, 0.3), (3.0, 0.1)]
    figure = ladder.front({"a": ([1.0, 2.0], [0.9, 0.3], [0.1, 0.1]), "b": ([2.1], [0.4], [0.1])})
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["float", "Pareto front", "a", "b"]
