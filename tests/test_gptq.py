"""GPTQ: golden vectors of production libraries, what must hold of any result, and bad input."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny_models import some_tokens, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM

from course_utils.compression import get_method, quantize_model
from course_utils.compression.hessian import Hessian, inverse_factor
from course_utils.data.tokens import calibration_tokens
from course_utils.kernels import unpack
from course_utils.models import load_model
from course_utils.quantizers.affine import Affine
from course_utils.quantizers.gptq import GPTQ, GPTQCodes, gptq_codes

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
ORACLES = TESTS.parent / "course_utils" / "tools" / "oracles"
SEEDS = st.integers(0, 2**31)
ORDERS = st.fixed_dictionaries({"act_order": st.booleans(), "static_groups": st.booleans()})


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(tokens, features, seed=0):
    """Correlated inputs `[tokens, features]` of unequal size."""
    mixing = normal(features, features, seed=seed + 1) / features**0.5 + torch.eye(features)
    return (
        normal(tokens, features, seed=seed) @ mixing * (normal(features, seed=seed + 2) / 2).exp()
    )


def a_layer(out=8, features=64, tokens=256, seed=0):
    """A weight `[out, features]` and the Hessian of its inputs, both float64."""
    x = inputs(tokens, features, seed)
    return normal(out, features, seed=seed + 3) / 20, x.T @ x * (2 / tokens)


def values(found: GPTQCodes):
    """The weight `[out, in]` that the codes stand for, in float64."""
    index = found.group_index.long()
    steps = found.codes.double() - found.zero_point.double()[:, index]
    return steps * found.scale.double()[:, index]


def rounded(weight, size, n_bits=4, symmetric=False):
    """Round-to-nearest with float32 scales, by division: the nearest value of every weight's grid."""
    affine = Affine(n_bits=n_bits, group_size=size, symmetric=symmetric, scale_dtype="float32")
    stored = affine.quantize(weight)
    S = stored.scale.double().repeat_interleave(size, 1)
    Z = stored.zero_points().repeat_interleave(size, 1)
    return ((weight / S).round() + Z).clamp(0, 2**n_bits - 1).to(torch.uint8)


def damped(hessian, damping=0.01):
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian)).double()


# Golden vectors: made by `make oracles`, see course_utils/tools/oracles.


@dataclass(frozen=True)
class Case:
    """One run of a library on a stored layer."""

    library: str
    number: int
    settings: dict

    def __str__(self):
        of = self.settings
        words = [self.library, of["layer"], f"w{of['n_bits']}g{of['group_size']}"]
        words += [word for word in ("symmetric", "act_order", "static_groups") if of[word]]
        return "-".join(words)


def golden(name):
    """Tensors of a file in tests/golden, and how they were made."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata().get("made", "{}"))


LIBRARIES = ("gptqmodel", "llmcompressor")
LAYERS, _ = golden("gptq_layers")
VECTORS = {library: golden(f"{library}_gptq") for library in LIBRARIES}
CASES = [
    Case(library, number, of)
    for library, (_, made) in VECTORS.items()
    for number, of in enumerate(made["cases"])
]
ZERO_ROW = 5  # of the layer "wide"
# Rows of a case whose codes differ from the library's since one of them fell on a tie. None so far;
# other processors may sum in another order, and find one.
MOST_TIES = 2


def run(case, dtype=torch.float32, **changed):
    """Our codes for a case, from the Hessian stored."""
    of = case.settings | changed
    layer = of.pop("layer")
    hessian = LAYERS[f"{layer}.hessian"].to(dtype)
    return gptq_codes(LAYERS[f"{layer}.weight"], hessian, scale_dtype="float32", **of)


def theirs(case):
    """The library's codes, scale and zero point, and group index or None."""
    tensors, _ = VECTORS[case.library]
    of = {
        name: tensors.get(f"{case.number}.{name}")
        for name in ("scale", "zero_point", "group_index")
    }
    packed = tensors[f"{case.number}.codes"]
    return unpack(packed, 4, 2 * packed.shape[1]), of["scale"], of["zero_point"], of["group_index"]


def compared_rows(case):
    """All rows but the one of zeros, whose grid llm-compressor takes from an epsilon."""
    rows = torch.arange(24)
    named = case.library == "llmcompressor" and case.settings["layer"] == "wide"
    return rows[rows != ZERO_ROW] if named else rows


def distance_to_a_tie(case, found, row, column):
    """How far a quotient w / S was from a half when its code was chosen, in steps."""
    hessian = LAYERS[f"{case.settings['layer']}.hessian"].double()
    hessian.diagonal()[hessian.diagonal() == 0] = 1
    order = torch.arange(len(hessian))
    if case.settings["act_order"]:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    position = order.tolist().index(column)
    d = inverse_factor(hessian[order][:, order], 0.01)[position, position]
    error = (2 * found.losses[row, column].double()).sqrt() * d
    return abs(0.5 - (error / found.scale[row, found.group_index[column]]).item()), position


def rows_that_a_tie_explains(case, found, codes):
    """Rows whose codes differ, each first at a weight within 1e-4 steps of a tie."""
    differs = codes != found.codes
    rows = [row for row in compared_rows(case).tolist() if differs[row].any()]
    for row in rows:
        columns = differs[row].nonzero().flatten().tolist()
        distance, _ = min(
            (distance_to_a_tie(case, found, row, c) for c in columns), key=lambda d: d[1]
        )
        assert distance < 1e-4, f"{case}: row {row} differs in columns {columns}, and not by a tie"
    return rows


@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_and_scales_are_those_of_production_libraries(case):
    found, (codes, scale, zero_point, index) = run(case), theirs(case)
    ties = rows_that_a_tie_explains(case, found, codes)
    assert len(ties) <= MOST_TIES, f"{case}: rows {ties} differ by ties"
    same = [row for row in compared_rows(case).tolist() if row not in ties]
    torch.testing.assert_close(found.scale[same], scale[same], rtol=1e-5, atol=0)
    assert torch.equal(found.zero_point[same], zero_point[same].int())
    if index is not None:
        assert torch.equal(found.group_index, index.int())


def test_in_all_cases_together_hardly_a_row_differs_in_float32_or_float64():
    """294,912 codes, but for the row of zeros (3,072 of them) in llm-compressor's cases of "wide"."""
    different = {"float32": 0, "float64": 0}
    for case in CASES:
        rows, (codes, *_) = compared_rows(case), theirs(case)
        for dtype in different:
            mine = run(case, getattr(torch, dtype)).codes
            different[dtype] += int((mine[rows] != codes[rows]).any(1).sum())
    assert max(different.values()) <= MOST_TIES, f"rows that differ: {different}"


def test_a_code_that_differs_has_to_lie_on_a_tie(monkeypatch):
    """A layer made up: its first weight lies halfway between two codes, its second does not."""
    row = torch.tensor([2.5, 3.25, -1, 14])  # on a grid of whole numbers
    monkeypatch.setitem(LAYERS, "tied.weight", row.repeat(24, 1))
    monkeypatch.setitem(LAYERS, "tied.hessian", torch.eye(4))
    plain = dict.fromkeys(("symmetric", "act_order", "static_groups"), False)
    case = Case("made up", 0, {"layer": "tied", "n_bits": 4, "group_size": "row", **plain})
    found = run(case)
    assert rows_that_a_tie_explains(case, found, found.codes) == []
    codes = found.codes.clone()
    codes[7, 0] += 1
    assert rows_that_a_tie_explains(case, found, codes) == [7]
    codes[9, 1] += 1
    with pytest.raises(AssertionError, match=r"row 9 differs in columns \[1\], and not by a tie"):
        rows_that_a_tie_explains(case, found, codes)


@pytest.mark.parametrize("case", [c for c in CASES if c.settings["layer"] == "wide"], ids=str)
def test_the_row_of_zeros_decodes_to_zeros_whatever_its_grid(case):
    codes, _, zero_point, _ = theirs(case)
    assert (codes[ZERO_ROW] == zero_point[ZERO_ROW, 0]).all()
    assert not values(run(case))[ZERO_ROW].any()


def test_the_vectors_tell_settings_apart():
    """Were these not different, the comparison above would not show that we have them right."""
    case = next(c for c in CASES if str(c) == "gptqmodel-wide-w4g64")
    codes = theirs(case)[0]
    for changed in (
        {"current_groups": True}, {"static_groups": True}, {"act_order": True}, {"symmetric": True},
        {"group_size": 128}, {"n_bits": 3}, {"damping": 0.02}, {"block_size": 64},
    ):  # fmt: skip
        assert (run(case, **changed).codes != codes).float().mean() > 0.01, changed
    row = next(c for c in CASES if str(c) == "gptqmodel-wide-w4grow")
    zeroed = LAYERS["wide.weight"].where(LAYERS["wide.hessian"].diagonal() != 0, 0)
    scale = gptq_codes(
        zeroed, LAYERS["wide.hessian"], group_size="row", scale_dtype="float32"
    ).scale
    assert not torch.allclose(scale, theirs(row)[1])  # grids are found before weights are zeroed


@pytest.mark.parametrize("library", LIBRARIES)
def test_hessians_are_those_of_production_libraries_but_for_a_factor(library):
    accumulated = Hessian(32)
    for batch in LAYERS["inputs"]:
        accumulated.update(batch)
    theirs = VECTORS[library][0]["hessian"].double()
    mine = accumulated.matrix() * (theirs.trace() / accumulated.matrix().trace())
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6 * theirs.abs().max().item())


@pytest.mark.parametrize("library", LIBRARIES)
def test_vectors_were_made_with_the_versions_that_make_oracles_installs(library):
    requirements = (ORACLES / library / "requirements.txt").read_text()
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", requirements, re.MULTILINE))
    versions = VECTORS[library][1]["versions"]
    assert library in pins
    assert {name: versions[name].partition("+")[0] for name in pins} == pins


def test_the_vectors_are_small():
    assert sum(file.stat().st_size for file in GOLDEN.iterdir()) < 1_000_000


# What must hold of any result.


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.sampled_from([2, 3, 4, 8]), st.booleans(), ORDERS)
def test_a_diagonal_hessian_gives_round_to_nearest_exactly(seed, n_bits, symmetric, order):
    """Unless the order makes other groups, which with static ones it does not."""
    weight = normal(6, 48, seed=seed)
    hessian = torch.diag(normal(48, seed=seed + 1).exp())
    if order["act_order"]:
        order = order | {"static_groups": True}
    found = gptq_codes(
        weight, hessian, n_bits=n_bits, group_size=16, symmetric=symmetric, block_size=24,
        scale_dtype="float32", **order,
    )  # fmt: skip
    assert torch.equal(found.codes, rounded(weight, 16, n_bits, symmetric))


@settings(deadline=None, max_examples=30)
@given(SEEDS, ORDERS, st.sampled_from([32, "row"]), st.floats(1e-6, 1e6), st.booleans())
def test_a_factor_of_the_hessian_changes_nothing(seed, order, size, factor, symmetric):
    weight, hessian = a_layer(seed=seed)
    given = {"group_size": size, "symmetric": symmetric, **order}
    found, scaled = (gptq_codes(weight, h, **given) for h in (hessian, factor * hessian))
    assert torch.equal(found.codes, scaled.codes) and torch.equal(found.scale, scaled.scale)
    torch.testing.assert_close(factor * found.losses, scaled.losses, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(1, 80), ORDERS)
def test_the_block_size_changes_nothing_without_groups(seed, block_size, order):
    weight, hessian = a_layer(seed=seed)
    whole = gptq_codes(weight, hessian, group_size="row", block_size=64, **order)
    blocks = gptq_codes(weight, hessian, group_size="row", block_size=block_size, **order)
    assert torch.equal(whole.codes, blocks.codes)
    torch.testing.assert_close(whole.losses, blocks.losses, rtol=1e-6, atol=1e-15)


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(1, 80), st.booleans())
def test_nor_does_it_where_groups_see_the_current_weights(seed, block_size, act_order):
    weight, hessian = a_layer(seed=seed)
    given = {"group_size": 16, "act_order": act_order, "current_groups": True}
    by_column = gptq_codes(weight, hessian, block_size=1, **given)
    blocks = gptq_codes(weight, hessian, block_size=block_size, **given)
    assert torch.equal(by_column.codes, blocks.codes) and torch.equal(by_column.scale, blocks.scale)


def test_groups_inside_a_block_get_stale_grids_as_in_the_authors_code():
    weight, hessian = a_layer(features=128)
    stale = gptq_codes(weight, hessian, group_size=16, block_size=128)
    static = gptq_codes(weight, hessian, group_size=16, block_size=128, static_groups=True)
    assert torch.equal(stale.codes, static.codes)  # all of them, where one block is all there is
    current = gptq_codes(weight, hessian, group_size=16, current_groups=True)
    assert not torch.equal(stale.scale, current.scale)
    aligned = gptq_codes(weight, hessian, group_size=16, block_size=16)
    assert torch.equal(aligned.codes, current.codes) and torch.equal(aligned.scale, current.scale)


@settings(deadline=None, max_examples=40)
@given(
    SEEDS, ORDERS, st.sampled_from([16, 64, "row"]), st.sampled_from([2, 3, 4, 8]), st.booleans(),
    st.floats(1e-3, 1.0), st.integers(1, 80), st.integers(0, 10),
)  # fmt: skip
def test_losses_sum_up_to_half_the_trace(
    seed, order, size, n_bits, symmetric, damping, block_size, dead
):
    """sum of losses = tr(dW H dW^T) / 2 with H damped, whatever the settings; W of dead features is 0."""
    weight, hessian = a_layer(seed=seed)
    hessian[:dead], hessian[:, :dead] = 0, 0
    found = gptq_codes(
        weight, hessian, n_bits=n_bits, group_size=size, symmetric=symmetric, damping=damping,
        block_size=block_size, **order,
    )  # fmt: skip
    weight[:, :dead], hessian.diagonal()[:dead] = 0, 1
    difference = weight - values(found)
    per_row = ((difference @ damped(hessian, damping)) * difference).sum(1) / 2
    torch.testing.assert_close(found.losses.sum(1), per_row, rtol=1e-10, atol=0)
    trace = (difference @ damped(hessian, damping) @ difference.T).trace() / 2
    assert found.losses.sum().item() == pytest.approx(trace.item(), rel=1e-10, abs=0)


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_the_factor_holds_every_step_of_optimal_brain_quantization(seed):
    """Row k of U: head and first row of the inverse of what is left of H after k columns."""
    _, hessian = a_layer(features=12, seed=seed)
    U, H = inverse_factor(hessian, 0.01), damped(hessian)
    torch.testing.assert_close(U.T @ U, H.inverse(), rtol=1e-8, atol=1e-10)
    assert not U.tril(-1).any()
    for k in range(12):
        row = H[k:, k:].inverse()[0]
        torch.testing.assert_close(U[k, k:] * U[k, k], row, rtol=1e-7, atol=1e-10)


def test_an_example_by_hand():
    """Two columns, one code step: what rounding 0.4 loses, the second column gets by H's correlation.

    H = [[2, 1], [1, 2]], no damping: U = [[sqrt(2/3), -1/sqrt(6)], [0, 1/sqrt(2)]]. The row's grid is 0..3
    in steps of 1. w_0 = 0.4 becomes 0, its error (0.4 - 0) / U_00 goes on by U_01 = -U_00 / 2: w_1 = 1.4
    becomes 1.4 + 0.2 = 1.6, and so 2, where round-to-nearest has 1. A third, uncorrelated column is 3.
    """
    hessian = torch.tensor([[2.0, 1, 0], [1, 2, 0], [0, 0, 2]], dtype=torch.float64)
    weight = torch.tensor([[0.4, 1.4, 3.0]])
    found = gptq_codes(weight, hessian, n_bits=2, group_size="row", damping=0)
    assert found.scale.item() == 1 and found.zero_point.item() == 0
    assert found.codes.tolist() == [[0, 2, 3]]
    expected = torch.tensor([[0.4**2 * 3 / 2 / 2, (1.6 - 2) ** 2 * 2 / 2, 0]], dtype=torch.float64)
    torch.testing.assert_close(found.losses, expected, rtol=1e-6, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.sampled_from([16, "row"]))
def test_with_act_order_the_order_of_columns_does_not_matter(seed, size):
    weight, hessian = a_layer(seed=seed)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
    given = {"group_size": size, "act_order": True}
    found = gptq_codes(weight, hessian, **given)
    other = gptq_codes(weight[:, shuffled], hessian[shuffled][:, shuffled], **given)
    assert torch.equal(found.codes[:, shuffled], other.codes)
    assert torch.equal(found.group_index[shuffled], other.group_index)
    torch.testing.assert_close(found.losses[:, shuffled], other.losses, rtol=1e-6, atol=1e-15)


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_act_order_takes_the_largest_inputs_first(seed):
    """The first column is plain round-to-nearest, and groups follow the order."""
    weight, hessian = a_layer(seed=seed)
    order = hessian.diagonal().argsort(descending=True)
    found = gptq_codes(weight, hessian, group_size=16, act_order=True, scale_dtype="float32")
    assert torch.equal(found.group_index[order], torch.arange(64).int() // 16)
    first, group = order[0], weight[:, order[:16]]
    plain = rounded(group, 16)[:, 0]
    assert torch.equal(found.codes[:, first], plain)
    static = gptq_codes(weight, hessian, group_size=16, act_order=True, static_groups=True)
    assert torch.equal(static.group_index, torch.arange(64).int() // 16)


@settings(deadline=None, max_examples=20)
@given(SEEDS, ORDERS, st.integers(1, 10))
def test_dead_features_get_zero_and_change_nothing_else(seed, order, number):
    x = inputs(256, 64, seed)
    dead = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:number]
    x[:, dead] = 0
    weight, hessian = normal(8, 64, seed=seed), x.T @ x / 128
    found = gptq_codes(weight, hessian, group_size=16, **order)
    assert not values(found)[:, dead].any() and not found.losses[:, dead].any()
    alive = hessian.diagonal() > 0
    row = gptq_codes(weight, hessian, group_size="row", damping=0.0, **order)
    without = gptq_codes(
        torch.cat([weight[:, alive], weight[:, dead]], 1),
        torch.block_diag(hessian[alive][:, alive], torch.eye(number)),
        group_size="row", damping=0.0, **order,
    )  # fmt: skip
    assert torch.equal(row.codes[:, alive], without.codes[:, : 64 - number])


def test_a_tie_goes_to_the_even_multiple_of_the_scale():
    """As in the authors' code: rounded first, then moved by the zero point, which is 1 here."""
    weight = torch.tensor([[-1.0, -0.5, 0.5, 1.5, 2.0]])
    found = gptq_codes(weight, torch.eye(5), n_bits=2, group_size="row")
    assert found.scale.item() == 1 and found.zero_point.item() == 1
    assert found.codes.tolist() == [[0, 1, 1, 3, 3]]


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_of_zeros_and_one_without_negative_weights(symmetric):
    weight, hessian = a_layer()[0], torch.eye(64)
    weight[0], weight[1] = 0, weight[1].abs()
    found = gptq_codes(weight, hessian, group_size="row", symmetric=symmetric)
    assert found.scale[0].item() == pytest.approx(2 / 15, rel=1e-3)  # of the authors' range -1..1
    assert not values(found)[0].any()
    error = (weight[1] - values(found)[1]).abs()
    assert (
        error.max() < found.scale[1]
    )  # half the scale, as the authors have it, would clip by 7 steps


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_error_on_the_inputs_is_below_that_of_round_to_nearest(seed):
    """No theorem; on correlated inputs it holds by far."""
    weight, hessian = a_layer(16, 64, seed=seed)

    def error(codes):
        difference = weight - codes
        return ((difference @ hessian) * difference).sum().item()

    plain = Affine(group_size=32).quantize(weight).dequantize().double()
    assert error(values(gptq_codes(weight, hessian, group_size=32))) < 0.95 * error(plain)


# The method.


def statistics_of(x, batches=1):
    found = Hessian(x.shape[1])
    for batch in x.chunk(batches):
        found.update(batch)
    return found


def test_the_hessian_does_not_depend_on_batches_and_holds_massive_activations():
    x = inputs(96, 24).float()
    x[5, 3] = 25_000
    whole = statistics_of(x).matrix()
    assert whole.dtype == torch.float64 and torch.equal(whole, whole.T)
    exact = x.double().T @ x.double() * (2 / 96)
    for batches in (1, 3, 7):
        torch.testing.assert_close(statistics_of(x, batches).matrix(), exact, rtol=1e-12, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(SEEDS, ORDERS, st.sampled_from([16, "row"]), st.integers(2, 8), st.booleans())
def test_pack_and_unpack_hold_what_was_found(seed, order, size, n_bits, symmetric):
    x = inputs(128, 48, seed).float()
    weight, given = normal(6, 48, seed=seed).float(), {"n_bits": n_bits, "symmetric": symmetric}
    method = GPTQ(group_size=size, **given, **order)
    stored = method.quantize(weight, statistics_of(x))
    found = gptq_codes(weight, statistics_of(x).matrix(), group_size=size, **given, **order)
    assert torch.equal(stored.integer_codes(), found.codes)
    assert torch.equal(stored.zero_points(), found.zero_point)
    torch.testing.assert_close(stored.dequantize().double(), values(found), rtol=1e-6, atol=0)
    scattered = order["act_order"] and not order["static_groups"] and size != "row"
    assert (stored.group_index is not None) == scattered
    groups = 1 if size == "row" else 3
    zero_points = 0 if symmetric else 6 * -(-groups * n_bits // 8)
    index = 4 * 48 if scattered else 0
    assert stored.nbytes == 6 * 48 * n_bits // 8 + 6 * groups * 2 + zero_points + index


def test_codes_are_computed_with_the_scale_as_stored():
    """So no value is further from the weight than float16 scales make it: losses are of what is stored."""
    x, weight = inputs(256, 64).float(), normal(8, 64).float()
    stored = GPTQ(group_size="row").quantize(weight, statistics_of(x))
    assert stored.scale.dtype == torch.float16
    H = statistics_of(x).matrix()
    found = gptq_codes(weight, H, group_size="row")
    difference = weight.double() - stored.dequantize().double()
    trace = (difference @ damped(H) @ difference.T).trace() / 2
    assert found.losses.sum().item() == pytest.approx(trace.item(), rel=1e-5)


def test_linear_is_the_product_with_the_dequantized_weight_in_the_dtype_of_the_inputs():
    x, weight = inputs(256, 64).float(), normal(8, 64).float()
    method, bias = GPTQ(group_size=16, act_order=True), normal(8).float()
    stored = method.quantize(weight, statistics_of(x))
    expected = x @ stored.dequantize().T + bias
    torch.testing.assert_close(method.linear(x, stored, bias), expected)
    assert method.linear(x.bfloat16(), stored, bias.bfloat16()).dtype == torch.bfloat16
    # what is stored does not follow the model's dtype, so neither does the bias
    assert method.linear(x.bfloat16(), stored, bias).dtype == torch.bfloat16


@pytest.mark.parametrize("group_size", [16, 32])
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("tokens", [1, 40])
def test_defect_scattered_groups_were_multiplied_as_if_they_were_neighbours(
    group_size, static_groups, tokens
):
    """Kernels took column i's scale to be that of group i // group_size, which act-order changes."""
    x, weight = inputs(256, 64).float(), normal(8, 64).float()
    method = GPTQ(group_size=group_size, act_order=True, static_groups=static_groups)
    stored = method.quantize(weight, statistics_of(x))
    expected = x[:tokens] @ stored.dequantize().T
    torch.testing.assert_close(method.linear(x[:tokens], stored, None), expected)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_blocks_follow_the_quantized_ones_before(make):
    """The second block's Hessian is that of a model whose first block is quantized already."""
    tokens, method = some_tokens(8, 20), GPTQ(group_size=8, act_order=True)
    whole, stepwise = make(), make()
    report = quantize_model(whole, method, calibration=tokens)
    names = [layer.name for layer in report.layers]
    for part in (names[: len(names) // 2], names[len(names) // 2 :]):
        quantize_model(stepwise, dict.fromkeys(part, method), calibration=tokens)
    for name in names:
        modules = (model.get_submodule(name) for model in (whole, stepwise))
        ours, again = (module.quantized_weight for module in modules)
        assert torch.equal(ours.codes, again.codes) and torch.equal(ours.scale, again.scale)
    apart = make()
    quantize_model(apart, dict.fromkeys(names[len(names) // 2 :], method), calibration=tokens)
    last = [model.get_submodule(names[-1]).quantized_weight.codes for model in (whole, apart)]
    assert not torch.equal(*last)


@pytest.mark.parametrize("given", [{}, {"act_order": True}, {"symmetric": True, "n_bits": 3}])
def test_saving_and_loading(tmp_path, given):
    model, tokens = tiny_llama(), some_tokens(8, 20)
    quantize_model(model, GPTQ(group_size=8, **given), calibration=tokens)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_course_lm_errs_less_than_with_round_to_nearest():
    model, tokenizer = load_model("course-lm")
    tokens = calibration_tokens(tokenizer, 8, 256)
    name = "transformer.h.0.mlp.c_fc"
    errors = {}
    for method in (Affine(n_bits=3, group_size=128), GPTQ(n_bits=3, group_size=128)):
        model, _ = load_model("course-lm")
        report = quantize_model(model, {name: method}, calibration=tokens)
        errors[method.name] = report.layers[0].output_error
    assert errors["gptq"] < 0.9 * errors["affine"]


def test_groups_that_act_order_takes_apart_need_no_grid():
    """Their scales would not fit into float16, but no group is made of these columns in the end."""
    weight, hessian = a_layer()
    small = torch.arange(64) // 4 % 4 == 0  # each fourth group of 4
    weight[:, small] *= 1e-7
    with pytest.raises(ValueError, match="do not fit into float16"):
        gptq_codes(weight, hessian, group_size=4, act_order=True, static_groups=True)
    order = hessian.diagonal().argsort(descending=True)
    assert not small[order].view(-1, 4).all(1).any(), "choose another Hessian for this test"
    gptq_codes(weight, hessian, group_size=4, act_order=True)


# What is refused.


def test_groups_that_do_not_divide_are_told_which_would():
    """SmolLM2's width is 576."""
    weight, statistics = torch.randn(4, 576), statistics_of(torch.randn(600, 576))
    with pytest.raises(
        ValueError, match=r"group_size 128 does not divide the 576 .* 96, 72, 64 or"
    ):
        GPTQ(group_size=128).quantize(weight, statistics)


def test_a_hessian_without_inputs_or_with_nothing_but_zeros_is_refused():
    with pytest.raises(ValueError, match=r"needs the Hessian.*some calibration"):
        GPTQ().quantize(torch.randn(4, 128))
    with pytest.raises(ValueError, match="has seen no inputs: the calibration is empty"):
        GPTQ().quantize(torch.randn(4, 128), Hessian(128))
    with pytest.raises(ValueError, match="all 200 calibration inputs are zero"):
        GPTQ().quantize(torch.randn(4, 128), statistics_of(torch.zeros(200, 128)))
    with pytest.raises(ValueError, match=r"Give quantize_model calibration="):
        quantize_model(tiny_gpt2(), GPTQ(group_size=8))


def test_fewer_tokens_than_features_are_warned_of_and_refused_without_damping():
    weight, statistics = torch.randn(4, 128), statistics_of(inputs(20, 128))
    with pytest.warns(
        UserWarning, match=r"Hessian of 128 features comes from 20 .* least 128 tokens"
    ):
        stored = GPTQ().quantize(weight, statistics)
    assert stored.dequantize().isfinite().all()
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"damping 0\.0 is not positive definite.*float64.*raise"),
    ):
        GPTQ(damping=0.0).quantize(weight, statistics)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_their_batch(bad):
    statistics, x = Hessian(8), torch.ones(3, 8)
    statistics.update(x)
    x[1, 2] = bad
    with pytest.raises(ValueError, match="calibration batch 2: 1 of 24 inputs are NaN or infinite"):
        statistics.update(x)


def test_activations_that_are_not_finite_name_their_layer():
    model = tiny_gpt2()
    model.transformer.h[1].ln_2.weight.data[3] = float("nan")
    with pytest.raises(
        ValueError, match=r"layer transformer\.h\.1\.mlp\.c_fc: 20 of its 480 inputs"
    ):
        quantize_model(model, GPTQ(group_size=8), calibration=some_tokens(8, 20))


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.eye(3), r"4 columns is float \[4, 4\], got torch\.float32 \(3, 3\)"),
        (torch.eye(4, dtype=torch.int64), r"got torch\.int64"),
        (torch.eye(4) * float("nan"), "16 of 16 entries of the Hessian are NaN"),
        (-torch.eye(4), "not positive definite in torch.float32"),
    ],
)
def test_bad_hessians_are_refused(hessian, message):
    with pytest.raises(ValueError, match=message):
        gptq_codes(torch.randn(2, 4), hessian, group_size="row")


def test_bad_weights_are_refused():
    with pytest.raises(ValueError, match="are not finite"):
        gptq_codes(torch.full((2, 4), float("nan")), torch.eye(4), group_size="row")
    with pytest.raises(ValueError, match=r"do not fit into float16.*scale_dtype='float32'"):
        gptq_codes(torch.randn(2, 4) * 1e8, torch.eye(4), group_size="row")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_bits": 1}, "n_bits 1: choose 2 to 8"),
        ({"n_bits": 4.0}, r"n_bits 4\.0: choose 2 to 8"),
        ({"group_size": 0}, "group_size 0: choose a positive number or 'row'"),
        ({"group_size": "tensor"}, "group_size 'tensor'"),
        ({"block_size": 0}, "block_size 0: choose a positive number$"),
        ({"act_order": "false"}, "act_order 'false': choose True or False"),
        ({"symmetric": 1}, "symmetric 1: choose True or False"),
        ({"damping": -0.1}, r"damping -0\.1.*the paper's is 0\.01"),
        ({"damping": float("nan")}, "damping nan"),
        ({"scale_dtype": "bfloat16"}, "scale_dtype 'bfloat16'"),
        ({"static_groups": True, "current_groups": True}, "choose one of them"),
    ],
)
def test_bad_settings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        GPTQ(**given)


def test_it_is_registered():
    assert type(get_method("gptq")) is GPTQ and get_method("gptq", n_bits=3) == GPTQ(n_bits=3)
    assert GPTQ().needs_calibration and not GPTQ().rewrites_blocks
