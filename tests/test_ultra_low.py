"""Grids of 1 to 4 bits without a zero: least squares, theory, planes, the column loop, what is refused."""

from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import some_tokens, tiny_gpt2, tiny_llama

from course_utils.compression import get_method, quantize_model
from course_utils.compression.hessian import Hessian
from course_utils.compression.rotation import randomized_hadamard, rotated
from course_utils.models import linear_layers, load_model
from course_utils.quantizers.ultra_low import (
    NORMAL_HALF_STEPS,
    least_squares_scale,
    uniform_levels,
)

LEVELS = ("uniform", "lloyd_max")
# Least squared error of 2^b levels for the unit normal distribution (Lloyd-Max), and evenly spaced
LLOYD_MAX = {1: 0.36338, 2: 0.11748, 3: 0.03455, 4: 0.00950}
EVEN = {1: 0.36338, 2: 0.118846, 3: 0.037440, 4: 0.011543}


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantiles(n):
    """`n` values `[1, n]`, each of which stands for an equal share of the normal distribution."""
    inverse = NormalDist().inv_cdf
    return torch.tensor([[inverse((i + 0.5) / n) for i in range(n)]])


def method(**settings):
    return get_method("ultra_low", **{"scale_dtype": "float32"} | settings)


def back(weight, **settings):
    return method(**settings).quantize(weight).dequantize()


def relative_error(weight, approximation):
    difference = (weight - approximation).double()
    return (difference.square().sum() / weight.double().square().sum()).item()


# One bit


def test_one_bit_by_hand():
    weight = torch.tensor([[1.0, -0.5, 0.0], [-2.0, 0.5, 2.0]])
    quantized = method().quantize(weight)
    assert quantized.dequantize().tolist() == [[1, -1, 1], [-1, 1, 1]]  # 6 / 6; sign(0) is +1
    assert quantized.integer_codes().tolist() == [[[1, 0, 1], [0, 1, 1]]]
    rows = back(weight, group_size="row")
    assert rows.tolist() == [[0.5, -0.5, 0.5], [-1.5, 1.5, 1.5]]


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 40), st.floats(1e-6, 1e6))
@settings(deadline=None, max_examples=40)
def test_alpha_is_the_least_squares_answer(seed, out, columns, size):
    weight = normal(out, columns, seed=seed, scale=size).double()
    values = back(weight.float()).double()
    signs, alpha = values.sign(), values.abs().max()
    assert alpha == pytest.approx(weight.abs().mean().item(), rel=1e-5)
    rest, power, n = weight - values, weight.square().sum(), weight.numel()
    assert abs((rest * signs).sum()) <= 1e-4 * weight.abs().sum()  # orthogonal to the signs
    expected = power - n * alpha**2
    assert rest.square().sum() == pytest.approx(expected.item(), rel=1e-3, abs=1e-4 * power.item())
    for factor in (0.9, 1.1):
        assert (weight - factor * values).square().sum() >= rest.square().sum()


@pytest.mark.parametrize("group_size", ["tensor", "row", 5])
def test_with_one_bit_fitted_levels_are_alpha_too(group_size):
    weight = normal(6, 20)
    of_levels = [back(weight, levels=levels, group_size=group_size) for levels in LEVELS]
    if group_size == "tensor":
        torch.testing.assert_close(*of_levels)
    else:  # one level for all groups, and a scale that makes up for it
        torch.testing.assert_close(*of_levels, rtol=1e-5, atol=1e-6)


# Theory


@pytest.mark.parametrize(("levels", "theory"), [("uniform", EVEN), ("lloyd_max", LLOYD_MAX)])
@pytest.mark.parametrize("n_bits", [1, 2, 3, 4])
def test_distortion_of_the_normal_distribution_is_that_of_theory(levels, theory, n_bits):
    weight = quantiles(50_001)
    error = relative_error(weight, back(weight, levels=levels, n_bits=n_bits))
    assert error == pytest.approx(theory[n_bits], rel=4e-3)
    drawn = normal(300, 400, seed=n_bits)
    sampled = relative_error(drawn, back(drawn, levels=levels, n_bits=n_bits))
    assert sampled == pytest.approx(theory[n_bits], rel=0.02)


@pytest.mark.parametrize("n_bits", [1, 2, 3, 4])
def test_the_search_begins_at_the_best_step_of_the_normal_distribution(n_bits):
    levels = uniform_levels(n_bits)
    found = least_squares_scale(quantiles(50_001), levels, NORMAL_HALF_STEPS[n_bits])
    assert found.item() == pytest.approx(NORMAL_HALF_STEPS[n_bits], rel=4e-3)


def test_rotating_normal_weights_changes_nothing_and_outliers_much():
    weight, Q = normal(256, 192), randomized_hadamard(192, 0).float()
    assert back(weight @ Q, n_bits=2).isfinite().all()
    for w, gains in ((weight, False), (weight * (1 + 20.0 * (torch.arange(192) % 48 == 0)), True)):
        plain = relative_error(w, back(w, n_bits=2, group_size="row"))
        turned = relative_error(w @ Q, back(w @ Q, n_bits=2, group_size="row"))
        kurtosis = [
            ((x.pow(4).mean(1) / x.square().mean(1).square()).mean().item()) for x in (w, w @ Q)
        ]
        if gains:
            assert turned < 0.6 * plain and kurtosis[0] > 20 and kurtosis[1] < 4
        else:
            assert turned == pytest.approx(plain, rel=0.02)
            assert kurtosis == pytest.approx([3, 3], abs=0.1)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_randomized_hadamard_matrix_leaves_the_logits(make, seed):
    model = make().double().eval()  # width 24 = 12 * 2
    Q = randomized_hadamard(24, seed)
    torch.testing.assert_close(Q @ Q.T, torch.eye(24, dtype=torch.float64))
    torch.testing.assert_close(Q.abs(), torch.full_like(Q, 24**-0.5))
    with torch.no_grad():
        both = [m(input_ids=some_tokens()).logits for m in (model, rotated(model, Q))]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)


def test_seeds_and_sizes_of_randomized_hadamard_matrices():
    assert torch.equal(randomized_hadamard(576, 1), randomized_hadamard(576, 1))
    assert not torch.equal(randomized_hadamard(576, 1), randomized_hadamard(576, 2))
    with pytest.raises(ValueError, match="no Hadamard matrix of size 18 here"):
        randomized_hadamard(18, 0)


# Any grid

GRIDS = st.fixed_dictionaries({
    "n_bits": st.integers(1, 4), "levels": st.sampled_from(LEVELS), "planes": st.integers(1, 2),
    "group_size": st.sampled_from(["tensor", "row", 1, 4, 12]),
})  # fmt: skip


@given(st.integers(0, 2**31), GRIDS, st.sampled_from([0.25, 8.0, 2.0**-40]))
@settings(deadline=None, max_examples=60)
def test_scaling_and_turning_the_sign_go_through(seed, grid, factor):
    weight = normal(5, 12, seed=seed)
    quantized = back(weight, **grid)
    assert torch.equal(back(factor * weight, **grid), factor * quantized)
    if grid["planes"] == 1:  # a second plane meets rests of exactly 0, whose sign is +
        assert torch.equal(back(-weight, **grid), -quantized)


@given(st.integers(0, 2**31), GRIDS, st.integers(1, 9), st.sampled_from([12, 24, 36]))
@settings(deadline=None, max_examples=60)
def test_bytes_decode_to_few_symmetric_values_and_each_weight_to_its_nearest(
    seed, grid, out, columns
):
    weight = normal(out, columns, seed=seed)
    quantized = method(**grid).quantize(weight)
    assert quantized.shape == (out, columns)
    codes = quantized.integer_codes()
    assert codes.shape == (grid["planes"], out, columns) and codes.max() < 2 ** grid["n_bits"]
    assert quantized.codes.shape[2] == -(-columns * grid["n_bits"] // 8)
    values = quantized.dequantize()
    assert relative_error(weight, values) < 0.75
    if grid["planes"] == 1:
        width = {"tensor": weight.numel(), "row": columns}.get(
            grid["group_size"], grid["group_size"]
        )
        of_groups = zip(weight.flatten().split(width), values.flatten().split(width), strict=True)
        for w, q in of_groups:
            assert len(q.abs().unique()) <= 2 ** (grid["n_bits"] - 1)
            assert ((w >= 0) == (q > 0)).all()
            distances = (w[:, None] - torch.cat([q, -q])[None]).abs().amin(1)
            assert ((w - q).abs() <= distances + 1e-5).all()


@given(st.integers(0, 2**31), st.integers(2, 30))
@settings(deadline=None, max_examples=40)
def test_the_scale_of_two_bits_is_close_to_the_best_of_all(seed, n):
    w = normal(1, n, seed=seed)
    sizes = w.abs().flatten().sort().values.double()
    tried = []
    for k in range(n + 1):  # so many go to the small level, the others to three times that
        level = torch.where(torch.arange(n) < k, 1.0, 3.0).double()
        tried.append((sizes * level).sum() ** 2 / level.square().sum())
    best = (sizes.square().sum() - max(tried)) / sizes.square().sum()
    assert relative_error(w, back(w, n_bits=2)) <= 2 * best.item() + 0.02


@pytest.mark.parametrize("n_bits", [1, 2, 3, 4])
def test_no_scale_of_the_search_is_worse_than_its_beginning(n_bits):
    weight = normal(64, 96).pow(3)
    levels = uniform_levels(n_bits)
    found = relative_error(weight, back(weight, n_bits=n_bits, group_size="row"))
    start = NORMAL_HALF_STEPS[n_bits] * weight.square().mean(1, keepdim=True).sqrt()
    size = (weight.abs() / start / 2 + 0.5).floor().clamp(1, len(levels)) * 2 - 1
    size = ((weight.abs() / start + 1) / 2).floor().clamp(0, len(levels) - 1) * 2 + 1
    assert found <= relative_error(weight, weight.sign() * size * start) + 1e-6


def test_a_second_plane_of_one_bit_leaves_what_theory_says():
    weight = quantiles(50_001)
    two = method(planes=2).quantize(weight)
    error = relative_error(weight, two.dequantize())
    assert error == pytest.approx(0.1307, rel=4e-3)  # four levels of least error leave 0.1175
    assert two.scale.flatten().tolist() == pytest.approx([0.798, 0.483], abs=1e-3)
    assert len(two.dequantize().unique()) == 4


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("n_bits", [1, 2, 3, 4])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("group_size", ["tensor", "row", 3])
def test_zeros_and_constants_come_back_exactly(levels, n_bits, planes, group_size):
    grid = {"levels": levels, "n_bits": n_bits, "planes": planes, "group_size": group_size}
    assert not back(torch.zeros(3, 6), **grid).any()
    constant = torch.full((3, 6), -0.75)
    torch.testing.assert_close(back(constant, **grid), constant)
    mixed = constant.clone()
    mixed[1] = 0  # a row of zeros among others
    if group_size != "tensor":
        torch.testing.assert_close(back(mixed, **grid), mixed)


def test_a_second_plane_of_next_to_nothing_is_left_out():
    weight = normal(4, 6, scale=0.01)
    made = get_method("ultra_low", planes=2, group_size=1)  # all that is left is alpha in float16
    torch.testing.assert_close(made.quantize(weight).dequantize(), weight, rtol=1e-3, atol=4e-6)


def test_bits_per_weight_are_measured():
    weight = normal(64, 256)
    bits = {
        "tensor": method(group_size="tensor"),
        "row": get_method("ultra_low", group_size="row"),
        "group": get_method("ultra_low", n_bits=2, group_size=64),
        "planes": get_method("ultra_low", planes=2, group_size=64),
        "fitted": get_method("ultra_low", n_bits=3, levels="lloyd_max", group_size=64),
    }
    found = {name: m.quantize(weight).bits_per_weight for name, m in bits.items()}
    n = weight.numel()
    expected = {"tensor": 1 + 32 / n, "row": 1 + 16 / 256, "group": 2 + 16 / 64}
    expected |= {"planes": 2 + 32 / 64, "fitted": 3 + 16 / 64 + 4 * 32 / n}
    assert found == pytest.approx(expected)
    assert get_method("ultra_low").quantize(normal(3, 5)).bits_per_weight == 8 * (3 + 2) / 15


@pytest.mark.parametrize("n_bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group_size", ["tensor", "row", 32])
def test_packed_products_are_those_of_the_decoded_weight(n_bits, group_size):
    weight, x = normal(24, 64), normal(5, 64, seed=1)
    made = method(n_bits=n_bits, group_size=group_size)
    quantized = made.quantize(weight)
    assert torch.equal(quantized.grouped().dequantize(), quantized.dequantize())
    y = made.linear(x, quantized, torch.ones(24))
    torch.testing.assert_close(y, x @ quantized.dequantize().T + 1, rtol=1e-4, atol=1e-4)


# Models


@pytest.mark.parametrize(
    "grid",
    [
        {},
        {"n_bits": 2, "levels": "lloyd_max", "group_size": 64},
        {"planes": 2, "group_size": "row"},
        {"n_bits": 2, "group_size": 64, "compensate": True},
    ],
)
def test_a_model_is_quantized_saved_and_loaded(grid, tmp_path):
    model, tokenizer = load_model("course-lm")
    made = get_method("ultra_low", **grid)
    tokens = torch.arange(1200).view(4, 300) % 1000
    report = quantize_model(
        model, made, calibration=tokens[:, :256] if made.needs_calibration else None
    )
    assert report.bits_per_weight < 2.6
    if grid:
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        again, _ = load_model(str(tmp_path))
        with torch.no_grad():
            assert torch.equal(model(tokens[:1, :20]).logits, again(tokens[:1, :20]).logits)


# The column loop


def inputs(columns, tokens=400, seed=5):
    """Inputs whose features have much to do with each other."""
    mix = normal(columns, columns, seed=seed) / columns**0.5
    return normal(tokens, columns, seed=seed + 1) @ (torch.eye(columns) + 2 * mix)


def hessian_of(x):
    statistics = Hessian(x.shape[1])
    statistics.update(x)
    return statistics


def plain_loop(weight, H, alpha):
    """GPTQ for one bit with a fixed scale, as slowly and plainly as can be."""
    W, H = weight.double().clone(), H.clone()
    H += 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    for i in range(W.shape[1]):
        inverse = torch.linalg.inv(H[i:, i:])
        q = torch.where(W[:, i] >= 0, alpha, -alpha)
        error = (W[:, i] - q) / inverse[0, 0]
        W[:, i + 1 :] -= error[:, None] * inverse[0, 1:]
        W[:, i] = q
    return W


@pytest.mark.parametrize("columns", [20, 150])  # within a block of 128, and beyond
def test_compensation_is_gptq_s_loop(columns):
    weight, statistics = normal(7, columns), hessian_of(inputs(columns))
    found = method(compensate=True).quantize(weight, statistics).dequantize()
    expected = plain_loop(weight, statistics.matrix(), weight.abs().mean().double())
    assert (found.double() - expected).abs().max() < 1e-5


@pytest.mark.parametrize("group_size", ["tensor", "row", 16, 96])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("levels", LEVELS)
def test_compensation_lowers_the_output_error(group_size, planes, levels):
    weight, x = normal(48, 192), inputs(192, tokens=1000)
    grid = {"n_bits": 2, "group_size": group_size, "planes": planes, "levels": levels}
    y = x @ weight.T
    plain = relative_error(y, x @ back(weight, **grid).T)
    made = method(compensate=True, **grid)
    loop = made.quantize(weight, hessian_of(x))
    repaired = relative_error(y, x @ loop.dequantize().T)
    assert repaired < 0.7 * plain
    assert made.output_error(weight, loop.dequantize(), hessian_of(x)) == pytest.approx(
        repaired, rel=1e-3
    )
    assert loop.nbytes == method(**grid).quantize(weight).nbytes


def test_a_feature_that_was_always_zero_is_rounded_to_its_nearest_code():
    weight, x = normal(6, 32), inputs(32)
    x[:, 3] = 0
    found = method(compensate=True, group_size="row").quantize(weight, hessian_of(x)).dequantize()
    assert torch.equal(found[:, 3], back(weight, group_size="row")[:, 3])


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_bits": 5}, "n_bits 5: choose one of 1, 2, 3, 4"),
        ({"n_bits": True}, "n_bits True: choose one of 1, 2, 3, 4"),
        ({"levels": "nf"}, "levels 'nf': choose one of uniform, lloyd_max"),
        ({"planes": 3}, "planes 3: choose one of 1, 2"),
        ({"compensate": "false"}, "compensate 'false': choose one of False, True"),
        ({"scale_dtype": "bfloat16"}, "scale_dtype 'bfloat16': choose one of float16, float32"),
        ({"group_size": 0}, "group_size 0: choose a positive number, or 'row' or 'tensor'"),
        ({"damping": -1}, "damping -1 must be 0 or positive"),
    ],
)
def test_settings_that_there_are_not_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        get_method("ultra_low", **settings)


def test_what_does_not_fit_is_refused_with_the_remedy():
    weight = normal(4, 10)
    with pytest.raises(
        ValueError, match=r"group_size 4 does not divide the 10 columns .* use 2, 1"
    ):
        back(weight, group_size=4)
    with pytest.raises(
        ValueError, match=r"compensate=True needs the Hessian .* calibration, or use"
    ):
        back(weight, compensate=True)
    with pytest.raises(ValueError, match="1 of 40 weights are not finite in float32"):
        back(weight.index_fill(0, torch.tensor([0]), 1.0).index_put(
            (torch.tensor([2]), torch.tensor([3])), torch.tensor(torch.nan)))  # fmt: skip
    with pytest.raises(ValueError, match=r"scales do not fit into float16.*scale_dtype='float32'"):
        get_method("ultra_low").quantize(1e6 * weight)
    assert back(1e30 * weight).isfinite().all()
    model, _ = load_model("course-lm")
    with pytest.raises(ValueError, match="does not divide"):
        quantize_model(model, get_method("ultra_low", group_size=48))
    assert len(linear_layers(model)) > 0  # untouched
