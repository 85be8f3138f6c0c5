"""The column loop by itself: least squares, whatever the columns become."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from course_utils.compression.compensation import compensate
from course_utils.compression.hessian import inverse_factor

FEATURES = 12
SEEDS = st.integers(0, 2**31)
STEPS = st.sampled_from([(1, 1), (1, 5), (1, 12), (2, 4), (3, 6), (4, 4), (6, 12), (12, 12)])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed, out=5):
    """A weight `[out, in]`, and a Hessian that lets its columns make up for each other."""
    x = normal(40, FEATURES, seed=seed) @ normal(FEATURES, FEATURES, seed=seed + 1)
    return normal(out, FEATURES, seed=seed + 2), x.T @ x / 40


def to_halves(i: int, w: Tensor, pending: Tensor) -> Tensor:
    return (2 * w).round() / 2


def run(W, H, rounding=to_halves, **steps):
    """E, and what the columns became."""
    became = torch.empty_like(W)

    def recorded(i, w, pending):
        q = rounding(i, w, pending)
        became[:, i : i + w.shape[1]] = q
        return q

    return compensate(W.clone(), inverse_factor(H, 0.0), recorded, **steps), became


@settings(deadline=None, max_examples=40)
@given(SEEDS, STEPS)
def test_each_step_finds_the_least_squares_optimum_of_what_is_left(seed, steps):
    """With the columns before held where they are, no other values of the later ones err less."""
    width, block_size = steps
    W, H = problem(seed)
    seen = {}

    def rounding(i, w, pending):
        seen[i] = w.clone()
        return to_halves(i, w, pending)

    _, became = run(W, H, rounding, width=width, block_size=block_size)
    for i, w in seen.items():
        fixed = W[:, :i] - became[:, :i]  # [out, i]
        best = W[:, i:] + torch.linalg.solve(H[i:, i:], (fixed @ H[:i, i:]).T).T
        torch.testing.assert_close(w, best[:, :width], rtol=1e-6, atol=1e-6)
    assert list(seen) == list(range(0, FEATURES, width))


@settings(deadline=None, max_examples=40)
@given(SEEDS, STEPS)
def test_the_squared_errors_sum_up_to_the_objective(seed, steps):
    width, block_size = steps
    W, H = problem(seed)
    E, became = run(W, H, width=width, block_size=block_size)
    difference = W - became
    per_row = ((difference @ H) * difference).sum(1)
    torch.testing.assert_close(E.square().sum(1), per_row, rtol=1e-8, atol=0)


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.sampled_from([1, 2, 3]), st.sampled_from([6, 12, 18, 120]))
def test_the_block_size_changes_nothing(seed, width, block_size):
    W, H = problem(seed)
    E, became = run(W, H, width=width, block_size=width)
    E_blocks, became_blocks = run(W, H, width=width, block_size=block_size)
    assert torch.equal(became, became_blocks)
    torch.testing.assert_close(E, E_blocks, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("width", "block_size"), [(5, 5), (4, 6), (24, 24)])
def test_widths_that_do_not_divide_are_refused(width, block_size):
    W, H = problem(0)
    with pytest.raises(ValueError, match=f"steps of {width} columns .* blocks of {block_size}"):
        run(W, H, width=width, block_size=block_size)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.sampled_from([1, 2]), st.sampled_from([2, 4, 12]), st.sampled_from([4, 6, 12]))
def test_a_rounding_may_look_ahead_at_the_columns_of_its_group(seed, width, block_size, group):
    """SparseGPT's: half of each group's weights become 0, those that cost least, chosen when it begins.

    Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1: w^2 / U_jj^2 tells the cost.
    """
    W, H = problem(seed)
    working, U = W.clone(), inverse_factor(H, 0.0)
    became, dropped = torch.empty_like(W), torch.zeros_like(W, dtype=torch.bool)

    def rounding(i: int, w: Tensor, pending: Tensor) -> Tensor:
        if i % group == 0:
            ahead = slice(i, i + group)
            now = working[:, ahead] - pending @ U[i - pending.shape[1] : i, ahead]
            torch.testing.assert_close(now[:, : w.shape[1]], w)
            cost = now.square() / U.diagonal()[ahead].square()
            cheapest = cost.argsort(1)[:, : group // 2]
            dropped[:, ahead] = dropped[:, ahead].scatter(1, cheapest, True)
        here = slice(i, i + w.shape[1])
        became[:, here] = w.masked_fill(dropped[:, here], 0)
        return became[:, here]

    E = compensate(working, U, rounding, width=width, block_size=block_size)
    assert (became == 0).sum() == W.numel() // 2
    difference = W - became
    objective = ((difference @ H) * difference).sum().item()
    assert E.square().sum().item() == pytest.approx(objective, rel=1e-8)
