"""Fake quantization and LSQ: values and gradients of torch's operators, and the paper's equations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course_utils.grids.fake_quantization import fake_quantize, learned_step, straight_through
from course_utils.grids.uniform import code_range, dequantize, quantize

SEEDS = st.integers(0, 2**31)


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(y, gradient, *inputs):
    return torch.autograd.grad(y, inputs, gradient)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 200), st.integers(2, 8), st.floats(0.01, 2), st.integers(0, 3), SEEDS)
def test_fake_quantize_equals_torch_for_a_tensor(n, n_bits, scale, zero_point, seed):
    x = draw(n, seed=seed).requires_grad_()
    gradient = draw(n, seed=seed + 1)
    S, Z = torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32)
    low, high = code_range(n_bits)
    y = fake_quantize(x, S, Z, low, high)
    theirs = torch.fake_quantize_per_tensor_affine(x, S, Z, low, high)
    assert torch.equal(y, theirs)
    assert torch.equal(*gradients(y, gradient, x), *gradients(theirs, gradient, x))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 50), st.integers(2, 8), SEEDS)
def test_fake_quantize_equals_torch_for_rows(rows, columns, n_bits, seed):
    x = draw(rows, columns, seed=seed).requires_grad_()
    gradient = draw(rows, columns, seed=seed + 1)
    low, high = code_range(n_bits, signed=True)
    S = draw(rows, seed=seed + 2).abs() / high + 1e-3
    Z = draw(rows, seed=seed + 3).round().clamp(low, high).int()
    y = fake_quantize(x, S[:, None], Z[:, None], low, high)
    theirs = torch.fake_quantize_per_channel_affine(x, S, Z, 0, low, high)
    assert torch.equal(y, theirs)
    assert torch.equal(*gradients(y, gradient, x), *gradients(theirs, gradient, x))


def test_fake_quantize_by_hand():
    """S = 1, codes 0..3: half a step beyond an end still rounds to it, and has a gradient."""
    x = torch.tensor([-0.6, -0.5, -0.4, 0.2, 1.7, 3.4, 3.6], requires_grad=True)
    y = fake_quantize(x, torch.tensor(1.0), torch.tensor(0), 0, 3)
    assert y.tolist() == [0, 0, 0, 0, 2, 3, 3]
    (found,) = gradients(y, torch.ones(7), x)
    assert found.tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_straight_through_is_the_value_with_the_other_gradient():
    value = torch.tensor([0.1, 1e-30, 3.0], requires_grad=True)
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    y = straight_through(value, x * x)
    assert torch.equal(y, value)
    of_value, of_x = torch.autograd.grad(y.sum(), (value, x), allow_unused=True)
    assert of_value is None and of_x.tolist() == [2, 4, 6]
    with pytest.raises(ValueError, match=r"\(3,\).*\(1, 3\)"):
        straight_through(value, x[None])


def equation_3(x, step, low, high):
    """d v^ / d s for one number, as the paper writes it, with -Q_N = low and Q_P = high."""
    ratio = x / step
    if ratio <= low:
        return low
    if ratio >= high:
        return high
    return -ratio + round(ratio)  # Python rounds a tie to even, too


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(2, 8), SEEDS)
def test_gradients_of_learned_step_are_the_papers(out, groups, size, n_bits, seed):
    x = draw(out, groups, size, seed=seed).requires_grad_()
    low, high = code_range(n_bits, signed=True)
    step = (draw(out, groups, 1, seed=seed + 1).abs() * 2 / high + 1e-2).requires_grad_()
    gradient = draw(out, groups, size, seed=seed + 2)
    of_x, of_step = gradients(learned_step(x, step, low, high), gradient, x, step)
    for i in range(out):
        for j in range(groups):
            s = step[i, j, 0].item()
            terms = [
                g * equation_3(v, s, low, high)
                for v, g in zip(x[i, j].tolist(), gradient[i, j].tolist(), strict=True)
            ]
            expected = sum(terms) / math.sqrt(size * high)
            # float32 can round a ratio that lies next to a tie to the other side: then a term is off by 1
            assert of_step[i, j, 0].item() == pytest.approx(expected, rel=1e-4, abs=1e-3)
    inside = (low < x / step) & (x / step < high)
    torch.testing.assert_close(of_x, gradient * inside, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(2, 8), SEEDS)
def test_learned_step_is_the_grid_and_its_codes_bit_for_bit(rows, columns, n_bits, seed):
    x = draw(rows, columns, seed=seed)
    low, high = code_range(n_bits, signed=True)
    step = draw(rows, 1, seed=seed + 1).abs() / high + 1e-3
    zero = torch.tensor(0)
    expected = dequantize(quantize(x, step, zero, low, high), step, zero)
    assert torch.equal(learned_step(x, step, low, high), expected)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(2, 8), SEEDS)
def test_learned_step_equals_torchs_learnable_operator(rows, columns, n_bits, seed):
    """But half a step beyond the ends, which torch counts as inside and the paper as outside."""
    x = draw(rows, columns, seed=seed).requires_grad_()
    low, high = code_range(n_bits, signed=True)
    step = (draw(rows, seed=seed + 1).abs() * 2 / high + 1e-2).requires_grad_()
    ratio = (x / step[:, None]).detach()
    beyond = ((ratio <= low) & (ratio > low - 0.6)) | ((ratio >= high) & (ratio < high + 0.6))
    gradient = draw(rows, columns, seed=seed + 2).masked_fill(beyond, 0)
    factor = 1 / math.sqrt(columns * high)
    theirs = torch._fake_quantize_learnable_per_channel_affine(
        x, step, torch.zeros(rows), 0, low, high, factor
    )
    ours = learned_step(x, step[:, None], low, high)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    their_x, their_step = gradients(theirs, gradient, x, step)
    our_x, our_step = gradients(ours, gradient, x, step)
    torch.testing.assert_close(our_x, their_x, rtol=1e-6, atol=0)
    torch.testing.assert_close(our_step, their_step, rtol=1e-4, atol=1e-5)


def test_gradient_of_clipped_values_is_the_true_one():
    """low S and high S are smooth in S: finite differences see what equation 3 says."""
    x = torch.tensor([-9.0, 5.0, 7.0, -4.1])
    step = torch.tensor([1.0], requires_grad=True)

    def scaled(s):
        return learned_step(x, s, -2, 1).sum() / math.sqrt(4 * 1)

    (found,) = torch.autograd.grad(learned_step(x, step, -2, 1).sum(), step)
    difference = (scaled(step + 0.01) - scaled(step - 0.01)) / 0.02
    assert found.item() == pytest.approx(difference.item(), rel=1e-4) == pytest.approx(-1.0)


def test_gradient_inside_is_that_of_the_function_with_its_rounding_error_held():
    """Straight through: x + (round(x / S) - x / S) S, with the bracket constant, is linear in S."""
    x, s = torch.tensor([0.3, -1.4, 0.9]), 0.7
    step = torch.tensor([s], requires_grad=True)
    (found,) = torch.autograd.grad(learned_step(x, step, -4, 3).sum(), step)
    error = (x / s).round() - x / s

    def held(s):
        return (s * (x / s + error)).sum() / math.sqrt(3 * 3)

    difference = (held(s + 0.01) - held(s - 0.01)) / 0.02
    assert found.item() == pytest.approx(difference.item(), rel=1e-3)


def test_the_ends_of_the_grid_count_as_outside():
    x = torch.tensor([-2.0, 1.0], requires_grad=True)
    step = torch.tensor([1.0], requires_grad=True)
    y = learned_step(x, step, -2, 1)
    of_x, of_step = torch.autograd.grad(y, (x, step), torch.tensor([1.0, 10.0]))
    assert of_x.tolist() == [0, 0]
    assert of_step.item() == pytest.approx((-2 + 10) / math.sqrt(2 * 1))


@pytest.mark.parametrize("bad", [0.0, -0.1, math.nan, math.inf])
def test_steps_that_are_not_positive_and_finite_are_refused(bad):
    with pytest.raises(ValueError, match="positive, finite"):
        learned_step(torch.ones(2, 3), torch.tensor([[1.0], [bad]]), -2, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    x, one = torch.tensor([1.0, bad]), torch.tensor(1.0)
    for call in (
        lambda: learned_step(x, one, -2, 1),
        lambda: fake_quantize(x, one, torch.tensor(0), 0, 3),
    ):
        with pytest.raises(ValueError, match="1 of 2 values"):
            call()


@pytest.mark.parametrize(("low", "high"), [(-1, 0), (0, 3)])
def test_a_grid_on_one_side_of_zero_is_refused(low, high):
    with pytest.raises(ValueError, match=rf"{low}\.\.{high}"):
        learned_step(torch.ones(2), torch.tensor(1.0), low, high)


def test_a_clipped_value_far_off_leaves_the_gradient_of_a_tiny_step_finite():
    """x / S^2 overflows float32 here: its product with a mask of 0 would be NaN."""
    x = torch.tensor([1.0, -1.0, 0.0], requires_grad=True)
    step = torch.tensor([1e-20], requires_grad=True)
    of_x, of_step = gradients(learned_step(x, step, -2, 1), torch.tensor([1.0, 10, 100]), x, step)
    assert of_x.tolist() == [0, 0, 100]
    assert of_step.item() == pytest.approx((1 - 20) / math.sqrt(3 * 1))


@pytest.mark.parametrize("shape", [(4, 1), (1, 8)])
def test_steps_that_would_widen_the_values_are_refused(shape):
    with pytest.raises(ValueError, match=r"does not broadcast to x \(8,\)"):
        learned_step(torch.ones(8), torch.ones(shape), -2, 1)
