"""The figures of ternary weights: what stands in them is what was given, and what the package makes of it."""

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from course_utils.kernels import pack_trits
from course_utils.plotting.ternary import (
    estimates,
    gaps_by_size,
    latent_weights,
    signed_sum,
    trits_in_bytes,
    twin_curves,
)

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def closed():
    """pyplot keeps every figure until it is closed."""
    yield
    plt.close("all")


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_a_signed_sum_is_computed_from_its_terms():
    figure = signed_sum(torch.tensor([127, -34, 8]).char(), torch.tensor([1, 0, -1]).char())
    assert "add: 127" in texts(figure) and "subtract: 8" in texts(figure)
    assert any(text.endswith("= 119") for text in texts(figure))
    many = torch.full((8,), 127).char()
    assert "add: 1016" in texts(signed_sum(many, torch.ones(8).char()))  # beyond int8


def test_sums_of_too_many_terms_and_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="9 terms are too many"):
        signed_sum(torch.zeros(9).char(), torch.zeros(9).char())
    with pytest.raises(ValueError, match=r"got \(3,\) and \(2,\)"):
        signed_sum(torch.zeros(3).char(), torch.zeros(2).char())


def test_bytes_are_those_of_the_package_and_the_first_is_unpacked():
    trits = torch.tensor([1, 0, -1, 1, 0] + [-1, 1, 0] * 5).char()
    found = texts(trits_in_bytes(trits))
    for packing in ("2bit", "base3"):
        for byte in pack_trits(trits, packing).tolist():
            assert f"byte {byte}" in found
    steps = [text.splitlines()[-1] for text in found if "256" in text]
    names = ["+1", "0", "\N{MINUS SIGN}1", "+1", "0"]
    assert [step.split("trit ")[1] for step in steps] == names
    with pytest.raises(ValueError, match=r"got \(5,\): pass 20"):
        trits_in_bytes(trits[:5])


def test_gaps_are_dots_and_a_mean_where_a_size_has_several_pairs():
    axis = gaps_by_size({1_000_000: [0.1, 0.2, 0.3], 2_500_000: [0.05]}).axes[0]
    dots = [line.get_ydata().tolist() for line in axis.lines if line.get_marker() == "o"]
    assert dots == [[0.1, 0.2, 0.3], [0.05]]
    ((mean, _, (bar,)),) = axis.containers
    assert mean.get_ydata().tolist() == pytest.approx([0.2])
    low, high = bar.get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * 0.1 / 3**0.5)  # one standard error on each side
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1.0 M", "2.5 M"]


def test_shares_of_codes_stand_in_the_legend():
    axis = latent_weights({"a": torch.tensor([0.2, -0.5, 0.9, -7.0])}).axes[0]
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["code \N{MINUS SIGN}1: 25%", "code 0: 50%", "code +1: 25%"]  # a tie is 0


def test_twins_are_subtracted_seed_by_seed():
    x = [1.0, 2.0]
    curves = {"a": [(x, [3.0, 2.0]), (x, [5.0, 2.0])], "b": [(x, [2.0, 2.0]), (x, [2.0, 1.0])]}
    left, right = twin_curves(curves, "loss").axes
    drawn = [list(line.get_ydata()) for line in right.lines[:3]]
    assert drawn == [[1.0, 0.0], [3.0, 1.0], [2.0, 0.5]]
    assert len(left.lines) == 4 and right.get_ylabel() == "a less b"
    with pytest.raises(ValueError, match="twins are two kinds of models, got 1"):
        twin_curves({"a": curves["a"]}, "loss")


def test_an_estimate_within_two_errors_of_zero_is_hollow():
    axis = estimates({"a": (1.0, 0.2), "b": (0.1, 0.2)}, "nats").axes[0]
    faces = [container[0].get_markerfacecolor() for container in axis.containers]
    assert faces[1] == "white" != faces[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
