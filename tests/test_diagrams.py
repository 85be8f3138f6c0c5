"""Diagrams draw the values that they are given, and refuse what nobody could read."""

import itertools
import re

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.patches import FancyBboxPatch, Rectangle

from course_utils.compression.compensation import compensate
from course_utils.grids.uniform import code_range, dequantize, quantize, scale_and_zero_point
from course_utils.kernels.fixed_point import quantize_multiplier, requantize
from course_utils.kernels.packing import pack
from course_utils.kernels.slices import PER_WORD
from course_utils.plotting import table
from course_utils.plotting.diagrams import (
    activation_heatmap,
    bits_in_bytes,
    block_walk,
    fake_quantization_paths,
    four_matrices,
    gptq_steps,
    grids_on_a_line,
    integer_data_flow,
    slices_in_words,
)

matplotlib.use("agg")
DRAW = torch.Generator().manual_seed(0)
VALUES = torch.tensor([-6.0, -3, 1, 9, 14])


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def texts(axis) -> list[str]:
    return [text.get_text().replace("\N{MINUS SIGN}", "-") for text in axis.texts]


def cells(axis) -> list[Rectangle]:
    return [
        p for p in axis.patches if type(p) is Rectangle and p.get_width() == p.get_height() == 1
    ]


def quantized(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and reconstruction of `W` on a symmetric grid of 4 bits."""
    low, high = code_range(4, signed=True)
    scale, zero_point = scale_and_zero_point(W.min(), W.max(), low, high, symmetric=True)
    codes = quantize(W, scale, zero_point, low, high)
    return codes, dequantize(codes, scale, zero_point)


def grid(minimum: float, maximum: float, low: int, high: int, symmetric: bool):
    ends = torch.tensor(minimum), torch.tensor(maximum)
    scale, zero_point = scale_and_zero_point(*ends, low, high, symmetric=symmetric)
    return scale.item(), zero_point.item(), low, high


GRIDS = {
    "symmetric": grid(-14, 14, -4, 3, True),
    "restricted": grid(-14, 14, -3, 3, True),
    "asymmetric": grid(-6, 14, 0, 7, False),
}


def gptq_example(rows: int = 3, columns: int = 4):
    """W, what its columns are rounded to, U, and the columns as each step finds them."""
    x = torch.randn(64, columns, generator=DRAW).double().cumsum(1)
    U = torch.linalg.cholesky(torch.linalg.inv(x.T @ x / 32), upper=True)
    W = 2 * torch.randn(rows, columns, generator=DRAW).double()
    Q, found = torch.empty_like(W), torch.empty_like(W)

    def rounding(i, w, pending):
        found[:, i : i + 1], Q[:, i : i + 1] = w, w.round()
        return w.round()

    compensate(W.clone(), U, rounding)
    return W, Q, U, found


FIGURES = {
    "matrices": lambda: four_matrices(torch.ones(2, 3), torch.ones(2, 3).int(), torch.ones(2, 3)),
    "grids": lambda: grids_on_a_line(GRIDS, VALUES, 14.0),
    "bits": lambda: bits_in_bytes(torch.tensor([2, 1, 3, 0]), 2, 3, 4, 8),
    "slices": lambda: slices_in_words((4, 8), (3, 20)),
    "flow": lambda: integer_data_flow(VALUES.to(torch.int8), VALUES.to(torch.int8), 2**30, 3, 1),
    "gptq": lambda: gptq_steps(*gptq_example()[:3]),
    "heatmap": lambda: activation_heatmap(torch.randn(8, 40, generator=DRAW), [3, 4]),
    "walk": lambda: block_walk(),
    "paths": lambda: fake_quantization_paths(),
}


@pytest.mark.parametrize("name", FIGURES)
def test_the_ground_is_opaque_and_all_text_lies_on_it_in_a_size_to_read(name):
    figure = FIGURES[name]()
    figure.canvas.draw()
    assert figure.get_facecolor() == (1.0, 1.0, 1.0, 1.0)
    assert figure.get_figwidth() == 9.0
    page = figure.bbox
    drawn = [text for axis in figure.axes for text in (*axis.texts, axis.title) if text.get_text()]
    for text in drawn:
        assert text.get_fontsize() >= 7.5
        place = text.get_window_extent()
        assert place.x0 >= page.x0 - 1 and place.x1 <= page.x1 + 1, text.get_text()
        assert place.y0 >= page.y0 - 1 and place.y1 <= page.y1 + 1, text.get_text()


# Matrices


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 8), columns=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_four_matrices_draw_each_number_in_its_place(rows, columns, seed):
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + 0.5
    codes, back = quantized(W)
    figure = four_matrices(W, codes, back)
    for axis, matrix in zip(figure.axes, (W, codes, back, W - back), strict=True):
        assert len(cells(axis)) == W.numel()
        shown = torch.tensor([float(text) for text in texts(axis)]).view(W.shape)
        within = 0.51 if axis is figure.axes[1] else 0.06 * float(matrix.abs().max()) + 6e-4
        assert (shown - matrix).abs().max() < within
    assert texts(figure.axes[1]) == [str(code) for code in codes.flatten().tolist()]
    plt.close(figure)


def test_float_and_reconstruction_share_their_colours():
    W = torch.tensor([[-1.0, 0.5, 1.0]])
    float_axis, _, back_axis, error_axis = four_matrices(W, W.int(), W).axes
    colours = [[cell.get_facecolor() for cell in cells(axis)] for axis in (float_axis, back_axis)]
    assert colours[0] == colours[1] and len(set(colours[0])) == 3
    assert len({cell.get_facecolor() for cell in cells(error_axis)}) == 1
    assert texts(error_axis) == ["0", "0", "0"]


@pytest.mark.parametrize(
    ("shape", "message"),
    [((9, 2), "9 rows are too many to read, at most 8"), ((2, 6), "6 columns .* at most 5"),
     ((3,), r"W is \[out, in\], got \(3,\)"), ((0, 3), r"got \(0, 3\)")],
)  # fmt: skip
def test_four_matrices_refuse_what_cannot_be_read(shape, message):
    with pytest.raises(ValueError, match=message):
        four_matrices(torch.ones(shape), torch.ones(shape).int(), torch.ones(shape))
    with pytest.raises(ValueError, match="not of W's shape"):
        four_matrices(torch.ones(2, 2), torch.ones(2).int(), torch.ones(2, 2))


def test_gptq_steps_are_those_of_the_package():
    W, Q, U, found = gptq_example()
    axes = gptq_steps(W, Q, U).axes
    for i, axis in enumerate(axes):
        shown = [text.split("\n") for text in texts(axis)[: W.numel()]]
        values = torch.tensor([float(value) for value, *_ in shown]).view(W.shape)
        assert (values[:, : i + 1] - Q[:, : i + 1]).abs().max() < 0.006
        assert (values[:, i + 1] - found[:, i + 1]).abs().max() < 0.006  # as the next step finds it
        moved = [[len(parts) == 2 for parts in shown[r * 4 : r * 4 + 4]] for r in range(3)]
        assert moved == [[j >= i for j in range(4)]] * 3
    added = [float(re.search(r"\((.*)\)", text)[1]) for text in texts(axes[0])[:12:4]]
    assert torch.tensor(added) == pytest.approx((Q - W)[:, 0].float(), abs=0.006)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (5, 4, "5 rows are too many"),
        (3, 6, "6 columns are too many"),
        (3, 2, "3 steps need 3 colu"),
    ],
)
def test_gptq_steps_refuse_what_cannot_be_read(rows, columns, message):
    W = torch.ones(rows, columns)
    with pytest.raises(ValueError, match=message):
        gptq_steps(W, W, torch.eye(columns))
    with pytest.raises(ValueError, match="have to be"):
        gptq_steps(W, W, torch.eye(columns + 1))


def test_the_heatmap_shows_sizes_and_marks_the_outliers():
    x = torch.randn(6, 50, generator=DRAW)
    x[:, [7, 9, 30]] *= torch.tensor([-20.0, 40, 30])
    axis = activation_heatmap(x, [7, 9, 30]).axes[0]
    drawn = torch.as_tensor(axis.images[0].get_array())
    shown = drawn > drawn.min()
    assert torch.equal(drawn[shown], x.abs()[shown])
    assert shown.float().mean() > 0.98
    assert list(axis.lines[0].get_xdata()) == [7, 9, 30]
    assert texts(axis) == ["7", "9", "30"]


def test_names_of_outliers_that_lie_close_do_not_cover_each_other():
    """Pushed apart at one end, they once moved all others too, out of the picture."""
    x = torch.ones(4, 500)
    outliers = [0, 1, 480, 490, 499]
    axis = activation_heatmap(x, outliers).axes[0]
    places = [text.get_position()[0] for text in axis.texts]
    assert all(right - left >= 25 for left, right in itertools.pairwise(places))
    assert min(places) == 0 and max(places) <= 500


@pytest.mark.parametrize("columns", [3, 4, 5])
def test_numbers_of_small_weights_stay_in_their_cells(columns):
    """Five columns of weights near 0.05 once ran into each other."""
    W = 0.05 * torch.randn(4, columns, generator=DRAW)
    figures = [gptq_steps(W, (50 * W).round() / 50, torch.eye(columns) + 0.3)]
    figures.append(four_matrices(W, (50 * W).round().int(), (50 * W).round() / 50))
    for figure in figures:
        figure.canvas.draw()
        for axis in figure.axes:
            for text, square in zip(axis.texts, cells(axis), strict=False):
                assert text.get_window_extent().width <= square.get_window_extent().width


@pytest.mark.parametrize(
    ("x", "outliers", "message"),
    [(torch.ones(300, 4), [0], "300 tokens are too many"), (torch.ones(2, 601), [0], "601 features"),
     (torch.ones(2, 4), [4], "feature 4 is not one of 4"), (torch.ones(4), [0], r"\[tokens, features\]"),
     (torch.zeros(2, 4), [0], "nothing but zeros")],
)  # fmt: skip
def test_the_heatmap_refuses_what_cannot_be_read(x, outliers, message):
    with pytest.raises(ValueError, match=message):
        activation_heatmap(x, outliers)


# Storage


def test_14_in_a_range_of_14_comes_back_as_12_and_whole_where_the_range_is_restricted():
    figure = grids_on_a_line(GRIDS, VALUES, 14.0)
    told = [next(t for t in texts(axis) if "comes back" in t) for axis in figure.axes]
    assert [float(text.split()[-1]) for text in told] == [12, 14, pytest.approx(14.29, abs=0.01)]


@pytest.mark.parametrize("name", GRIDS)
def test_codes_lie_where_they_stand_for_and_arrows_end_on_them(name):
    scale, zero_point, low, high = GRIDS[name]
    (axis,) = grids_on_a_line({name: GRIDS[name]}, VALUES, 14.0).axes
    dots = {
        float(line.get_xdata()[0]): line.get_color()
        for line in axis.lines
        if line.get_marker() == "o"
    }
    assert list(dots) == pytest.approx([scale * (q - zero_point) for q in range(low, high + 1)])
    (zero,) = [place for place, colour in dots.items() if colour == dots[0.0]]
    assert zero == 0.0
    S, Z = torch.tensor(scale), torch.tensor(zero_point)
    back = dequantize(quantize(VALUES, S, Z, low, high), S, Z)
    ends = [a._posA_posB for a in axis.patches if hasattr(a, "_posA_posB")][: len(VALUES)]
    assert [start[0] for start, _ in ends] == VALUES.tolist()
    assert [end[0] for _, end in ends] == pytest.approx(back.tolist())


def test_values_that_share_a_code_have_arrows_of_one_colour():
    axis = grids_on_a_line(GRIDS, VALUES, 14.0).axes[1]
    arrows = [a.get_edgecolor() for a in axis.patches if hasattr(a, "_posA_posB")]
    assert arrows[0] == arrows[1] != arrows[2] == arrows[3]


@pytest.mark.parametrize(
    ("grids", "values", "message"),
    [({"5 bits": (1.0, 0, -16, 15)}, VALUES, "32 codes are too many to read, at most 16"),
     (GRIDS, torch.arange(9.0) + 6, "9 values are too many"), (GRIDS, VALUES[:2], "watched value 14")],
)  # fmt: skip
def test_the_line_refuses_what_cannot_be_read(grids, values, message):
    with pytest.raises(ValueError, match=message):
        grids_on_a_line(grids, values, 14.0)


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 8), data=st.data())
def test_bits_are_those_of_the_packed_bytes_and_read_as_one_number(width, data):
    code = st.integers(0, 2**width - 1)
    codes = torch.tensor(data.draw(st.lists(code, min_size=1, max_size=32 // width)))
    figure = bits_in_bytes(codes, width)
    (axis,) = figure.axes
    plt.close(figure)
    by_place = sorted(zip(cells(axis), texts(axis)[1:], strict=False), key=lambda c: c[0].get_x())
    packed = pack(codes, width)
    assert len(by_place) == 8 * len(packed)
    stream = int("".join(bit for _, bit in by_place), 2)
    assert stream == int.from_bytes(bytes(packed.tolist()), "little")
    assert [(stream >> (i * width)) % 2**width for i in range(len(codes))] == codes.tolist()
    assert [t for t in texts(axis) if t.startswith("byte")] == [
        f"byte {i} = {byte}" for i, byte in enumerate(packed.tolist())
    ]
    used = [rectangle.get_facecolor() for rectangle, _ in by_place]
    assert used.count(matplotlib.colors.to_rgba("#E5E5E5")) == len(used) - width * len(codes)


def test_bits_that_do_not_fit_a_row_are_refused():
    with pytest.raises(
        ValueError, match=r"40 bits \(5 codes of 8\) are too many to read, at most 32"
    ):
        bits_in_bytes(torch.arange(5), 4, 8)
    with pytest.raises(ValueError, match="code 4 does not fit into 2 bits"):
        bits_in_bytes(torch.tensor([4]), 2)


@pytest.mark.parametrize(("n_bits", "rows"), [(8, 3), (4, 8), (3, 13), (2, 8), (1, 16)])
def test_slices_show_the_row_of_every_bit(n_bits, rows):
    """From the highest bit to the lowest, word by word, as the shifts of the hqq package have it."""
    (axis,) = slices_in_words((n_bits, rows)).axes
    count, width = PER_WORD[n_bits], 32 if n_bits == 3 else 8
    words = -(-rows // count)
    by_row = {}
    for rectangle, text in zip(
        cells(axis), [t.get_text() for t in axis.texts][-len(cells(axis)) :], strict=True
    ):
        by_row.setdefault(text, []).append((round(rectangle.get_x()), round(rectangle.get_y())))
    for row in range(rows):
        place, word = divmod(row, words)
        low = (count - 1 - place) * n_bits
        wanted = {(5 + width - 1 - bit, words - 1 - word) for bit in range(low, low + n_bits)}
        assert set(by_row[str(row)]) == wanted
    assert len(cells(axis)) == words * width


def test_too_many_slices_are_refused():
    with pytest.raises(ValueError, match="48 rows are too many to read, at most 40"):
        slices_in_words((4, 48))


# Flows and walks


def test_the_integer_flow_shows_the_packages_numbers():
    x = torch.tensor([12, -101, 33, 127], dtype=torch.int8)
    w = torch.tensor([-88, -45, 127, 64], dtype=torch.int8)
    multiplier, shift = quantize_multiplier(0.0037)
    (axis,) = integer_data_flow(x, w, multiplier, shift, -3).axes
    told = texts(axis)
    total = int(x.int() @ w.int())
    code = int(
        requantize(torch.tensor([total], dtype=torch.int32), multiplier, shift, -3, -128, 127)
    )
    assert told[0].endswith("12, -101, 33, 127") and told[1].endswith("-88, -45, 127, 64")
    assert told[2].endswith(f"\n{total:,}") and f"{multiplier:,}" in told[3]
    assert told[4].endswith(f"\n{code}") and "clamped" not in told[4]
    assert sum(isinstance(patch, FancyBboxPatch) for patch in axis.patches) == 5


def test_the_integer_flow_tells_that_a_code_was_clamped():
    full = torch.tensor([127, 127], dtype=torch.int8)
    (axis,) = integer_data_flow(full, full, *quantize_multiplier(0.5)).axes
    assert texts(axis)[4].endswith("clamped 127")


def test_the_integer_flow_refuses_other_inputs():
    codes = torch.ones(7, dtype=torch.int8)
    with pytest.raises(ValueError, match="7 products are too many to read, at most 6"):
        integer_data_flow(codes, codes, 2**30, 0)
    with pytest.raises(TypeError, match=r"x holds int8 codes, got torch\.int32"):
        integer_data_flow(codes.int(), codes, 2**30, 0)
    with pytest.raises(ValueError, match="x and w are"):
        integer_data_flow(codes, codes[:2], 2**30, 0)


def test_the_walk_has_a_dot_for_each_block_in_each_step():
    for axis, kept in zip(block_walk(5).axes, (0, 1 + 2), strict=True):
        dots = [line for line in axis.lines if line.get_marker() == "o" and len(line.get_xdata())]
        assert len(dots) == 3 * 5 + kept  # float prefix: the codes that are kept lie beside the way


@pytest.mark.parametrize(
    ("blocks", "message"), [(2, "need 3 blocks, got 2"), (7, "7 blocks are too m")]
)
def test_the_walk_refuses_other_numbers_of_blocks(blocks, message):
    with pytest.raises(ValueError, match=message):
        block_walk(blocks)


def test_fake_quantization_goes_forward_and_back():
    (axis,) = fake_quantization_paths().axes
    told = " ".join(texts(axis))
    assert "not the true\nderivative 0" in told and "0 where clamped" in told
    starts = [a._posA_posB for a in axis.patches if hasattr(a, "_posA_posB")]
    assert sum(end[0] > start[0] for start, end in starts) == 5  # forward
    assert sum(end[0] < start[0] for start, end in starts) == 5  # back


# Tables


def test_a_table_has_formatted_columns_and_no_row_numbers():
    rows = [{"method": "float", "loss": None}, {"method": "GPTQ", "loss": 0.0456, "n": 12}]
    shown = table(rows, {"loss": "+.3f", "n": "d"})
    header, *lines = (line.split() for line in shown.to_string().split("\n"))
    assert header == ["method", "loss", "n"]
    assert lines == [["float"], ["GPTQ", "+0.046", "12"]]
    assert "+0.046" in shown.to_html()


def test_a_table_refuses_no_rows_and_a_format_of_no_column():
    with pytest.raises(ValueError, match="a table has rows"):
        table([])
    with pytest.raises(ValueError, match="no column 'los' to format; there are loss"):
        table([{"loss": 1.0}], {"los": ".1f"})
