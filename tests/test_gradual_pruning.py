"""Pruning while training: the cubic schedule, its masks in the training loop, CSR, and the figures."""

import copy
import math
from itertools import pairwise

import matplotlib
import matplotlib.pyplot as plt
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import some_tokens, tiny_gpt2, tiny_llama
from torch import nn

from course_utils.models import linear_layers
from course_utils.plotting.diagrams import masked_matrix, row_in_formats
from course_utils.plotting.pruning import (
    against_sparsity,
    break_even,
    mask_pictures,
    schedule_and_loss,
    share_of_layers,
)
from course_utils.pruning.gradual import GradualPruning
from course_utils.pruning.magnitude import magnitude_masks
from course_utils.pruning.masked import hold_masks, masks_of, release_masks
from course_utils.pruning.masks import layer_mask, n_m_mask, n_zeros, sparsity_of
from course_utils.pruning.sparse import CsrWeight, csr_bytes
from course_utils.training.loop import TrainConfig, train

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The schedule.


@given(
    st.floats(0, 0.99), st.floats(0, 0.99), st.integers(0, 50), st.integers(1, 30), st.integers(1, 9)
)  # fmt: skip
def test_the_schedule_is_the_papers_equation(a, b, begin, times, every):
    initial, final = sorted((a, b))
    schedule = GradualPruning(final, begin, times, every, initial)
    shares = [schedule.sparsity_at(step) for step in range(schedule.end + every + 1)]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(initial) or begin == 0
    assert shares[-1] == final == schedule.sparsity_at(schedule.end)
    for k in range(times + 1):
        t = begin + k * every
        fraction = (t - begin) / (times * every)
        expected = final + (initial - final) * (1 - fraction) ** 3
        for step in range(t, t + every):
            assert schedule.sparsity_at(step) == pytest.approx(expected, abs=1e-12)


def test_the_schedule_by_hand():
    schedule = GradualPruning(0.8, begin=10, times=2, every=5)
    shares = [schedule.sparsity_at(step) for step in (0, 10, 14, 15, 19, 20, 99)]
    assert shares == pytest.approx([0, 0, 0, 0.7, 0.7, 0.8, 0.8])
    assert schedule.end == 20


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GradualPruning(1.0, 0, 1, 1), ValueError, r"sparsity 1.0 is not in \[0, 1\)"),
        (lambda: GradualPruning(90, 0, 1, 1), ValueError, r"did you mean 0.9\?"),
        (lambda: GradualPruning(0.5, 0, 1, 1, -0.1), ValueError, "sparsity -0.1 is not in"),
        (lambda: GradualPruning(0.5, 0, 1, 1, 0.6), ValueError, "final 0.5 is below initial 0.6"),
        (lambda: GradualPruning(0.5, -1, 1, 1), ValueError, "begin -1: choose a whole number from 0"),
        (lambda: GradualPruning(0.5, 0, 0, 1), ValueError, "times 0: choose a whole number from 1"),
        (lambda: GradualPruning(0.5, 0, 2, 1.5), ValueError, "every 1.5: choose a whole number from 1"),
        (lambda: magnitude_masks(tiny_gpt2(), 0.5, across="row"), ValueError, "across 'row': choose 'layer'"),
        (lambda: magnitude_masks(tiny_gpt2(), 1.0), ValueError, r"sparsity 1.0 is not in \[0, 1\)"),
        (lambda: magnitude_masks(nn.ReLU(), 0.5), ValueError, "no float linear layer left"),
    ],
)  # fmt: skip
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Masks of a model, and in training.


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_masks_of_a_model_take_the_same_of_each_layer_or_the_least_of_all(make):
    model = make()
    by_layer = magnitude_masks(model, 0.3)
    together = magnitude_masks(model, 0.3, across="model")
    layers = {layer.name: layer.weight.abs() for layer in linear_layers(model)}
    assert by_layer.keys() == together.keys() == layers.keys()
    for name, mask in by_layer.items():
        assert torch.equal(mask, layer_mask(layers[name], 0.3))
    gone = torch.cat([layers[name][~mask] for name, mask in together.items()])
    stays = torch.cat([layers[name][mask] for name, mask in together.items()])
    assert len(gone) == n_zeros(len(gone) + len(stays), 0.3) and gone.max() <= stays.min()


def trained(model, before_step=None, steps=7):
    batches = {step: some_tokens(2, seed=step) for step in range(steps)}
    config = TrainConfig(steps, lr=1e-2, warmup=1, eval_every=steps)
    return train(model, batches.__getitem__, config, before_step=before_step, progress=False)


def test_the_mask_grows_as_planned_and_what_is_gone_stays_gone():
    model, seen = tiny_gpt2(), []
    schedule = GradualPruning(0.8, begin=1, times=2, every=2)
    grow = schedule.masking(model)

    def before_step(step):
        grow(step)
        seen.append(masks_of(model))

    trained(model, before_step)
    release_masks(model)
    seen.append(masks_of(model))
    for step, masks in enumerate(seen):
        share = schedule.sparsity_at(min(step, 6))
        for mask in masks.values():
            assert int((~mask).sum()) == n_zeros(mask.numel(), share), step
    for earlier, later in pairwise(seen):
        assert all((earlier[name] >= later[name]).all() for name in earlier)
    assert not any(hasattr(m, "parametrizations") for m in model.modules())


def test_a_schedule_that_begins_at_its_end_is_one_shot():
    gradual, at_once = tiny_gpt2(), tiny_gpt2()
    for module in (*gradual.modules(), *at_once.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    schedule = GradualPruning(0.6, begin=0, times=1, every=1, initial=0.6)
    hold_masks(at_once, magnitude_masks(at_once, 0.6))
    curves = trained(gradual, schedule.masking(gradual)), trained(at_once)
    assert curves[0][-1]["loss"] == curves[1][-1]["loss"]
    for a, b in zip(linear_layers(gradual), linear_layers(at_once), strict=True):
        assert torch.equal(a.weight, b.weight)


def test_a_tied_layer_is_refused_before_anything_is_pruned():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"its weight is b\.weight as well"):
        GradualPruning(0.5, 0, 1, 1, initial=0.5).masking(model)(0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# Compressed sparse rows.


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**31), st.floats(0, 0.999), st.integers(1, 40),
    st.sampled_from(["float16", "float32"]),
)  # fmt: skip
def test_csr_holds_mask_and_values_as_scipy_and_torch_do(seed, sparsity, columns, dtype):
    weight = normal(5, columns, seed=seed)
    mask = layer_mask(weight.abs(), sparsity)
    stored = CsrWeight.from_mask(weight, mask, dtype)
    assert stored.shape == (5, columns) and torch.equal(stored.kept(), mask)
    kept = weight.to(getattr(torch, dtype)).float() * mask
    assert torch.equal(stored.dequantize(), kept)
    theirs = kept.to_sparse_csr()
    if int((kept != 0).sum()) == int(mask.sum()):
        assert torch.equal(stored.starts.long(), theirs.crow_indices())
        assert torch.equal(stored.indices.long(), theirs.col_indices())
        assert torch.equal(stored.values.float(), theirs.values())
    x = normal(columns, 3, seed=seed + 1)
    torch.testing.assert_close(stored.as_torch() @ x, kept @ x, rtol=1e-4, atol=1e-5)
    width, count = (2 if dtype == "float16" else 4), int(mask.sum())
    assert stored.nbytes == csr_bytes(5, count, width) - 2 * count  # int16 columns, int32 starts


def test_csr_by_hand_and_its_wide_indices():
    weight = torch.tensor([[0.0, 5], [0, 0], [7, 8]])
    stored = CsrWeight.from_mask(weight, weight != 0, "float16")
    assert stored.starts.tolist() == [0, 1, 1, 3] and stored.indices.tolist() == [1, 0, 1]
    assert stored.values.tolist() == [5, 7, 8] and stored.indices.dtype == torch.int16
    for columns, dtype in ((2**15, torch.int16), (2**15 + 1, torch.int32)):
        mask = torch.zeros(1, columns, dtype=torch.bool)
        mask[0, -1] = True
        wide = CsrWeight.from_mask(torch.ones(1, columns), mask, "float16")
        assert wide.indices.dtype == dtype and torch.equal(wide.kept(), mask)


def test_csr_refuses_another_mask():
    with pytest.raises(ValueError, match=r"is bool in the same shape, got torch\.float32"):
        CsrWeight.from_mask(torch.ones(2, 4), torch.ones(2, 4), "float16")


# Figures.


def texts(axis):
    return [text.get_text().replace("\N{MINUS SIGN}", "-") for text in axis.texts]


def test_a_masked_matrix_is_drawn_with_its_ranks():
    W = torch.tensor([[0.5, -0.25], [2.0, 1.0]])
    values, ranks, left = masked_matrix(W, W.abs() > 0.5).axes
    assert texts(values) == ["0.50", "-0.25", "2.00", "1.00"]
    assert texts(ranks) == ["2", "1", "4", "3"]
    assert texts(left) == ["0", "0", "2.00", "1.00"]


def test_a_row_is_drawn_in_its_bits():
    row = torch.tensor([0.5, 1, 2, 0.25])
    figure = row_in_formats(row, n_m_mask(row.abs()[None], "2:4")[0])
    widths = [sum(patch.get_width() for patch in axis.patches) for axis in figure.axes]
    assert widths == [4 * 16, 4 + 2 * 16, 2 * 2 + 2 * 16, 32 + 2 * (16 + 16)]
    assert texts(figure.axes[2])[1:] == ["1", "2", "1", "2"]  # places, then values


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masked_matrix(torch.ones(2, 2), torch.ones(2, 2)), "is bool in their shape"),
        (lambda: masked_matrix(torch.ones(7, 2), torch.ones(7, 2) > 0), "7 rows are too many"),
        (lambda: masked_matrix(torch.ones(0, 2), torch.ones(0, 2) > 0), "nothing to draw"),
        (lambda: row_in_formats(torch.ones(4), torch.ones(4) > 0), "does not keep 2 of each 4"),
        (lambda: row_in_formats(torch.ones(12), torch.ones(12) > 0), "12 weights are too many"),
        (lambda: mask_pictures({"a": torch.ones(257, 2) > 0}), "257 weights in a row or column"),
        (lambda: mask_pictures(dict.fromkeys("abcde", torch.ones(2, 2) > 0)), "5 masks are too many"),
    ],
)  # fmt: skip
def test_figures_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_masks_are_pictures_of_themselves():
    mask = layer_mask(normal(4, 6).abs(), 0.5)
    (axis,) = mask_pictures({"half": mask}).axes
    assert numpy.array_equal(axis.images[0].get_array(), mask.int().numpy())
    assert axis.get_title() == "half" and sparsity_of(mask) == 0.5


def test_shares_and_curves_are_those_given():
    axis = share_of_layers({"global": {"a": 0.2, "b": 0.8}}, 0.5).axes[0]
    assert list(axis.lines[0].get_ydata()) == [0.2, 0.8]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["a", "b"]
    curves = {"one": ([0, 1], [0.5, 0.9])}
    left, right = schedule_and_loss(curves, {"one": ([1, 2], [3.0, 2.0])}, 2.5).axes
    assert list(left.lines[0].get_ydata()) == [0.5, 0.9]
    assert list(right.lines[0].get_ydata()) == [3.0, 2.0]
    assert list(right.lines[1].get_ydata()) == [2.5, 2.5]


def test_break_even_is_where_the_curve_crosses_the_dense_one_for_good():
    shares = [0.0, 0.5, 1.0]
    assert break_even(shares, [3.0, 2.0, 0.0], [1.0] * 3) == pytest.approx(0.75)
    assert break_even(shares, [3.0, 0.5, 0.5], [1.0] * 3) == pytest.approx(0.4)
    assert break_even(shares, [3.0, 2.0, 2.0], [1.0] * 3) is None
    assert break_even(shares, [0.5, 0.5, 0.5], [1.0] * 3) is None
    assert break_even(shares, [0.5, 1.5, 0.5], [1.0] * 3) == pytest.approx(0.75)
    panel = {"t": {"dense": (shares, [1.0] * 3), "csr": (shares, [3.0, 2.0, 0.0])}}
    axis = against_sparsity(panel, ["ms"], "dense").axes[0]
    crossing = [line for line in axis.lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in crossing] == pytest.approx([0.75])
    assert axis.get_ylabel() == "ms" and math.isclose(axis.get_ylim()[1], 2.2)
