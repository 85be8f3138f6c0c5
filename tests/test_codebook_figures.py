"""Figures of codebooks draw the values that they are given, and refuse what nobody could read."""

from statistics import NormalDist

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from course_utils.grids.codebook import NF4, OFFSET
from course_utils.plotting import against_block_size, code_usage
from course_utils.plotting.diagrams import block_on_levels, nibbles_in_bytes, quantile_levels

matplotlib.use("agg")
CODES = torch.tensor([15, 0, 3, 12, 7])
BYTES = torch.tensor([0xF0, 0x3C, 0x77], dtype=torch.uint8)
BLOCK = torch.tensor([-1.0, 0.5, 0.3])
FIGURES = {
    "quantiles": lambda: quantile_levels(OFFSET),
    "block": lambda: block_on_levels(BLOCK, {"NF4": NF4, "even": torch.linspace(-1, 1, 16)}),
    "nibbles": lambda: nibbles_in_bytes(CODES, BYTES),
    "usage": lambda: code_usage({"a": torch.full((16,), 1 / 16), "b": torch.full((16,), 1 / 16)}),
    "sizes": lambda: against_block_size({"error": {"NF4": ([8, 64], [0.1, 0.2])}}, level=0.15),
}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.parametrize("name", FIGURES)
def test_the_ground_is_opaque_and_all_text_lies_on_it_in_a_size_to_read(name):
    figure = FIGURES[name]()
    figure.canvas.draw()
    assert figure.get_facecolor() == (1.0, 1.0, 1.0, 1.0)
    page = figure.bbox
    for text in (text for axis in figure.axes for text in (*axis.texts, axis.title)):
        if text.get_text():
            assert text.get_fontsize() >= 7.5
            place = text.get_window_extent()
            assert place.x0 >= page.x0 - 1 and place.x1 <= page.x1 + 1, text.get_text()
            assert place.y0 >= page.y0 - 1 and place.y1 <= page.y1 + 1, text.get_text()


def test_the_cuts_are_the_quantiles_that_become_nf4():
    (axis,) = quantile_levels(OFFSET).axes
    dots = next(line for line in axis.lines if line.get_marker() == "o")
    drawn = torch.tensor(dots.get_xdata()).float()
    assert torch.allclose(drawn / NormalDist().inv_cdf(OFFSET), NF4, atol=2e-7)
    with pytest.raises(ValueError, match=r"offset 1\.0: a probability between 1/2 and 1"):
        quantile_levels(1.0)


def test_each_weight_is_joined_to_its_nearest_level():
    (axis,) = block_on_levels(BLOCK, {"NF4": NF4}).axes
    joins = [line.get_xdata() for line in axis.lines if list(line.get_ydata()) == [0.86, 0.12]]
    assert [start for start, _ in joins] == pytest.approx(BLOCK.tolist())
    assert [end for _, end in joins] == pytest.approx([-1, NF4[12].item(), NF4[11].item()])
    with pytest.raises(ValueError, match="33 weights are too many to read, at most 32"):
        block_on_levels(torch.ones(33), {"NF4": NF4})
    with pytest.raises(ValueError, match="5 lines are too many to read"):
        block_on_levels(BLOCK, dict.fromkeys("abcde", NF4))


def test_the_first_code_of_a_byte_is_its_high_half():
    (axis,) = nibbles_in_bytes(CODES, BYTES).axes
    told = [text.get_text() for text in axis.texts]
    assert [t for t in told if t in ("0", "1")] == list("111100000011110001110111")
    assert [t for t in told if "code" in t] == [f"code {code}" for code in CODES.tolist()]
    assert "byte 1 = 60 = 0x3C" in told
    with pytest.raises(ValueError, match=r"do not hold the codes .* first in the high half"):
        nibbles_in_bytes(CODES, BYTES.flip(0))
    with pytest.raises(ValueError, match="9 codes are too many to read"):
        nibbles_in_bytes(torch.zeros(9), BYTES)


def test_bars_reach_two_errors():
    figure = against_block_size({"nats": {"NF4": ([8, 64], [0.1, 0.2], [0.01, 0.02])}})
    ((low, high), _) = figure.axes[0].collections[0].get_segments()
    assert high[1] - low[1] == pytest.approx(0.04)
