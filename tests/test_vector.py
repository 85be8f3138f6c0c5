"""Codebooks of vectors and the E8 lattice: k-means, distortion, packed bytes, compensation, bad input."""

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import some_tokens, tiny_gpt2

from course_utils.compression import get_method, quantize_model
from course_utils.compression.hessian import Hessian
from course_utils.data.tokens import calibration_tokens
from course_utils.grids.e8 import e8_patterns, e8_points, nearest_e8
from course_utils.grids.vectors import kmeans, nearest_vectors
from course_utils.models import load_model
from course_utils.quantizers.e8p import E8P
from course_utils.quantizers.vector import Vector

SEEDS = st.integers(0, 2**31)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens, features, seed=0, unequal=1.0):
    """Inputs `[tokens, features]` that depend on each other, of sizes as `unequal` as one says."""
    mixing = normal(features, features, seed=seed + 1) / features**0.5 + torch.eye(features)
    return (
        normal(tokens, features, seed=seed)
        @ mixing
        * (unequal * normal(features, seed=seed + 2)).exp()
    )


def seen(x):
    statistics = Hessian(x.shape[1])
    statistics.update(x)
    return statistics


def relative_error(weight, quantized):
    back = quantized.dequantize()
    return ((weight - back).square().sum() / weight.square().sum()).item()


# k-means


def error_of(x, book, w=None):
    squares = (x - book[nearest_vectors(x, book, w)]).square()
    return (squares if w is None else w * squares).sum().item()


@settings(deadline=None, max_examples=25)
@given(SEEDS, st.sampled_from([2, 4, 8]), st.booleans())
def test_the_nearest_entry_is_that_of_brute_force(seed, length, weighted):
    x, book = normal(50, length, seed=seed), normal(13, length, seed=seed + 1)
    w = normal(50, length, seed=seed + 2).square() if weighted else None
    distance = (x[:, None] - book).square() * (1 if w is None else w[:, None])
    chosen = distance.sum(2).gather(1, nearest_vectors(x, book, w)[:, None])[:, 0]
    torch.testing.assert_close(chosen, distance.sum(2).amin(1), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.booleans())
def test_no_turn_of_kmeans_raises_the_error(seed, weighted):
    x = normal(300, 4, seed=seed)
    w = normal(300, 4, seed=seed + 1).square() + 0.01 if weighted else None
    errors = [error_of(x, kmeans(x, 16, w, iterations=n), w) for n in range(9)]
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_with_one_number_a_vector_it_finds_the_levels_of_lloyd_max():
    book = kmeans(normal(20_000, 1), 4, iterations=200).flatten().sort().values
    assert torch.allclose(book, torch.tensor([-1.510, -0.453, 0.453, 1.510]), atol=0.04)


def test_weights_count_as_repetitions():
    x = normal(200, 2)
    times = (1 + torch.arange(200) % 3)[:, None].expand(200, 2)
    start = x[:8].clone()
    repeated = kmeans(x.repeat_interleave(times[:, 0], 0), 8, start=start, iterations=30)
    assert torch.allclose(
        kmeans(x, 8, times.float(), start=start, iterations=30), repeated, atol=1e-4
    )


def test_empty_entries_go_to_the_vectors_of_largest_error_the_same_each_time():
    corners = torch.tensor(list(product((-1.0, 1.0), repeat=2)))
    x = torch.cat([corners.repeat(20, 1), torch.tensor([[40.0, 40.0]])])
    start = torch.zeros(5, 2)  # all vectors are nearest to the first entry: four are empty
    book = kmeans(x, 5, start=start, iterations=20)
    assert error_of(x, book) < 1e-6
    assert torch.equal(book, kmeans(x, 5, start=start, iterations=20))


def test_kmeans_refuses_what_it_cannot_fit():
    with pytest.raises(ValueError, match=r"256 entries for 100 vectors: .* fewer bits, or shorter"):
        kmeans(normal(100, 4), 256)
    with pytest.raises(ValueError, match=r"vectors are \[n, length\], got \(100,\)"):
        kmeans(normal(100), 4)
    with pytest.raises(ValueError, match=r"weights \(3, 4\) for vectors \(100, 4\)"):
        kmeans(normal(100, 4), 4, torch.ones(3, 4))
    with pytest.raises(ValueError, match="weights have to be finite, and not negative"):
        kmeans(normal(100, 4), 4, -torch.ones(100, 4))
    with pytest.raises(ValueError, match="NaN or infinite: repair the input"):
        kmeans(torch.full((9, 2), torch.nan), 4)


# Vector codebooks


def test_two_bits_a_weight_are_counted_with_codebook_and_scales():
    weight = normal(128, 256)
    quantized = Vector().quantize(weight)  # vectors of 4, 8 bits
    codebook, scales = 256 * 4 * 16, 128 * 16
    assert quantized.bits_per_weight == pytest.approx(2 + (codebook + scales) / weight.numel())
    assert quantized.codebook.dtype == torch.float16
    assert quantized.integer_codes().shape == (1, 128, 64)


def test_longer_vectors_err_less_on_normal_weights():
    """2 bits a weight: Lloyd-Max has 0.1175, and the limit is 0.0625."""
    weight = normal(512, 512)
    of_two = relative_error(weight, Vector(length=2, n_bits=4).quantize(weight))
    of_four = relative_error(weight, Vector(length=4, n_bits=8).quantize(weight))
    assert 0.0625 < of_four < of_two < 0.1175
    assert of_four == pytest.approx(0.0965, abs=0.004)


@settings(deadline=None, max_examples=10)
@given(SEEDS)
def test_another_stage_never_errs_more(seed):
    weight = normal(32, 64, seed=seed) * normal(32, 1, seed=seed + 1).exp()
    errors = [
        relative_error(weight, Vector(length=8, n_bits=4, codebooks=n).quantize(weight))
        for n in (1, 2, 3)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_sweeps_over_the_codebooks_err_less_than_greedy_stages():
    weight = normal(128, 256)
    greedy, swept = (
        relative_error(weight, Vector(length=8, codebooks=2, sweeps=n).quantize(weight))
        for n in (0, 5)
    )
    assert swept < 0.98 * greedy


def test_the_diagonal_moves_the_error_to_columns_that_matter_less():
    x, weight = correlated(600, 64), normal(96, 64)
    plain, weighted = (
        Vector(length=4, n_bits=6, hessian=use).quantize(weight, seen(x))
        for use in ("none", "diagonal")
    )
    assert relative_error(weight, weighted) > relative_error(weight, plain)
    large = seen(x).matrix().diagonal()
    costs = [((weight - q.dequantize()).square() * large).sum().item() for q in (plain, weighted)]
    assert costs[1] < 0.9 * costs[0]


@pytest.mark.parametrize("make", [
    lambda **use: Vector(length=4, n_bits=6, codebooks=2, hessian="full" if use else "none"),
    lambda **use: E8P(compensate=bool(use)),
])  # fmt: skip
def test_the_column_loop_lowers_the_output_error(make):
    x, weight = correlated(600, 64, unequal=0.3), normal(96, 64)
    outputs = x @ weight.T
    plain, made_up = (
        (outputs - x @ method.quantize(weight, seen(x)).dequantize().T).square().sum().item()
        for method in (make(), make(full=True))
    )
    assert made_up < 0.9 * plain


def test_codes_of_the_column_loop_decode_to_what_the_loop_chose():
    """All later columns of a weight that is on the lattice already stay where they are."""
    x = correlated(600, 64)
    exact = E8P().quantize(normal(24, 64))
    codes = exact.codes
    weight = e8_points(codes).flatten(1)
    rms = weight.square().mean(1, keepdim=True).sqrt()
    again = E8P(compensate=True, scale_dtype="float32").quantize(weight * 1.03 / rms, seen(x))
    # rows are scaled to a root mean square of 1.03 lattice units, so that only such rows are exact
    on_lattice = (rms.flatten() - 1.03).abs() < 1e-3
    assert torch.equal(again.codes[on_lattice], codes[on_lattice])


# E8


def test_the_256_patterns_are_those_of_the_definition():
    patterns = e8_patterns()
    assert patterns.shape == (256, 8) and len(patterns.unique(dim=0)) == 256
    assert ((patterns % 1) == 0.5).all()
    squares = patterns.square().sum(1)
    assert ((squares <= 10).sum(), (squares == 12).sum()) == (227, 29)
    halves = torch.tensor(list(product((0.5, 1.5, 2.5), repeat=8)))
    assert int((halves.square().sum(1) <= 10).sum()) == 227


def all_points():
    """All 65,536 codes and their points."""
    pattern, bits = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    codes = torch.stack([pattern.flatten(), bits.flatten()], 1).to(torch.uint8)
    return codes, e8_points(codes)


def test_65536_different_points_with_even_sums_before_the_shift():
    codes, points = all_points()
    assert len(points.unique(dim=0)) == 2**16
    shift = torch.where(codes[:, 1] >= 128, 0.25, -0.25)[:, None]
    assert ((points - shift).sum(1) % 2 == 0).all()


def test_the_nearest_point_is_that_of_brute_force():
    _, points = all_points()
    x = torch.cat([normal(150, 8), 3 * normal(50, 8, seed=1)])
    best = torch.cdist(x.double(), points.double()).amin(1)
    found = (x - e8_points(nearest_e8(x))).double().norm(dim=1)
    torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-6)


def test_points_are_their_own_nearest():
    codes, points = all_points()
    some = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))[:3000]
    assert torch.equal(nearest_e8(points[some]), codes[some])


def test_the_distortion_on_normal_numbers_is_that_of_the_lattice():
    weight = normal(512, 512)
    quantized = E8P(scale_dtype="float32").quantize(weight)
    assert relative_error(weight, quantized) == pytest.approx(0.0919, abs=0.001)
    assert quantized.bits_per_weight == 2 + 32 / 512


# Through the one interface

METHODS = [
    Vector(length=4, n_bits=5),
    Vector(length=8, n_bits=4, codebooks=2, sweeps=1, hessian="full"),
    Vector(length=4, n_bits=3, hessian="diagonal"),
    E8P(),
    E8P(compensate=True),
]


@pytest.mark.filterwarnings("ignore:the Hessian of")
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_models_are_quantized_saved_and_loaded(method, tmp_path):
    model, tokens = tiny_gpt2(), some_tokens()
    calibration = some_tokens(6, 20, seed=1) if method.needs_calibration else None
    report = quantize_model(model, method, calibration=calibration)
    assert len(report.layers) == 8
    with torch.no_grad():
        expected = model(tokens).logits
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert torch.equal(again(tokens).logits, expected)


@pytest.mark.parametrize("method", [Vector(n_bits=4), E8P()], ids=str)
def test_rows_of_zeros_and_constant_matrices_come_back(method):
    zeros = torch.zeros(64, 32)
    assert torch.equal(method.quantize(zeros).dequantize(), zeros)
    some = normal(64, 32)
    some[5] = 0
    assert not method.quantize(some).dequantize()[5].any()
    constant = torch.full((64, 32), 0.25)
    error = relative_error(constant, method.quantize(constant))
    assert error < (1e-6 if method.name == "vector" else 0.1)


def test_the_same_seed_gives_the_same_codes():
    weight = normal(64, 64)
    first, second, other = (Vector(n_bits=6, seed=s).quantize(weight) for s in (0, 0, 1))
    assert torch.equal(first.codes, second.codes) and not torch.equal(first.codes, other.codes)


def test_course_lm_at_two_bits():
    model, tokenizer = load_model("course-lm")
    calibration = calibration_tokens(tokenizer, 8, 256)
    report = quantize_model(model, E8P(compensate=True), calibration=calibration)
    assert report.bits_per_weight == pytest.approx(2.047, abs=0.001)
    assert max(layer.output_error for layer in report.layers) < 0.15


def test_refusals():
    for changed, message in (
        ({"length": 0}, "length 0: choose 1 to 64"),
        ({"n_bits": 9}, "n_bits 9: choose 1 to 8"),
        ({"codebooks": True}, "codebooks True: choose 1 to 8"),
        ({"sweeps": -1}, "sweeps -1: choose 0 to 100"),
        ({"hessian": "yes"}, "hessian 'yes': choose one of none, diagonal, full"),
        ({"damping": -1.0}, "damping -1.0 must be 0 or positive"),
        ({"scale_dtype": "int8"}, "scale_dtype 'int8': choose one of float16, float32"),
    ):
        with pytest.raises(ValueError, match=message):
            get_method("vector", **changed)
    with pytest.raises(
        ValueError, match=r"vectors of 4 do not divide the 30 columns .* use 3, 2, 1"
    ):
        Vector().quantize(normal(64, 30))
    with pytest.raises(ValueError, match=r"\[8, 32\] holds 64 vectors of 4, .* 8 bits 256 entries"):
        Vector().quantize(normal(8, 32))
    with pytest.raises(ValueError, match="8 does not divide the 30 columns"):
        E8P().quantize(normal(8, 30))
    with pytest.raises(ValueError, match="compensate 1: choose True or False"):
        E8P(compensate=1)
    with pytest.raises(ValueError, match="damping inf must be"):
        E8P(damping=float("inf"))
    with pytest.raises(ValueError, match="scale_dtype 'int8': choose"):
        E8P(scale_dtype="int8")
    for method in (Vector(n_bits=4, hessian="full"), E8P(compensate=True)):
        with pytest.raises(ValueError, match="needs the Hessian of the layer's inputs: give"):
            method.quantize(normal(64, 32))
    with pytest.raises(ValueError, match="1 of 2048 weights are not finite"):
        weight = normal(64, 32)
        weight[0, 3] = torch.inf
        E8P().quantize(weight)
