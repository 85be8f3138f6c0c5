"""Figures of kernels: what stands where, and what cannot be read or drawn."""

import matplotlib
import numpy as np
import pytest

from course_utils.plotting.diagrams.words import codes_of_words
from course_utils.plotting.rooflines import roofline

matplotlib.use("Agg")


def texts(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def test_a_row_of_the_words_is_what_one_shift_takes_out():
    shown = texts(codes_of_words(4, 4, 4))
    assert "codes 1, 5, 9, 13, in one vector" in shown
    assert ">> 12 & 15" in shown
    numbers = [text for text in shown if text.isdigit()]
    assert numbers[-32:-16] == [str(i) for i in range(16)]
    assert numbers[-16:] == [str(4 * w + c) for c in range(4) for w in range(4)]


@pytest.mark.parametrize(
    ("words", "codes", "message"), [(4, 8, "8 codes of a word"), (9, 4, "36 codes are too many")]
)
def test_too_many_words_are_refused(words, codes, message):
    with pytest.raises(ValueError, match=message):
        codes_of_words(words, codes, 4)


def test_the_roof_is_the_lesser_of_reading_and_arithmetic():
    axis = roofline({"slow": (0.5, 1e9), "fast": (50.0, 60e9)}, 10e9, 100e9).axes[0]
    x, y = axis.lines[0].get_data()
    np.testing.assert_allclose(y, np.minimum(100, 10 * x))
    assert [line.get_label() for line in axis.lines[2:]] == ["slow", "fast"]
    assert axis.lines[3].get_data() == ([50.0], [60.0])


@pytest.mark.parametrize("wrong", [{"bandwidth": 0.0}, {"points": {"a": (1.0, -1.0)}}])
def test_a_roofline_has_positive_values(wrong):
    with pytest.raises(ValueError, match="is not positive"):
        roofline(**({"points": {"a": (1.0, 1e9)}, "bandwidth": 1e9, "peak": 1e9} | wrong))
