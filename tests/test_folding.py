"""Folding: the float function stays, for both architectures and for grouped queries; what does not fold."""

import copy

import pytest
import torch
from tiny_models import some_tokens, tiny_gpt2, tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

from course_utils.compression import folding
from course_utils.compression.folding import (
    FOLDS,
    Fold,
    apply_fold,
    check_folds,
    folds_of,
    pool,
    source_features,
)
from course_utils.models import blocks, linear_layers
from course_utils.models.structure import norm_groups


def biased_llama(heads=4, key_value_heads=2):
    """A Llama whose projections have biases, and whose norms are not 1."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=key_value_heads, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
    )  # fmt: skip
    return randomised(LlamaForCausalLM(config).eval())


def randomised(model):
    """All norms and biases away from 1 and 0."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


MODELS = {
    "gpt2": lambda: randomised(tiny_gpt2()),
    "llama": lambda: randomised(tiny_llama()),
    "llama with biases": biased_llama,
    "llama, every query with its own values": lambda: biased_llama(4, 4),
    "llama, one head of values": lambda: biased_llama(4, 1),
}
ALL = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def random_scale(features, seed, spread=1.5):
    return (torch.randn(features, generator=torch.Generator().manual_seed(seed)) * spread).exp()


def features_of(block, fold):
    return int(source_features(block, fold).max()) + 1


@ALL
@torch.no_grad()
def test_folding_leaves_the_float_function_as_it_is(make):
    model, tokens = make(), some_tokens(4, 30)
    expected = model(tokens).logits
    for seed, (_, block) in enumerate(blocks(model)):
        check_folds(block)
        for fold in folds_of(block):
            apply_fold(block, fold, random_scale(features_of(block, fold), seed))
            found = model(tokens).logits
            assert ((found - expected).norm() / expected.norm()).item() < 1e-5, fold


@ALL
@torch.no_grad()
def test_scales_that_are_powers_of_two_change_no_bit(make):
    model, tokens = make(), some_tokens(4, 30)
    expected = model(tokens).logits
    for _, block in blocks(model):
        for fold in folds_of(block):
            features = features_of(block, fold)
            apply_fold(block, fold, 2.0 ** (torch.arange(features) % 7 - 3))
    assert torch.equal(model(tokens).logits, expected)


@ALL
@torch.no_grad()
def test_inputs_of_the_layers_are_divided_and_only_theirs(make):
    """Every layer of the fold reads x / s; all other layers read what they did."""
    model, tokens = make(), some_tokens(2, 20)
    seen = {}
    for layer in linear_layers(model):
        layer.module.register_forward_pre_hook(
            lambda _, args, name=layer.name: seen.update({name: args[0].clone()})
        )
    model(tokens)
    before = dict(seen)
    prefix, block = blocks(model)[0]
    for number, fold in enumerate(folds_of(block)):
        index = source_features(block, fold)
        scale = random_scale(int(index.max()) + 1, number)
        apply_fold(block, fold, scale)
        model(tokens)
        for name, x in seen.items():
            fed = name.removeprefix(f"{prefix}.") in fold.layers
            expected = before[name] / scale[index] if fed else before[name]
            torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
        before = dict(seen)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_folds_behind_norms_are_those_of_smoothquant(make):
    _, block = blocks(make())[0]
    groups = {(id(group.norm), group.layers) for group in norm_groups(block)}
    norms = {
        (id(block.get_submodule(fold.source)), fold.layers)
        for fold in folds_of(block)
        if block.get_submodule(fold.source).weight.ndim == 1
    }
    assert norms == groups


def test_query_heads_of_a_group_share_the_scale_of_their_values():
    _, block = blocks(tiny_llama())[0]  # 4 query heads, 2 heads of values, 6 wide
    fold = next(fold for fold in folds_of(block) if fold.source == "self_attn.v_proj")
    index = source_features(block, fold)
    first, second = list(range(6)), list(range(6, 12))
    assert index.tolist() == first + first + second + second
    values = torch.arange(24.0)
    assert pool(values, index).tolist() == [
        *(i + 3.0 for i in range(6)),
        *(i + 15.0 for i in range(6)),
    ]
    assert torch.equal(pool(values, torch.arange(24)), values)


@torch.no_grad()
def test_gpt2_divides_values_alone_and_their_bias():
    model = randomised(tiny_gpt2())
    _, block = blocks(model)[0]
    fold = next(fold for fold in folds_of(block) if fold.source == "attn.c_attn")
    before, scale = copy.deepcopy(block), random_scale(24, 0)
    apply_fold(block, fold, scale)
    c_attn, old = block.attn.c_attn, before.attn.c_attn  # Conv1D: [in, out]
    assert torch.equal(c_attn.weight[:, :48], old.weight[:, :48])
    assert torch.equal(c_attn.bias[:48], old.bias[:48])
    torch.testing.assert_close(c_attn.weight[:, 48:], old.weight[:, 48:] / scale)
    torch.testing.assert_close(c_attn.bias[48:], old.bias[48:] / scale)
    torch.testing.assert_close(block.attn.c_proj.weight, before.attn.c_proj.weight * scale[:, None])
    assert torch.equal(block.attn.c_proj.bias, before.attn.c_proj.bias)


@torch.no_grad()
def test_nothing_folds_through_gelu():
    """Why GPT-2 has no fold from c_fc to c_proj: it would change the function."""
    model, tokens = randomised(tiny_gpt2()), some_tokens()
    expected = model(tokens).logits
    _, block = blocks(model)[0]
    apply_fold(block, Fold("mlp.c_fc", ("mlp.c_proj",), "mlp.c_proj"), random_scale(96, 0))
    assert ((model(tokens).logits - expected).norm() / expected.norm()).item() > 1e-3
    assert not any("mlp.c_proj" in fold.layers for fold in folds_of(block))


def test_another_architecture_is_another_entry(monkeypatch):
    class MyBlock(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.first = torch.nn.LayerNorm(8), torch.nn.Linear(8, 6)

        def forward(self, x):
            return self.first(self.norm(x))

    block, x = MyBlock(), torch.randn(5, 8)
    message = (
        r'class MyBlock is not known.*GPT2Block.*FOLDS\["MyBlock"\] = \(Fold\("name of a norm"'
    )
    with pytest.raises(ValueError, match=message):
        check_folds(block)
    monkeypatch.setitem(FOLDS, "MyBlock", (Fold("norm", ("first",), "first"),))
    check_folds(block)
    expected = block(x)
    apply_fold(block, *folds_of(block), random_scale(8, 0))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


BAD = {
    "reads other features": (Fold("mlp.up_proj", ("self_attn.o_proj",), "mlp"), "makes 40 .* reads 24"),
    "heads not told": (Fold("self_attn.v_proj", ("self_attn.o_proj",), "self_attn"), "makes 12 .*reads 24"),
    "parts": (Fold("mlp.up_proj", ("mlp.down_proj",), "mlp", parts=3), "40 features in 3 equal parts"),
    "unlike layers": (
        Fold("input_layernorm", ("self_attn.q_proj", "mlp.down_proj"), "mlp"), "have 24, 40 columns"),
    "no layer": (Fold("input_layernorm", ("mlp",), "mlp"), "layer mlp has no float weight.*LlamaMLP"),
    "no source": (Fold("mlp", ("mlp.down_proj",), "mlp"), "mlp is a LlamaMLP, neither"),
}  # fmt: skip


@pytest.mark.parametrize(("fold", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fold_is_refused(fold, message, monkeypatch):
    _, block = blocks(tiny_llama())[0]
    monkeypatch.setitem(folding.FOLDS, "LlamaDecoderLayer", (fold,))
    with pytest.raises(ValueError, match=message):
        check_folds(block)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_are_not_positive_and_finite_are_refused(bad):
    _, block = blocks(tiny_gpt2())[0]
    scale = torch.ones(24)
    scale[3] = bad
    with pytest.raises(ValueError, match="a scale of ln_1 is one positive, finite number"):
        apply_fold(block, folds_of(block)[0], scale)
    with pytest.raises(ValueError, match=r"each of its 24 features, got \(7,\)"):
        apply_fold(block, folds_of(block)[0], torch.ones(7))
