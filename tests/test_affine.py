"""Uniform grids and round-to-nearest: parity with torch, properties, whole models, and bad input."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from course_utils.compression import get_method, quantize_model
from course_utils.data.tokens import calibration_tokens
from course_utils.evaluation import tensor_bytes
from course_utils.grids.observers import OBSERVERS
from course_utils.grids.uniform import (
    code_range,
    dequantize,
    quantize,
    round_codes,
    scale_and_zero_point,
)
from course_utils.models import load_model
from course_utils.quantizers.affine import Affine, AffineWeight

SEEDS = st.integers(0, 2**31)
BITS = st.integers(2, 8)
FLOATS = st.floats(-1e6, 1e6, width=32)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grid_of(rows, n_bits=4, *, signed=False, symmetric=False):
    """(scale, zero_point, low, high) with one scale a row of `rows` `[rows, n]`."""
    low, high = code_range(n_bits, signed=signed)
    minimum, maximum = rows.aminmax(dim=1, keepdim=True)
    return *scale_and_zero_point(minimum, maximum, low, high, symmetric=symmetric), low, high


def on_grid(rows, grid):
    scale, zero_point, low, high = grid
    return dequantize(quantize(rows, scale, zero_point, low, high), scale, zero_point)


def test_code_ranges():
    assert code_range(4) == (0, 15) and code_range(8) == (0, 255)
    assert code_range(4, signed=True) == (-8, 7)
    assert code_range(4, signed=True, narrow=True) == (-7, 7)


def test_an_example_by_hand():
    """[-1, 2] in 2 bits: S = 3 / 3 = 1, Z = 0 - round(-1 / 1) = 1; the codes 0..3 are -1, 0, 1, 2."""
    scale, zero_point = scale_and_zero_point(
        torch.tensor(-1.0), torch.tensor(2.0), 0, 3, symmetric=False
    )
    assert scale == 1 and zero_point == 1
    x = torch.tensor([-1.0, -0.5, 0.0, 0.4, 0.5, 1.5, 2.0, 9.0])
    codes = quantize(x, scale, zero_point, 0, 3)
    assert codes.tolist() == [0, 1, 1, 1, 1, 3, 3, 3] and codes.dtype == torch.int32
    assert dequantize(codes, scale, zero_point).tolist() == [-1, 0, 0, 0, 0, 2, 2, 2]


# Parity with torch.


@settings(deadline=None, max_examples=100)
@given(
    SEEDS,
    st.floats(2**-20, 2**10, width=32),
    st.sampled_from([(0, 255), (-128, 127), (0, 15), (-8, 7), (0, 3)]),
    st.data(),
)
def test_fake_quantize_per_tensor_is_equal_bit_for_bit(seed, scale, codes, data):
    low, high = codes
    zero_point = data.draw(st.integers(low, high))
    x = normal(500, seed=seed) * scale * (high - low) / 2
    x[:100] = (torch.arange(100) - 50.5) * scale  # ties, as far as float32 has them
    theirs = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
    S, Z = torch.tensor(scale), torch.tensor(zero_point)
    assert torch.equal(dequantize(quantize(x, S, Z, low, high), S, Z), theirs)


@settings(deadline=None, max_examples=100)
@given(SEEDS, st.integers(1, 9), st.integers(1, 40), BITS, st.booleans(), st.booleans())
def test_fake_quantize_per_channel_is_equal_bit_for_bit(seed, rows, n, n_bits, signed, symmetric):
    x = normal(rows, n, seed=seed) * 10 ** normal(rows, 1, seed=seed + 1)
    scale, zero_point, low, high = grid_of(x, n_bits, signed=signed, symmetric=symmetric)
    theirs = torch.fake_quantize_per_channel_affine(
        x, scale.flatten(), zero_point.flatten(), 0, low, high
    )
    assert torch.equal(on_grid(x, (scale, zero_point, low, high)), theirs)


def test_torch_multiplies_by_the_inverse_and_so_do_we():
    """6.5 steps of 0.1 are a tie for the division, and lie above it for the product with 1 / 0.1."""
    differing = 0
    for scale in (0.1, 0.3, 0.7, 1.3):
        S, Z = torch.tensor(scale), torch.tensor(0)
        x = (torch.arange(-127, 127) + 0.5) * S
        theirs = torch.fake_quantize_per_tensor_affine(x, scale, 0, -128, 127)
        assert torch.equal(dequantize(quantize(x, S, Z, -128, 127), S, Z), theirs)
        differing += int((dequantize((x / S).round(), S, Z) != theirs).sum())
    assert differing > 0


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(1, 8), st.integers(1, 20), st.booleans())
def test_per_channel_scales_equal_those_of_torch_observers(seed, rows, n, symmetric):
    observer = pytest.importorskip("torch.ao.quantization.observer", reason="torch.ao is gone")
    x = normal(rows, n, seed=seed) + normal(rows, 1, seed=seed + 1)
    theirs = observer.PerChannelMinMaxObserver(
        ch_axis=0,
        dtype=torch.qint8 if symmetric else torch.quint8,
        qscheme=torch.per_channel_symmetric if symmetric else torch.per_channel_affine,
    )
    theirs(x)
    scale, zero_point = theirs.calculate_qparams()
    ours = grid_of(x, 8, signed=symmetric, symmetric=symmetric)
    assert theirs.eps < scale.min()  # below it they would take eps for the scale
    assert torch.equal(ours[0].flatten(), scale) and torch.equal(
        ours[1].flatten(), zero_point.int()
    )


# Properties of the grid.


@settings(deadline=None, max_examples=80)
@given(st.lists(FLOATS, min_size=1, max_size=30), BITS, st.booleans(), st.booleans())
def test_codes_stay_in_range_and_err_by_half_a_step(values, n_bits, signed, symmetric):
    x = torch.tensor([values])
    scale, zero_point, low, high = grid = grid_of(x, n_bits, signed=signed, symmetric=symmetric)
    codes = quantize(x, scale, zero_point, low, high)
    assert low <= codes.min() and codes.max() <= high and low <= zero_point <= high
    slack = 1e-6 * x.abs().max()  # float32's own rounding
    assert ((x - on_grid(x, grid)).abs() <= scale / 2 + slack).all()


@settings(deadline=None, max_examples=100)
@given(st.lists(FLOATS, min_size=2, max_size=30), BITS, st.booleans())
def test_larger_values_never_get_smaller_codes_and_zero_is_exact(values, n_bits, symmetric):
    x = torch.tensor([sorted(values)])
    scale, zero_point, low, high = grid_of(x, n_bits, symmetric=symmetric)
    assert (quantize(x, scale, zero_point, low, high).diff() >= 0).all()
    zero = quantize(torch.zeros(1, 1), scale, zero_point, low, high)
    assert torch.equal(zero, zero_point) and dequantize(zero, scale, zero_point) == 0


@settings(deadline=None, max_examples=60)
@given(SEEDS, BITS, st.booleans(), st.integers(-60, 60))
def test_a_power_of_two_moves_the_scale_and_no_code(seed, n_bits, symmetric, exponent):
    x = normal(4, 33, seed=seed)
    scale, zero_point, low, high = grid_of(x, n_bits, symmetric=symmetric)
    scaled = grid_of(x * 2.0**exponent, n_bits, symmetric=symmetric)
    assert torch.equal(scaled[0], scale * 2.0**exponent) and torch.equal(scaled[1], zero_point)
    assert torch.equal(
        quantize(x * 2.0**exponent, *scaled), quantize(x, scale, zero_point, low, high)
    )


@settings(deadline=None, max_examples=40)
@given(SEEDS, BITS, st.sampled_from(["row", "tensor"]), st.booleans())
def test_permuting_what_shares_a_scale_permutes_the_codes_alone(
    seed, n_bits, group_size, symmetric
):
    W = normal(3, 17, seed=seed)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(seed))
    method = Affine(n_bits, group_size, symmetric)
    before, after = method.quantize(W), method.quantize(W[:, order])
    assert torch.equal(after.integer_codes(), before.integer_codes()[:, order])
    assert torch.equal(after.scale, before.scale)
    assert torch.equal(after.zero_points(), before.zero_points())


@settings(deadline=None, max_examples=60)
@given(st.lists(FLOATS, min_size=1, max_size=30), BITS, st.booleans())
def test_what_is_on_the_grid_stays_where_it_is(values, n_bits, symmetric):
    x = torch.tensor([values])
    grid = grid_of(x, n_bits, symmetric=symmetric)
    once = on_grid(x, grid)
    assert torch.equal(on_grid(once, grid), once)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-40, 1e-37, -3.0, 0.1, 1e30])
def test_constant_values_and_single_ones(value, symmetric):
    """A constant decodes to itself within half a step; what is too small for a scale, to exact zeros."""
    for n in (1, 5):
        x = torch.full((1, n), value)
        scale, _, _, _ = grid = grid_of(x, 4, symmetric=symmetric)
        decoded = on_grid(x, grid)
        if abs(value) < 1e-38:
            assert scale == 1 and (decoded == 0).all()
        elif symmetric:
            assert ((decoded - x).abs() <= scale / 2 * 1.0001).all()
        else:
            torch.testing.assert_close(decoded, x, rtol=1e-5, atol=0)


def test_a_huge_dynamic_range_keeps_the_largest_and_loses_the_rest():
    x = torch.tensor([[1e30, -1e-30, 1.0, -1e30]])
    for symmetric in (False, True):
        decoded = on_grid(x, grid_of(x, 8, symmetric=symmetric))
        assert (decoded[0, 1:3] == 0).all()
        torch.testing.assert_close(decoded[0, ::3], x[0, ::3], rtol=0.005, atol=0)


@pytest.mark.parametrize(
    ("minimum", "maximum"),
    [(float("nan"), 1.0), (-1.0, float("inf")), (1.0, 0.5), (-3e38, 3e38)],
)
def test_ranges_that_are_no_finite_interval_are_refused(minimum, maximum):
    ends = torch.tensor([0.0, minimum]), torch.tensor([0.0, maximum])
    with pytest.raises(ValueError, match=r"the range \[.*\] is no finite float32 interval"):
        scale_and_zero_point(*ends, 0, 15, symmetric=False)


def test_a_scale_that_overflows_is_refused():
    """Codes of 1 bit have a symmetric scale above their maximum: it once was infinite."""
    with pytest.raises(ValueError, match=r"the range .* is no finite"):
        scale_and_zero_point(*(torch.tensor(3e38),) * 2, 0, 1, symmetric=True)


@pytest.mark.parametrize(("low", "high"), [(3, 3), (7, -8)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_grid_without_two_codes_is_refused(low, high, symmetric):
    """It once had an infinite scale, or a negative one."""
    ends = torch.tensor(-1.0), torch.tensor(1.0)
    with pytest.raises(ValueError, match=f"codes {low}..{high} spans no range"):
        scale_and_zero_point(*ends, low, high, symmetric=symmetric)


def test_values_and_scales_without_codes_are_refused():
    one, zero = torch.tensor(1.0), torch.tensor(0)
    for bad in (float("nan"), float("-inf")):
        with pytest.raises(ValueError, match="1 of 2 values to quantize are NaN or infinite"):
            quantize(torch.tensor([bad, 1.0]), one, zero, 0, 15)
    for bad in (0.0, -1.0, float("nan"), float("inf"), 1e-40):
        with pytest.raises(ValueError, match="has to be positive, finite"):
            quantize(one, torch.tensor(bad), zero, 0, 15)


# Rounding.


def test_ties_go_to_the_even_code_or_away_from_zero():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49999997, 8388609.0])
    assert round_codes(x).tolist() == [-2, -2, 0, 0, 2, 2, 0, 8388609]
    assert round_codes(x, "half_away").tolist() == [-3, -2, -1, 1, 2, 3, 0, 8388609]
    codes = quantize(x[:6], torch.tensor(1.0), torch.tensor(0), -8, 7, rounding="half_away")
    assert codes.tolist() == [-3, -2, -1, 1, 2, 3]


def test_stochastic_rounding_is_right_on_average_and_repeatable():
    x = torch.tensor([-1.25, 0.1, 0.5, 2.0]).expand(20_000, 4)
    drawn = round_codes(x, "stochastic", torch.Generator().manual_seed(0))
    assert ((drawn == x.floor()) | (drawn == x.ceil())).all()
    torch.testing.assert_close(drawn.mean(0), x[0], rtol=0, atol=0.015)
    again = round_codes(x, "stochastic", torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


# The weight as it is stored.


@settings(deadline=None, max_examples=100)
@given(SEEDS, BITS, st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), st.booleans())
def test_codes_and_zero_points_survive_packing(seed, n_bits, out, groups, size, with_zero_point):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**n_bits, (out, groups * size), generator=generator)
    zero_point = torch.randint(0, 2**n_bits, (out, groups), generator=generator)
    scale = torch.rand(out, groups, generator=generator) + 0.1
    weight = AffineWeight.from_codes(codes, scale, zero_point if with_zero_point else None, n_bits)
    assert torch.equal(weight.integer_codes(), codes.to(torch.uint8))
    expected = zero_point if with_zero_point else torch.full_like(zero_point, 2 ** (n_bits - 1))
    assert torch.equal(weight.zero_points(), expected.int())
    assert weight.shape == codes.shape
    assert weight.codes.shape == (out, -(-groups * size * n_bits // 8))
    Z, S = (t.repeat_interleave(size, 1) for t in (expected, scale))
    torch.testing.assert_close(weight.dequantize(), (codes - Z) * S, rtol=0, atol=0)


def test_bits_per_weight_count_scales_and_zero_points():
    W = normal(32, 512)
    assert get_method("affine").quantize(W).bits_per_weight == 4 + (16 + 4) / 64
    assert Affine(symmetric=True).quantize(W).bits_per_weight == 4 + 16 / 64
    padded = Affine(n_bits=3, group_size=128).quantize(W)  # a row's four zero points take 2 bytes
    assert padded.bits_per_weight == 3 + (4 * 16 + 16) / 512
    assert Affine(scale_dtype="float32").quantize(W).bits_per_weight == 4 + (32 + 4) / 64
    assert Affine(n_bits=8, group_size="row").quantize(W).bits_per_weight == 8 + 24 / 512
    assert Affine(group_size="tensor", symmetric=True).quantize(W).nbytes == 32 * 512 // 2 + 2


@settings(deadline=None, max_examples=40)
@given(
    SEEDS,
    BITS,
    st.sampled_from([1, 7, 21, "row", "tensor"]),
    st.booleans(),
    st.sampled_from(["minmax", "percentile"]),
)
def test_weights_err_by_half_a_step(seed, n_bits, group_size, symmetric, weight_range):
    """With the scale as stored; nothing is clipped, as 0.01% of so few weights is none."""
    W = normal(6, 21, seed=seed) * 0.05
    method = Affine(n_bits, group_size, symmetric, weight_range, scale_dtype="float32")
    weight = method.quantize(W)
    steps = weight.scale.repeat_interleave(21 // weight.scale.shape[1], 1)
    assert ((weight.dequantize() - W).abs() <= steps / 2 * 1.0001).all()
    codes = weight.integer_codes()
    assert int(codes.max()) < 2**n_bits and codes.shape == W.shape


def test_codes_are_computed_with_the_scale_as_stored():
    W = normal(64, 128)
    weight = Affine(n_bits=8, symmetric=True).quantize(W)
    S = weight.scale.float().repeat_interleave(64, 1)
    expected = ((W * (1 / S)).round() + 128).clamp(0, 255)
    assert torch.equal(weight.integer_codes().float(), expected)
    assert not torch.equal(S, Affine(n_bits=8, symmetric=True, scale_dtype="float32")
                           .quantize(W).scale.repeat_interleave(64, 1))  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.sampled_from([8, "row"]), st.sampled_from(["minmax", "mse", "percentile"]))
def test_rows_are_quantized_one_by_one_and_groups_too(seed, group_size, weight_range):
    W = normal(5, 24, seed=seed)
    method = Affine(group_size=group_size, weight_range=weight_range)
    whole = method.quantize(W).dequantize()
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(method.quantize(W[order]).dequantize(), whole[order])
    if group_size == 8:
        swapped = torch.cat([W[:, 16:], W[:, :16]], 1)
        assert torch.equal(
            method.quantize(swapped).dequantize(), torch.cat([whole[:, 16:], whole[:, :16]], 1)
        )


def test_smaller_groups_more_bits_and_the_search_lower_the_error():
    W = normal(64, 256, seed=3) * (0.2 + torch.rand(64, 1))

    def error(**settings):
        return (Affine(**settings).quantize(W).dequantize() - W).square().mean().item()

    by_size = [error(group_size=size) for size in (16, 64, "row", "tensor")]
    assert by_size == sorted(by_size)
    by_bits = [error(n_bits=n_bits) for n_bits in range(8, 1, -1)]
    assert by_bits == sorted(by_bits)
    for size in (64, "row", "tensor"):
        assert error(group_size=size, weight_range="mse") < error(group_size=size)
    W[0, 0] = 50.0  # one of 16,384: the percentile leaves it out, and all others are the better off
    settings = {"n_bits": 8, "group_size": "tensor", "symmetric": True}
    clipped = Affine(weight_range="percentile", **settings).quantize(W).dequantize()[1:]
    kept = Affine(**settings).quantize(W).dequantize()[1:]
    assert (clipped - W[1:]).square().mean() < (kept - W[1:]).square().mean() / 10


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_rows_zero_groups_and_constant_ones_are_exact_or_close(symmetric):
    W = normal(4, 16)
    W[0], W[1, :8], W[2] = 0, 0, -0.75
    decoded = Affine(8, 8, symmetric).quantize(W).dequantize()
    assert (decoded[0] == 0).all() and (decoded[1, :8] == 0).all()
    torch.testing.assert_close(decoded[2], W[2], rtol=0.005, atol=0)


# Inputs.


def float_product(weight, x, bias=None):
    return F.linear(x, weight.dequantize(), bias)


@settings(deadline=None, max_examples=40)
@given(
    SEEDS,
    st.tuples(st.integers(0, 9), st.integers(1, 40), st.integers(1, 20)),
    BITS,
    st.sampled_from(["row", "tensor"]),
    st.booleans(),
)
def test_integer_products_equal_the_float_product_of_what_was_quantized(
    seed, shape, n_bits, group_size, symmetric
):
    tokens, columns, out = shape
    x, W = normal(tokens, columns, seed=seed) + 0.3, normal(out, columns, seed=seed + 1)
    method = Affine(n_bits, group_size, symmetric, inputs="per_token")
    weight = method.quantize(W)
    decoded = on_grid(x, grid_of(x, 8, signed=True, symmetric=symmetric)) if tokens else x
    expected = float_product(weight, decoded)
    tolerance = 1e-5 * columns * float(weight.dequantize().abs().max() * 4)
    torch.testing.assert_close(method.linear(x, weight, None), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("input_range", OBSERVERS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_static_inputs_use_the_grid_that_calibration_found(input_range, symmetric):
    x, W = normal(300, 32) + 0.5, normal(8, 32, seed=1)
    method = Affine(8, "row", symmetric, inputs="static", input_range=input_range)
    statistics = method.new_statistics(32, torch.device("cpu"))
    for piece in x.chunk(3):
        statistics.update(piece)
    weight = method.quantize(W, statistics)
    low, high = code_range(8, signed=True)
    grid = scale_and_zero_point(*statistics.range(), low, high, symmetric=symmetric)
    assert weight.input_scale == grid[0]
    assert weight.input_zero_point is None if symmetric else weight.input_zero_point == grid[1]
    y = method.linear(x, weight, None)
    torch.testing.assert_close(
        y, float_product(weight, on_grid(x, (*grid, low, high))), rtol=0, atol=1e-3
    )
    assert (y - x @ W.T).norm() / (x @ W.T).norm() < 0.1


def test_float_inputs_and_no_statistics_unless_static():
    x, W, bias = normal(5, 64), normal(8, 64, seed=1), normal(8, seed=2)
    method = Affine()
    weight = method.quantize(W)
    torch.testing.assert_close(method.linear(x, weight, bias), float_product(weight, x, bias))
    assert not method.wants_statistics
    assert not method.needs_calibration and Affine(8, "row", inputs="static").needs_calibration


@pytest.mark.parametrize("inputs", ["float", "per_token", "static"])
def test_bias_is_added_once_and_half_precision_keeps_its_dtype(inputs):
    x, W, bias = normal(5, 64), normal(8, 64, seed=1), normal(8, seed=2)
    method = Affine(8, "row", inputs=inputs)
    statistics = method.new_statistics(64, torch.device("cpu"))
    if statistics:
        statistics.update(x)
    weight = method.quantize(W.half(), statistics)
    added = method.linear(x, weight, bias) - method.linear(x, weight, None)
    torch.testing.assert_close(added, bias.expand(5, 8), rtol=0, atol=1e-5)
    assert method.linear(x.half(), weight, bias.half()).dtype == torch.float16


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("inputs", ["float", "per_token"])
def test_nonfinite_activations_are_not_hidden_and_stay_in_their_row(inputs, bad):
    x, W = normal(3, 8), normal(4, 8, seed=1)
    method = Affine(8, "row", inputs=inputs)
    weight = method.quantize(W)
    clean = method.linear(x, weight, None)
    x[1, 2] = bad
    y = method.linear(x, weight, None)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


# Whole models.


@pytest.mark.parametrize(
    "method",
    [
        Affine(),
        Affine(3, "row", symmetric=True, scale_dtype="float32"),
        Affine(8, "tensor", inputs="per_token"),
        Affine(8, "row", inputs="static", input_range="percentile"),
    ],
)
@torch.no_grad()
def test_course_lm_survives_saving_and_loading(method, tmp_path):
    model, tokenizer = load_model("course-lm")
    tokens = calibration_tokens(tokenizer, 2, 32)
    reference = model(tokens).logits
    report = quantize_model(model, method, calibration=tokens)
    logits = model(tokens).logits
    assert report.bits_per_weight < method.n_bits + 1
    error = ((logits - reference).norm() / reference.norm()).item()
    assert 0 < error < (0.1 if method.n_bits == 8 else 0.5)

    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, logits)
    assert tensor_bytes(loaded) == tensor_bytes(model)


# Bad input.


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.tensor([[1.0, float("nan")]]), ValueError, r"1 of 2 weights.*nan at \[0, 1\]"),
        (torch.tensor([[float("-inf"), 1.0]]), ValueError, r"-inf at \[0, 0\]"),
        (torch.zeros(0, 4), ValueError, r"\(0, 4\)"),
        (torch.zeros(2, 2, dtype=torch.int8), TypeError, r"torch\.int8"),
    ],
)
def test_bad_weights_are_refused_with_their_value(weight, error, message):
    with pytest.raises(error, match=message):
        Affine(group_size="row").quantize(weight)


def test_a_group_that_does_not_divide_is_refused_with_those_that_do():
    with pytest.raises(
        ValueError, match=r"group_size 128 .* the 576 columns .* 96, 72, 64 or 'row'"
    ):
        Affine(group_size=128).quantize(torch.ones(2, 576))
    with pytest.raises(ValueError, match=r"group_size 64 .* 7 columns .* use 7, 1 or 'row'"):
        Affine().quantize(torch.ones(2, 7))


@pytest.mark.parametrize(("size", "becomes"), [(1e7, "inf"), (1e-6, "5.96e-08"), (1e-9, "0")])
def test_scales_that_float16_cannot_hold_are_refused(size, becomes):
    W = normal(4, 64)
    W[2] = torch.linspace(0, size, 64)
    with pytest.raises(ValueError, match=rf"1 of 4 scales .* become {becomes}: .*'float32'"):
        Affine().quantize(W)
    decoded = Affine(scale_dtype="float32").quantize(W).dequantize()
    torch.testing.assert_close(decoded[2], W[2], rtol=0, atol=size / 29)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_bits": 1}, "n_bits 1: choose 2 to 8"),
        ({"n_bits": 9}, "n_bits 9"),
        ({"n_bits": 4.0}, r"n_bits 4\.0: choose 2 to 8"),
        ({"group_size": 0}, "group_size 0: choose a positive"),
        ({"group_size": "channel"}, "group_size 'channel'"),
        ({"group_size": True}, "group_size True"),
        ({"weight_range": "best"}, "weight_range 'best': choose one of minmax, mse, percentile"),
        ({"inputs": "int8"}, "inputs 'int8': choose one of float, per_token, static"),
        ({"input_range": "kl"}, "input_range 'kl': choose one of minmax, moving_average"),
        ({"scale_dtype": "bfloat16"}, "scale_dtype 'bfloat16'"),
        ({"inputs": "per_token"}, "group_size 64 would put a scale inside the sum.*'row'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        get_method("affine", **settings)
    assert type(get_method("affine")) is Affine


def test_static_inputs_without_calibration_are_refused():
    with pytest.raises(ValueError, match=r"inputs='static' needs.*calibration"):
        Affine(8, "row", inputs="static").quantize(torch.ones(2, 2))


def test_parts_that_do_not_fit_together_are_refused():
    codes, scale = torch.ones(4, 6, dtype=torch.uint8), torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"scale \(4, 4\) does not divide codes \(4, 6\)"):
        AffineWeight.from_codes(codes, torch.ones(4, 4), None, 4)
    with pytest.raises(ValueError, match=r"zero_point \(4, 1\) and scale \(4, 2\)"):
        AffineWeight.from_codes(codes, scale, torch.ones(4, 1, dtype=torch.int32), 4)
    with pytest.raises(TypeError, match=r"torch\.float64"):
        AffineWeight.from_codes(codes, scale.double(), None, 4)
    with pytest.raises(ValueError, match="n_bits 17"):
        code_range(17)
    with pytest.raises(ValueError, match=r"n_bits 4\.0: a code has a whole"):
        code_range(4.0)
    with pytest.raises(ValueError, match="narrow range is one of signed codes"):
        code_range(4, narrow=True)
    with pytest.raises(ValueError, match="rounding 'down': choose 'half_even'"):
        round_codes(torch.ones(1), "down")
