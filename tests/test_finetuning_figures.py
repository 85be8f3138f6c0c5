"""The figures of fine-tuning: what stands in them is what was given."""

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from course_utils.plotting.finetuning import (
    kept_against_scale,
    low_rank_update,
    memory_bars,
    updates_in_half_steps,
)

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def closed():
    """pyplot keeps every figure until it is closed."""
    yield
    plt.close("all")


def test_the_update_is_drawn_with_its_exact_values():
    W, A, B = torch.zeros(2, 2), torch.tensor([[0.5, -0.25]]), torch.tensor([[1.0], [2.0]])
    axis = low_rank_update(W, A, B, 2.0).axes[0]
    texts = [text.get_text() for text in axis.texts]
    assert texts.count("×") == texts.count("=") == 1
    assert "\N{MINUS SIGN}0.25" in texts and "2.0" in texts  # of A, and of 2 B A
    with pytest.raises(ValueError, match=r"A \(1, 2\) and B \(3, 1\) have to be"):
        low_rank_update(W, A, torch.zeros(3, 1), 2.0)


def test_bars_are_stacked_in_megabytes():
    found = {"model": {"full": {"weights": 3_000_000, "gradients": 2_000_000}}}
    axis = memory_bars(found).axes[0]
    assert [(p.get_x(), p.get_width()) for p in axis.patches] == [(0.0, 3.0), (3.0, 2.0)]
    assert [text.get_text().strip() for text in axis.texts] == ["5"]
    assert axis.get_xlabel() == "MB"


def test_shares_of_changed_codes_are_those_given():
    ratio = torch.cat([torch.full((100,), 0.45), torch.full((100,), 1.55), torch.full((9,), 0.85)])
    changed = {"a": ratio > 1}
    left, right = updates_in_half_steps(ratio, changed).axes
    x, shares = right.lines[0].get_data()
    assert x == pytest.approx((0.45, 1.55)) and list(shares) == [0.0, 1.0]  # 9 are too few
    assert left.get_xscale() == "log" and left.get_ylabel() == "weights"


def test_a_curve_of_what_is_kept_has_all_of_it_as_a_level():
    axis = kept_against_scale({"a": ([0.5, 1.0], [0.2, 0.6])}).axes[0]
    assert list(axis.lines[0].get_ydata()) == [1, 1]
    assert list(axis.lines[1].get_ydata()) == [0.2, 0.6] and axis.get_ylabel()
