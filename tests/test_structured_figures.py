"""Figures of structured pruning: what they show, and what they refuse."""

import matplotlib.pyplot as plt
import pytest
import torch

from course_utils.plotting.structured import layers_worth, neurons_removed, prune_and_recover

W_IN, W_OUT = torch.tensor([[2.0, -1.0], [0.5, 0.0], [1.0, 1.0]]), torch.ones(2, 3)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_a_neuron_that_goes_is_grey_in_both_matrices_and_gone_in_what_is_left():
    axes = neurons_removed(W_IN, W_OUT, [0, 2]).axes
    assert [len(axis.patches) for axis in axes] == [6, 6, 4, 4]
    grey = [sum(p.get_facecolor()[:3] == pytest.approx((0.851,) * 3, abs=1e-3) for p in a.patches)
            for a in axes]  # fmt: skip
    assert grey == [2, 2, 0, 0]
    assert [t.get_text() for t in axes[2].texts] == ["2.0", "\N{MINUS SIGN}1.0", "1.0", "1.0"]


@pytest.mark.parametrize(
    ("shape", "message"), [((7, 2), "7 neurons are too many"), ((3, 5), "5 features are too many")]
)
def test_what_nobody_could_read_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        neurons_removed(torch.ones(shape), torch.ones(shape).T, [0])


def test_layers_have_a_bar_each_and_stages_too():
    left, right = layers_worth([0.5, 0.1], [1.0, 0.2], [0.01, 0.02]).axes
    assert [p.get_height() for p in left.patches] == [0.5, 0.1]
    assert [p.get_height() for p in right.patches] == [1.0, 0.2]
    [axis] = prune_and_recover({"pruned": (1.5, 0.1), "distilled": (0.4, 0.1)}).axes
    assert [p.get_width() for p in axis.patches] == [1.5, 0.4]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["pruned", "distilled"]
