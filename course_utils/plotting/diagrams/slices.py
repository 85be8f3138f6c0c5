"""Which rows share a word, when codes are packed by slices."""

import torch
from matplotlib.figure import Figure

from course_utils.kernels.slices import PER_WORD, pack_slices
from course_utils.plotting.diagrams.drawing import canvas, cell, refuse_above
from course_utils.plotting.diagrams.storage import TINTS
from course_utils.plotting.style import new_figure, styled

MAX_ROWS = 40


@styled
def slices_in_words(*layouts: tuple[int, int]) -> Figure:
    """A panel for each `(n_bits, rows)`: the bits of each word, highest first, with the row they belong to.

    Drawn from what `kernels.pack_slices` makes of one column: a code of ones in a single row shows which
    bits are that row's. Rows of one slice have one colour; bits that are no row's are grey. For
    `chronology/hqq_demo`. Raises ValueError for more than 40 rows.
    """
    for _, rows in layouts:
        refuse_above(MAX_ROWS, rows, "rows", "show the idea with fewer")
    words_of = {layout: -(-layout[1] // PER_WORD[layout[0]]) for layout in layouts}
    figure, axes = new_figure(
        len(layouts), 1, height=sum(0.8 + 0.32 * n for n in words_of.values()), squeeze=False,
        gridspec_kw={"height_ratios": [0.8 + 0.32 * n for n in words_of.values()]},
    )  # fmt: skip
    for axis, ((n_bits, rows), words) in zip(axes[:, 0], words_of.items(), strict=True):
        width = 32 if n_bits == 3 else 8
        canvas(axis, 38, words + 1.6)
        per = "one column" if n_bits != 3 else "one column, int32"
        axis.text(0, words + 0.8, f"{n_bits} bits, {rows} rows, {per}", fontsize=9, va="center")
        for word in range(words):
            axis.text(4.6, words - word - 0.5, f"word {word}", fontsize=8, ha="right", va="center")
        owner = _owners(n_bits, rows)
        for (word, bit), row in owner.items():
            colour = TINTS[(row // words) % len(TINTS)]
            cell(axis, 5 + width - 1 - bit, words - 1 - word, colour, f"{row}")
        for word in range(words):
            for bit in range(width):
                if (word, bit) not in owner:
                    cell(axis, 5 + width - 1 - bit, words - 1 - word, "#E5E5E5", "")
    return figure


def _owners(n_bits: int, rows: int) -> dict[tuple[int, int], int]:
    """The row that each (word, bit) belongs to."""
    found = {}
    for row in range(rows):
        codes = torch.zeros(rows, 1, dtype=torch.uint8)
        codes[row] = 2**n_bits - 1
        for word, value in enumerate(pack_slices(codes, n_bits)[:, 0].tolist()):
            found |= {(word, bit): row for bit in range(32) if value >> bit & 1}
    return found
