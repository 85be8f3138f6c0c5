"""The figures of nats lost, and the diagram of tokens and their codes."""

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from course_utils.plotting.diagrams.tokens import codes_of_tokens
from course_utils.plotting.nats import nats_against_alpha, nats_by_variant

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_each_variant_has_its_point_and_a_bar_of_two_errors():
    losses = {"min-max": (0.7, 0.05), "per token": (0.01, 0.02)}
    axis = nats_by_variant({"a model": losses}).axes[0]
    points = {c.lines[0].get_ydata()[0]: c for c in axis.containers}
    assert [label.get_text() for label in axis.get_yticklabels()] == list(losses)
    for place, (nats, error) in enumerate(losses.values()):
        point, _, (bar,) = points[place].lines
        assert point.get_xdata() == pytest.approx([nats])
        ends = [x for x, _ in bar.get_segments()[0]]
        assert ends == pytest.approx([nats - 2 * error, nats + 2 * error])


def test_a_point_within_two_errors_of_the_float_model_is_hollow():
    axis = nats_by_variant({"a": {"far": (0.7, 0.05), "near": (0.01, 0.02)}}).axes[0]
    far, near = (c.lines[0].get_markerfacecolor() for c in axis.containers)
    assert near == "white" and far != "white"


def test_a_panel_without_variants_is_refused():
    with pytest.raises(ValueError, match="panel 'b' has no variants to draw"):
        nats_by_variant({"a": {"x": (0.1, 0.1)}, "b": {}})


def test_a_sweep_has_its_points_and_the_loss_without_smoothing():
    points = {0.0: (0.3, 0.01), 0.5: (0.1, 0.02), 1.0: (0.2, 0.01)}
    figure = nats_against_alpha({"m": {"static": points}}, {"m": {"static": 0.4}})
    (axis,) = figure.axes
    (curve,) = axis.containers
    assert curve.lines[0].get_xdata().tolist() == list(points)
    assert curve.lines[0].get_ydata().tolist() == [nats for nats, _ in points.values()]
    (dashed,) = (line for line in axis.get_lines() if line.get_linestyle() == "--")
    assert set(dashed.get_ydata()) == {0.4}
    said = {text.get_text() for text in axis.get_legend().get_texts()}
    assert said == {"static", "static, not smoothed"}


X = torch.tensor([[3000.0, 0.4], [-0.2, 1.0]])


def test_values_and_codes_stand_in_their_cells():
    codes = {"one step": (X / 24).round(), "a step a token": torch.tensor([[127, 0], [-25, 127]])}
    figure = codes_of_tokens(X, codes)
    texts = [[t.get_text() for t in axis.texts] for axis in figure.axes]
    assert texts[0] == ["3000", "0.40", "\N{MINUS SIGN}0.20", "1.00"]
    assert texts[1] == ["125", "0", "0", "0"]
    assert texts[2] == ["127", "0", "\N{MINUS SIGN}25", "127"]
    assert [axis.get_title() for axis in figure.axes] == ["values x", *codes]


@pytest.mark.parametrize(
    ("x", "codes", "said"),
    [
        (torch.ones(9, 2), {}, "tokens"),
        (torch.ones(2, 7), {}, "features"),
        (X, {"a": X, "b": X, "c": X}, "ranges"),
        (X, {"a": X[:1]}, r"'a' has codes \(1, 2\), and x is \(2, 2\)"),
    ],
)
def test_what_cannot_be_read_is_refused(x, codes, said):
    with pytest.raises(ValueError, match=said):
        codes_of_tokens(x, codes)
