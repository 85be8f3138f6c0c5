"""Heads, neurons and layers removed for real: exact where nothing is lost, plain where it is saved."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import some_tokens, tiny_gpt2, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import prune_linear_layer

from course_utils.compression.rotation import random_rotation, rotated
from course_utils.models.walk import LinearLayer, blocks, linear_layers
from course_utils.pruning.importance import (
    activation,
    best_layers,
    block_influence,
    magnitude,
    random_scores,
    taylor,
)
from course_utils.pruning.structured import (
    best_units,
    check_plain,
    keep_layers,
    keep_units,
    save_plain,
    units_of,
)
from course_utils.training.loop import next_token_loss

MODELS = pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
KINDS = pytest.mark.parametrize("kind", ["neurons", "heads"])


def logits(model, tokens=None):
    with torch.no_grad():
        return model(input_ids=some_tokens() if tokens is None else tokens).logits


def count_of(model, kind):
    return len(units_of(blocks(model)[0][1], kind)[0].places)


def all_but_first(model, kind):
    return {name: range(1, count_of(model, kind)) for name, _ in blocks(model)}


@MODELS
@KINDS
def test_units_that_give_nothing_go_without_a_trace(make, kind):
    model = make().double().eval()
    for _, block in blocks(model):
        *_, read = units_of(block, kind)
        weight = LinearLayer("", block.get_submodule(read.layer)).weight
        weight[:, read.places[0]] = 0
    before = logits(model)
    smaller = keep_units(model, kind, all_but_first(model, kind))
    assert smaller.num_parameters() < model.num_parameters()
    torch.testing.assert_close(logits(smaller), before, rtol=1e-10, atol=1e-10)


@MODELS
@KINDS
def test_removing_is_the_same_as_zeros_in_what_reads(make, kind):
    model = make().double().eval()
    smaller = keep_units(model, kind, all_but_first(model, kind))
    for _, block in blocks(model):
        *_, read = units_of(block, kind)
        LinearLayer("", block.get_submodule(read.layer)).weight[:, read.places[0]] = 0
    torch.testing.assert_close(logits(smaller), logits(model), rtol=1e-10, atol=1e-10)


@MODELS
@KINDS
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_parameters_removed_are_those_of_the_units(make, kind, data):
    model = make()
    count = count_of(model, kind)
    kept = data.draw(st.integers(1, count))
    smaller = keep_units(model, kind, best_units(random_scores(model, kind, 0), kept))
    per_unit = 0
    block = blocks(model)[0][1]
    for share in units_of(block, kind):
        layer = LinearLayer("", block.get_submodule(share.layer))
        lines = share.places.shape[1]
        per_unit += lines * layer.weight.shape[1 - share.axis]
        per_unit += lines if share.axis == 0 and layer.bias is not None else 0
    gone = model.num_parameters() - smaller.num_parameters()
    assert gone == (count - kept) * per_unit * len(blocks(model))


def test_neurons_are_cut_as_transformers_cuts_linear_layers():
    model = tiny_llama()
    kept = [0, 3, 4]
    smaller = keep_units(model, "neurons", {name: kept for name, _ in blocks(model)})
    old, new = blocks(model)[0][1].mlp, blocks(smaller)[0][1].mlp
    index = torch.tensor(kept)
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        expected = prune_linear_layer(getattr(old, name), index, dim=axis)
        assert torch.equal(getattr(new, name).weight, expected.weight)


@pytest.mark.parametrize(
    ("make", "kind"), [(tiny_gpt2, "neurons"), (tiny_llama, "neurons"), (tiny_llama, "heads")]
)
def test_a_smaller_model_is_saved_and_loaded_as_a_plain_one(make, kind, tmp_path):
    model = make().eval()
    smaller = keep_units(model, kind, all_but_first(model, kind))
    smaller = keep_layers(smaller, range(1, len(blocks(model))))
    save_plain(smaller, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(smaller))
    assert loaded.num_parameters() == smaller.num_parameters() < model.num_parameters()


def test_a_smaller_model_writes_on_with_its_cache(tmp_path):
    model = keep_layers(tiny_gpt2().eval(), [1])
    model = keep_units(model, "heads", all_but_first(model, "heads"))
    tokens = some_tokens(1, 6)
    with torch.no_grad():
        first = model(input_ids=tokens[:, :5], use_cache=True)
        rest = model(input_ids=tokens[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits[:, 0], logits(model, tokens)[:, 5])


def test_fewer_heads_of_gpt2_have_no_plain_config(tmp_path):
    model = tiny_gpt2()
    smaller = keep_units(model, "heads", all_but_first(model, "heads"))
    with pytest.raises(ValueError, match=r"attn\.c_attn\.weight is .*no plain config"):
        save_plain(smaller, tmp_path)
    assert not list(tmp_path.iterdir())
    check_plain(model)


@MODELS
def test_the_model_itself_is_left_alone(make):
    model = make()
    before = copy.deepcopy(model.state_dict())
    keep_units(model, "neurons", all_but_first(model, "neurons"))
    keep_layers(model, [0])
    taylor(model, "neurons", some_tokens())
    rotated(model, random_rotation(model.config.hidden_size, 0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_layers_keep_their_order_and_their_outputs():
    model = tiny_gpt2().eval()
    smaller = keep_layers(model, [1, 0])
    assert torch.equal(logits(smaller), logits(model))
    assert keep_layers(model, [1]).config.n_layer == 1


# Importance


def test_magnitude_of_a_neuron_by_hand():
    model = tiny_gpt2()
    mlp = blocks(model)[0][1].mlp
    found = magnitude(model, "neurons")["transformer.h.0"]
    squares = mlp.c_fc.weight.square().sum(0) + mlp.c_proj.weight.square().sum(1)
    torch.testing.assert_close(found, squares.detach().sqrt())


def test_activation_of_neurons_by_hand():
    model = tiny_llama().eval()
    tokens = some_tokens()
    seen = []
    layer = blocks(model)[1][1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, tokens)
    handle.remove()
    expected = seen[0].abs().mean(1).square().sum(0).sqrt()
    torch.testing.assert_close(
        activation(model, "neurons", tokens)[blocks(model)[1][0]], expected.detach()
    )


@MODELS
@KINDS
def test_taylor_tells_what_small_changes_cost(make, kind):
    """Sums of |w g| over all units of all kinds of layers are those of autograd itself."""
    model = make().double().eval()
    tokens = some_tokens()
    found = taylor(model, kind, tokens)
    loss = sum(next_token_loss(model, t[None]) for t in tokens) / len(tokens)
    name, block = blocks(model)[0]
    total = torch.zeros(())
    for share in units_of(block, kind):
        weight = block.get_submodule(share.layer).weight
        total = (
            total + (weight * torch.autograd.grad(loss, weight, retain_graph=True)[0]).abs().sum()
        )
    torch.testing.assert_close(found[name].sum(), total.float().detach(), rtol=1e-4, atol=1e-6)


@MODELS
def test_every_score_has_one_number_a_unit(make):
    model, tokens = make().eval(), some_tokens()
    for kind in ("neurons", "heads", "layers"):
        found = [magnitude(model, kind), taylor(model, kind, tokens), random_scores(model, kind, 1)]
        found += [
            block_influence(model, tokens) if kind == "layers" else activation(model, kind, tokens)
        ]
        for scores in found:
            expected = 1 if kind == "layers" else count_of(model, kind)
            assert {len(of_block) for of_block in scores.values()} == {expected}
            assert list(scores) == [name for name, _ in blocks(model)]


def test_a_layer_that_adds_nothing_has_no_influence():
    model = tiny_gpt2().eval()
    for layer in linear_layers(blocks(model)[1][1]):
        layer.weight.zero_()
        layer.bias.zero_()
    found = block_influence(model, some_tokens())
    assert found["transformer.h.1"].item() == pytest.approx(0, abs=1e-6)
    assert found["transformer.h.0"].item() > 1e-4
    assert best_layers(found, 1) == [0]
    torch.testing.assert_close(logits(keep_layers(model, [0])), logits(model))


def test_best_units_are_the_highest_and_the_first_of_equal_ones():
    assert best_units({"a": torch.tensor([1.0, 3.0, 3.0, 2.0])}, 2) == {"a": [1, 2]}
    assert best_units({"a": torch.ones(4)}, 3) == {"a": [0, 1, 2]}


# Rotation


@MODELS
def test_a_rotation_leaves_the_logits(make):
    model = make().double().eval()
    with torch.no_grad():  # gains and biases that say something
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.rand_like(parameter))
    turned = rotated(model, random_rotation(model.config.hidden_size, 3))
    # Llama's RMSNorm computes in float32
    torch.testing.assert_close(logits(turned), logits(model), rtol=1e-5, atol=1e-6)
    seen = []
    for changed in (model, turned):
        seen.append(torch.cat([b.mlp(torch.ones(1, 1, model.config.hidden_size).double())
                               for _, b in blocks(changed)]))  # fmt: skip
    assert not torch.allclose(*seen)


def test_layer_norm_alone_does_not_turn_with_its_input():
    x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    Q = random_rotation(8, 0)
    norms = nn.LayerNorm(8, 1e-5, False), nn.RMSNorm(8, 1e-5, False)
    apart = [(norm(x @ Q) - norm(x) @ Q).abs().max().item() for norm in norms]
    assert apart[0] > 0.1 and apart[1] < 1e-10
    centred = x - x.mean(1, keepdim=True)
    torch.testing.assert_close(norms[1](centred), norms[0](x))


# Bad input


def keep_of(first, second):
    return {"transformer.h.0": first, "transformer.h.1": second}


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (keep_of([], []), "all neurons of transformer.h.0 would go: keep at least one"),
        (keep_of([0, 1], [0]), "2 neurons of transformer.h.0 and 1 of transformer.h.1"),
        (keep_of([0, 0], [0, 1]), "neurons .0, 0. of transformer.h.0, which has"),
        (keep_of([0, 9999], [0, 1]), "name different ones from 0 to"),
        ({"transformer.h.0": [0]}, "nothing said about transformer.h.1"),
        (keep_of([0], [0]) | {"transformer.h.7": [0]}, "no block 'transformer.h.7'"),
    ],
)
def test_what_cannot_be_kept_is_refused(keep, message):
    with pytest.raises(ValueError, match=message):
        keep_units(tiny_gpt2(), "neurons", keep)


def test_all_heads_and_all_layers_are_refused():
    with pytest.raises(ValueError, match=r"all heads of transformer\.h\.0 would go"):
        keep_units(tiny_gpt2(), "heads", keep_of([], []))
    with pytest.raises(ValueError, match="all layers would go"):
        keep_layers(tiny_gpt2(), [])
    for layers in ([0, 0], [5], [-1]):
        with pytest.raises(ValueError, match="name different ones from 0 to 1"):
            keep_layers(tiny_gpt2(), layers)


@pytest.mark.parametrize("count", [0, 5])
def test_counts_that_do_not_fit_are_refused(count):
    with pytest.raises(ValueError, match=f"{count} units of a, which has 4"):
        best_units({"a": torch.ones(4)}, count)
    with pytest.raises(ValueError, match=f"{count} layers of 4"):
        best_layers({str(i): torch.ones(1) for i in range(4)}, count)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0), (2, 1), (8,)])
@pytest.mark.parametrize(
    "score",
    [
        lambda m, t: activation(m, "neurons", t),
        lambda m, t: taylor(m, "heads", t),
        lambda m, t: block_influence(m, t),
    ],
)
def test_empty_calibration_is_refused(score, shape):
    with pytest.raises(ValueError, match=r"calibration .* at least one sequence"):
        score(tiny_gpt2(), torch.zeros(shape, dtype=torch.long))


def test_unknown_kinds_and_blocks_are_refused():
    with pytest.raises(ValueError, match="kind 'experts': choose of neurons, heads"):
        units_of(blocks(tiny_gpt2())[0][1], "experts")
    with pytest.raises(ValueError, match="class Linear is not known"):
        units_of(nn.Linear(2, 2), "neurons")


@pytest.mark.parametrize(
    ("Q", "message"),
    [(torch.eye(3), "Q is .3, 3., and hidden states have"), (None, "away from the identity")],
)
def test_what_is_no_rotation_is_refused(Q, message):
    model = tiny_gpt2()
    Q = 2 * torch.eye(model.config.hidden_size) if Q is None else Q
    with pytest.raises(ValueError, match=message):
        rotated(model, Q)
