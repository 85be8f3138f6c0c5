"""Pruned and quantized together: the authors' plain loops, what is stored, three orders, and figures."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import some_tokens, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM

from course_utils.compression import QuantizedLinear, get_method, quantize_model
from course_utils.compression.hessian import Hessian
from course_utils.models import linear_layers
from course_utils.plotting.one_shot import (
    bits_of_parts,
    chosen_weights,
    gain_against_outliers,
    sparsegpt_steps,
)
from course_utils.pruning.masks import layer_mask, n_m_mask, sparsity_of
from course_utils.pruning.sparsegpt import sparsegpt
from course_utils.pruning.wanda import InputNorms, Wanda, wanda_scores
from course_utils.quantizers.affine import Affine
from course_utils.quantizers.sparse_gptq import ORDERS, SparseCodes, SparseGPTQ

SEEDS = st.integers(0, 2**31)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(tokens, features, seed=0):
    mixing = normal(features, features, seed=seed + 1) / features**0.5 + torch.eye(features)
    sizes = (normal(features, seed=seed + 2) / 2).exp()
    return normal(tokens, features, seed=seed) @ mixing * sizes


def gathered(kind, x):
    found = kind(x.shape[1])
    found.update(x)
    return found


def authors_sparsegpt(W, H, share=0.0, prunen=0, prunem=0, n_bits=0, quirk=True, blocksize=128):
    """IST-DASLab/sparsegpt, `fasterprune` of sparsegpt.py at commit 5e3e2d19, in float64 and plain torch.

    `prunen` counts the zeros of each `prunem`. Without `quirk` the mask holds int(numel * share) weights,
    where `score <= sorted[that]` takes one more. Left out: dead features, and the report of losses.
    """
    W, H = W.clone(), H + 0.01 * H.diagonal().mean() * torch.eye(len(H)).double()
    if n_bits:  # an asymmetric grid for each row of the dense weight, as quant.py finds it
        top = 2**n_bits - 1
        low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)
        S = ((high - low) / top).float().double()[:, None]
        Z = (-low[:, None] / S).round()
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    masks = torch.zeros_like(W, dtype=torch.bool)
    for i1 in range(0, W.shape[1], blocksize):
        i2 = min(i1 + blocksize, W.shape[1])
        W1, Err1, U1 = W[:, i1:i2].clone(), torch.zeros(len(W), i2 - i1).double(), U[i1:i2, i1:i2]
        mask1 = masks[:, i1:i2]
        if not prunen:
            scores = W1**2 / U1.diagonal() ** 2
            ordered = scores.flatten().sort().values
            count = int(scores.numel() * share)
            mask1[:] = scores <= ordered[count] if quirk else scores < ordered[count]
        for i in range(i2 - i1):
            if prunen and i % prunem == 0:
                scores = W1[:, i : i + prunem] ** 2 / U1.diagonal()[i : i + prunem] ** 2
                mask1.scatter_(1, i + scores.topk(prunen, dim=1, largest=False).indices, True)
            q = W1[:, i].clone()
            q[mask1[:, i]] = 0
            if n_bits:
                code = ((q[:, None] / S).round() + Z).clamp(0, top)
                q = (S * (code - Z))[:, 0]
            err1 = (W1[:, i] - q) / U1[i, i]
            W1[:, i:] -= err1[:, None] * U1[i, i:]
            W1[:, i], Err1[:, i] = q, err1
        W[:, i1:i2] = W1
        W[:, i2:] -= Err1 @ U[i1:i2, i2:]
    return W, ~masks


def authors_wanda(W, sequences, ratio=0.0, prune_n=0, prune_m=0):
    """locuslab/wanda, `prune_wanda` of lib/prune.py at commit 069ac970: the mask, in plain torch."""
    scaler_row = torch.zeros(W.shape[1]).double()
    for nsamples, x in enumerate(sequences):  # lib/layerwrapper.py: a running mean over sequences
        scaler_row *= nsamples / (nsamples + 1)
        scaler_row += x.norm(p=2, dim=0) ** 2 / (nsamples + 1)
    metric, mask = W.abs() * scaler_row.sqrt(), torch.zeros_like(W, dtype=torch.bool)
    if prune_n:
        for j in range(0, W.shape[1], prune_m):
            lowest = metric[:, j : j + prune_m].topk(prune_n, dim=1, largest=False).indices
            mask.scatter_(1, j + lowest, True)
    else:
        order = metric.sort(dim=-1, stable=True).indices
        mask.scatter_(1, order[:, : int(W.shape[1] * ratio)], True)
    return ~mask


# The authors' loops.


@settings(deadline=None, max_examples=6)
@given(SEEDS)
def test_sparsegpt_is_the_authors_but_for_one_weight_a_block(seed):
    x, W = correlated(600, 256, seed), normal(16, 256, seed=seed + 3)
    H = gathered(Hessian, x).matrix()
    ours = sparsegpt(W, H, 0.5)
    theirs, mask = authors_sparsegpt(W, H, 0.5, quirk=False)
    assert torch.equal(ours.mask, mask)
    torch.testing.assert_close(ours.weight, theirs, rtol=1e-8, atol=1e-10)
    _, with_quirk = authors_sparsegpt(W, H, 0.5)
    assert (~with_quirk).sum() == (~ours.mask).sum() + 2  # two blocks of 128 columns
    _, at_zero = authors_sparsegpt(W, H, 0.0)
    assert (~at_zero).sum() == 2 and sparsegpt(W, H, 0.0).mask.all()
    with pytest.raises(IndexError):
        authors_sparsegpt(W, H, 1.0)


@settings(deadline=None, max_examples=6)
@given(SEEDS, st.sampled_from([(2, 4), (4, 8)]))
def test_patterns_are_the_authors(seed, pattern):
    x, W = (
        correlated(300, 136, seed),
        normal(8, 136, seed=seed + 3),
    )  # the last block holds 8 columns
    H = gathered(Hessian, x).matrix()
    zeros, m = pattern
    ours = sparsegpt(W, H, f"{m - zeros}:{m}")
    theirs, mask = authors_sparsegpt(W, H, prunen=zeros, prunem=m)
    assert torch.equal(ours.mask, mask)
    torch.testing.assert_close(ours.weight, theirs, rtol=1e-8, atol=1e-10)


@settings(deadline=None, max_examples=10)
@given(SEEDS, st.sampled_from([0.5, 0.25, "2:4", "4:8"]))
def test_wanda_is_the_authors(seed, sparsity):
    sequences, W = normal(5, 20, 32, seed=seed), normal(6, 32, seed=seed + 1)
    statistics = gathered(InputNorms, sequences.flatten(0, 1))
    kept = Wanda(sparsity).quantize(W, statistics).kept()
    zeros, m = {"2:4": (2, 4), "4:8": (4, 8)}.get(sparsity, (0, 0))
    ratio = 0.0 if m else sparsity
    assert torch.equal(kept, authors_wanda(W, sequences, ratio, zeros, m))


@settings(deadline=None, max_examples=8)
@given(SEEDS, st.sampled_from([2, 3, 4]))
def test_the_joint_mode_is_the_authors(seed, n_bits):
    x, W = correlated(300, 128, seed), normal(8, 128, seed=seed + 3)
    statistics = gathered(Hessian, x)
    method = SparseGPTQ("2:4", n_bits, "row", scale_dtype="float32")
    stored = method.quantize(W, statistics)
    theirs, mask = authors_sparsegpt(W, statistics.matrix(), prunen=2, prunem=4, n_bits=n_bits)
    assert torch.equal(stored.kept(), mask)
    full = stored.dequantize().double()
    torch.testing.assert_close(full, theirs, rtol=1e-6, atol=1e-7)
    assert not full[~mask].any()


# The loop with a mask and a grid.


def test_a_given_mask_is_held_and_its_own_gives_the_same_weights():
    x, W = correlated(200, 32), normal(6, 32, seed=3)
    H = gathered(Hessian, x).matrix()
    own = sparsegpt(W, H, 0.5, block_size=8)
    again = sparsegpt(W, H, own.mask, block_size=16)
    assert torch.equal(again.mask, own.mask)
    torch.testing.assert_close(again.weight, own.weight, rtol=1e-9, atol=1e-12)
    other = layer_mask(W.abs(), 0.5)
    found = sparsegpt(W, H, other)
    assert torch.equal(found.mask, other) and not found.weight[~other].any()
    assert not torch.equal(found.weight[other], W[other])


@settings(deadline=None, max_examples=10)
@given(SEEDS, st.sampled_from([0.5, "2:4"]))
def test_losses_sum_up_to_half_the_trace_with_a_grid_as_well(seed, sparsity):
    x, W = correlated(100, 32, seed), normal(6, 32, seed=seed + 3)
    H = gathered(Hessian, x).matrix()
    found = sparsegpt(W, H, sparsity, to_grid=lambda i, w: (w * 4).round() / 4)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(32).double()
    off = W - found.weight
    assert found.losses.sum().item() == pytest.approx(
        ((off @ damped) * off).sum().item() / 2, rel=1e-9
    )
    assert torch.equal((found.weight * 4).round(), found.weight * 4)


@settings(deadline=None, max_examples=10)
@given(SEEDS, st.sampled_from(["2:4", "4:8"]), st.sampled_from(ORDERS))
def test_with_a_diagonal_hessian_all_orders_round_to_the_nearest(seed, sparsity, order):
    """What stays is round-to-nearest; masks are Wanda's, of the weights or of their codes' values."""
    W, power = normal(5, 32, seed=seed), normal(32, seed=seed + 1).exp()
    statistics = gathered(Hessian, torch.diag(power.sqrt()))
    stored = SparseGPTQ(sparsity, 4, "row", order, damping=0).quantize(W, statistics)
    nearest = Affine(4, "row").quantize(W).dequantize()
    scored = nearest if order == "quantize_first" else W
    mask = n_m_mask(wanda_scores(scored, power.sqrt()), sparsity)
    if order != "prune_first":
        torch.testing.assert_close(stored.dequantize(), nearest * mask)
    assert torch.equal(stored.kept(), mask)


def test_making_up_for_both_errors_is_better_than_for_one():
    x, W = correlated(500, 64, seed=2), normal(16, 64, seed=5)
    statistics = gathered(Hessian, x)
    errors = {
        order: statistics.relative_error(
            W.float(), SparseGPTQ("2:4", 4, 32, order).quantize(W, statistics).dequantize()
        )
        for order in ORDERS
    }
    assert max(errors["joint"], errors["prune_first"]) < 0.8 * errors["quantize_first"]


# What is stored.


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(2, 8), st.sampled_from([1, 2, 4]), st.floats(0, 0.999))
def test_mask_codes_and_grid_are_held_and_counted(seed, n_bits, groups, sparsity):
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**n_bits, (3, 20), generator=draw)
    zero = torch.randint(2**n_bits, (3, groups), generator=draw)
    scale = torch.rand(3, groups, generator=draw).half() + 0.5
    mask = layer_mask(torch.rand(3, 20, generator=draw), sparsity)
    stored = SparseCodes.from_codes(codes, mask, scale, zero, n_bits)
    width = 20 // groups
    full = (codes - zero.repeat_interleave(width, 1)) * scale.float().repeat_interleave(width, 1)
    assert stored.shape == (3, 20) and torch.equal(stored.kept(), mask)
    assert torch.equal(stored.dequantize(), full * mask)
    kept = int(mask.sum())
    in_bytes = 3 * 3 + -(-kept * n_bits // 8) + 2 * 3 * groups + 3 * -(-groups * n_bits // 8)
    assert stored.nbytes == in_bytes


def test_codes_by_hand():
    """Row [0, 3 | 1, 0] of scale 2 and zero point 1: the codes 3 and 1 stay, as 2 bits each."""
    codes, mask = torch.tensor([[0, 3, 1, 0]]), torch.tensor([[False, True, True, False]])
    grid = torch.full((1, 1), 2.0).half(), torch.ones(1, 1, dtype=torch.int64)
    stored = SparseCodes.from_codes(codes, mask, *grid, 2)
    assert stored.mask.tolist() == [[0b0110]] and stored.codes.tolist() == [0b0111]
    assert stored.dequantize().tolist() == [[0, 4, 0, 0]]
    assert stored.nbytes == 1 + 1 + 2 + 1


def test_half_of_the_weights_at_4_bits_take_the_bits_of_dense_3():
    x, W = correlated(300, 256), normal(64, 256, seed=1)
    stored = SparseGPTQ(0.5, 4).quantize(W, gathered(Hessian, x))
    assert stored.bits_per_weight == pytest.approx(1 + 2 + 20 / 128, abs=1e-3)
    dense = get_method("gptq", n_bits=3).quantize(W, gathered(Hessian, x))
    assert stored.bits_per_weight == pytest.approx(dense.bits_per_weight, rel=0.01)


@pytest.mark.parametrize(("order", "sparsity"), [*((o, 0.5) for o in ORDERS), ("joint", "2:4")])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.filterwarnings("ignore:the Hessian of")
def test_a_model_is_saved_and_loaded(make, order, sparsity, tmp_path):
    model, tokens = make(), some_tokens(8)
    method = get_method("sparse_gptq", sparsity=sparsity, n_bits=4, group_size=8, order=order)
    report = quantize_model(model, method, calibration=tokens)
    assert all(0 < layer.output_error < 1 for layer in report.layers)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    layers = [module for module in loaded.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == len(report.layers) and not linear_layers(loaded)
    for layer in layers:
        assert type(layer.quantized_weight) is SparseCodes and layer.method.order == order
        assert sparsity_of(layer.quantized_weight.kept()) == pytest.approx(0.5, abs=0.01)


# What is refused.


def a_store(mask=None, scale=None, zero=None):
    codes = torch.ones(2, 8, dtype=torch.int64)
    return SparseCodes.from_codes(
        codes,
        codes > 0 if mask is None else mask,
        torch.ones(2, 2).half() if scale is None else scale,
        torch.ones(2, 2, dtype=torch.int64) if zero is None else zero,
        2,
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SparseGPTQ(1.0), r"sparsity 1.0 is not in \[0, 1\)"),
        (lambda: SparseGPTQ("4:4"), "keeps 4 of each 4"),
        (lambda: SparseGPTQ(n_bits=1), "n_bits 1: choose 2 to 8"),
        (lambda: SparseGPTQ(group_size=0), "group_size 0: choose a positive number or 'row'"),
        (lambda: SparseGPTQ(order="both"), "order 'both': choose one of joint, prune_first, quantize_first"),
        (lambda: SparseGPTQ(block_size=0), "block_size 0: choose a positive number"),
        (lambda: SparseGPTQ(damping=-1), "damping -1 must be 0 or positive"),
        (lambda: SparseGPTQ().quantize(torch.ones(2, 128)), "SparseGPTQ needs the Hessian"),
        (lambda: SparseGPTQ().quantize(torch.ones(2, 128), Hessian(128)), "Hessian has seen no inputs"),
        (lambda: quantize_model(tiny_gpt2(), SparseGPTQ(), calibration=some_tokens()),
         "group_size 128 does not divide the 24 columns"),
        (lambda: quantize_model(tiny_gpt2(), SparseGPTQ("5:9", group_size=8), calibration=some_tokens()),
         "groups of 9 do not divide the 24 columns"),
        (lambda: sparsegpt(torch.ones(2, 4), torch.eye(4), torch.ones(2, 3) > 0),
         r"a weight \(2, 4\) is bool in the same shape, got torch.bool \(2, 3\)"),
        (lambda: sparsegpt(torch.ones(2, 4), torch.eye(4), torch.ones(2, 4)), "got torch.float32"),
        (lambda: a_store(mask=torch.ones(2, 8)), "got torch.float32"),
        (lambda: a_store(scale=torch.ones(2, 3).half()), r"scale \(2, 3\) and zero_point \(2, 2\)"),
        (lambda: a_store(zero=torch.ones(2, 1, dtype=torch.int64)), r"both have to be \[out, groups\]"),
        (lambda: chosen_weights(torch.ones(5, 4), torch.ones(4), {}), "5 rows are too many to read"),
        (lambda: sparsegpt_steps(torch.ones(2, 5), torch.ones(2, 5) > 0, torch.eye(5)), "5 columns are too"),
        (lambda: sparsegpt_steps(torch.ones(2, 2), torch.ones(2, 2) > 0, torch.eye(2)), "W has 2"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Figures.


def texts(figure):
    return [t.get_text() for axis in figure.axes for t in axis.texts]


def test_the_chosen_are_struck_out():
    W, norms = torch.tensor([[3.0, 1, -2, 4]]), torch.tensor([1.0, 4, 1, 1])
    masks = {"a": W.abs() > 2.5, "b": W.abs() > 0}
    figure = chosen_weights(W, norms, masks)
    assert [axis.get_title() for axis in figure.axes] == ["a", "b"]
    assert [len(axis.lines) for axis in figure.axes] == [2, 0]
    assert "\N{MINUS SIGN}2.0" in texts(figure)


def test_the_steps_are_those_of_the_loop():
    x, W = correlated(50, 3), normal(2, 3, seed=3)
    H = gathered(Hessian, x).matrix()
    mask = torch.tensor([[False, True, True], [True, False, True]])
    U = torch.linalg.cholesky(H.inverse(), upper=True)
    figure = sparsegpt_steps(W, mask, U)
    last = sparsegpt(W, H, mask, damping=0).weight
    shown = figure.axes[2].texts
    values = [t.get_text().replace("\N{MINUS SIGN}", "-") for t in shown]
    expected = [f"{v:.2f}" if v else "0" for v in last.flatten().tolist()]
    assert values == expected


def test_gains_and_bits_are_drawn():
    figure = gain_against_outliers({"small": ([2.0, 30.0], [1.0, 0.2])})
    assert figure.axes[0].get_xscale() == "log"
    parts = {"dense": {"codes": 3.0, "grid": 0.148}, "sparse": {"mask": 1.0, "codes": 2.0}}
    figure = bits_of_parts(parts)
    assert {"3.148", "3.000"} <= set(texts(figure))
    labels = [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
    assert sorted(labels) == ["codes", "grid", "mask"]
