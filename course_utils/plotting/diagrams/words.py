"""How codes are cut out of the words that hold them, and in which order they come out."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from course_utils.plotting.diagrams.drawing import arrow, canvas, cell, refuse_above
from course_utils.plotting.diagrams.storage import TINTS
from course_utils.plotting.style import new_figure, styled

MAX_CELLS = 32


@styled
def codes_of_words(words: int, codes_of_word: int, n_bits: int) -> Figure:
    """A tile of `words` words, one a column, each with `codes_of_word` codes of `n_bits` bits.

    A cell shows the number of its code in the row of the weight. A row of cells is what one shift and one
    mask cut out, of all words at once; it has a colour. Below, the inputs as they come and as they are
    re-ordered, in the colours of the codes that they meet. For `foundations/packed_kernels`. Raises
    ValueError for more than 4 codes a word or 32 codes in all.
    """
    refuse_above(len(TINTS), codes_of_word, "codes of a word", "draw wider codes or narrower words")
    count = words * codes_of_word
    refuse_above(MAX_CELLS, count, "codes", "draw fewer words")
    left = 7.0
    width = left + max(count, words + 12) + 0.5
    figure, axis = new_figure(height=0.34 * (codes_of_word + 6))
    canvas(axis, width, codes_of_word + 6)
    for c in range(codes_of_word):
        y = 4.6 + c
        taken = [w * codes_of_word + c for w in range(words)]
        for w, number in enumerate(taken):
            cell(axis, left + w, y, TINTS[c], str(number))
        axis.text(left - 0.4, y + 0.5, f">> {n_bits * c} & {2**n_bits - 1}", ha="right",
                  va="center", fontsize=9, family="monospace")  # fmt: skip
        arrow(axis, (left + words + 0.2, y + 0.5), (left + words + 1.4, y + 0.5))
        said = f"codes {', '.join(map(str, taken))}, in one vector"
        axis.text(left + words + 1.7, y + 0.5, said, ha="left", va="center", fontsize=9)
    for w in range(words):
        axis.text(
            left + w + 0.5, 4.65 + codes_of_word, f"w{w}", ha="center", va="bottom", fontsize=8
        )
    _strip(axis, left, 2.3, "inputs as they come", list(range(count)), codes_of_word)
    ordered = [w * codes_of_word + c for c in range(codes_of_word) for w in range(words)]
    _strip(axis, left, 0.6, "inputs re-ordered", ordered, codes_of_word)
    return figure


def _strip(
    axis: Axes, left: float, y: float, name: str, numbers: list[int], codes_of_word: int
) -> None:
    """A row of inputs, each in the colour of its code."""
    axis.text(left - 0.4, y + 0.5, name, ha="right", va="center", fontsize=9)
    for place, number in enumerate(numbers):
        cell(axis, left + place, y, TINTS[number % codes_of_word], str(number))
