"""The figure of noise by source."""

import pytest

from course_utils.plotting.noise import noise_by_source

PARTS = {"weights": 1.0, "inputs": 3.0, "outputs": 6.0}


def test_each_bar_is_scaled_to_its_sum():
    axis = noise_by_source({"a layer": PARTS, "louder": {k: 7 * v for k, v in PARTS.items()}}).axes[
        0
    ]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx(2 * [10, 30, 60])
    assert [bar.get_x() for bar in axis.patches] == pytest.approx(2 * [0, 10, 40])
    assert [text.get_text() for text in axis.texts] == 2 * ["10%", "30%", "60%"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["louder", "a layer"]


def test_a_share_without_room_has_no_number():
    axis = noise_by_source({"a layer": {"weights": 1.0, "inputs": 99.0}}).axes[0]
    assert [text.get_text() for text in axis.texts] == ["99%"]


@pytest.mark.parametrize(
    ("bars", "said"),
    [
        ({"a": PARTS, "b": {"weights": 1.0}}, r"bar 'b' has the sources \['weights'\]"),
        ({"a": {"weights": -1.0, "inputs": 2.0}}, "give positive noise powers"),
        ({"a": {"weights": 0.0}}, "give positive noise powers"),
    ],
)
def test_bars_that_cannot_be_drawn_are_refused(bars, said):
    with pytest.raises(ValueError, match=said):
        noise_by_source(bars)
