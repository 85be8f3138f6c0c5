"""AWQ: its scales and ranges, llm-compressor's golden scales, whole models, and bad input."""

import copy
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny_models import some_tokens, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from course_utils.compression import get_method, prepare_model, quantize_model
from course_utils.compression.folding import folds_of, source_features
from course_utils.data.tokens import calibration_tokens, evaluation_tokens
from course_utils.evaluation import perplexity
from course_utils.models import BlockInputs, LinearLayer, blocks, linear_layers, load_model
from course_utils.models.walk import hidden_states
from course_utils.quantizers.affine import Affine, AffineWeight
from course_utils.quantizers.awq import (
    AWQ,
    CLIPPING,
    GRIDS,
    InputMoments,
    activation_scale,
    relative_magnitude,
    squared_output,
)
from course_utils.quantizers.gptq import GPTQ

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
SEEDS = st.integers(0, 2**31)
MODELS = pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(make, seed=1):
    """A tiny model whose norms make some features large, and with biases that are not 0."""
    model = make()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.randn(parameter.shape, generator=generator)
            parameter.data[::7] *= 8
    return model


def awq(**changed):
    """3 bits in groups that divide the widths of the tiny models."""
    return AWQ(**{"n_bits": 3, "group_size": 8} | changed)


def first_block(model, tokens):
    _, block = blocks(model)[0]
    return block, BlockInputs.of_first_block(model, tokens)


def by_source(found):
    return {one.fold.source: one for one in found}


# Scales


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(2**-10, 2**13, width=32), min_size=1, max_size=20), st.floats(0, 1))
def test_scales_are_powers_of_the_mean_magnitude_and_normalised(magnitudes, ratio):
    magnitude = torch.tensor(magnitudes)
    scale = activation_scale(magnitude, ratio)
    power = (magnitude.double() ** ratio).clamp(min=1e-4)
    expected = power / (power.max() * power.min()).sqrt()
    torch.testing.assert_close(scale.double(), expected, rtol=1e-5, atol=0)
    assert (scale.max() * scale.min()).item() == pytest.approx(1, rel=1e-5)
    assert torch.equal(activation_scale(magnitude, 0.0), torch.ones(len(magnitude)))


def test_duo_scales_follow_the_weights_too():
    magnitude, weight = normal(9).abs() + 0.1, normal(9, seed=1).abs() + 0.1
    scale = activation_scale(magnitude, 0.3, weight)
    raw = magnitude**0.3 / (weight**0.7 + 1e-4)
    torch.testing.assert_close(scale, raw / (raw.max() * raw.min()).sqrt())
    assert len(activation_scale(magnitude, 0.0, weight).unique()) > 1  # no identity


def test_relative_magnitude_is_the_mean_over_rows_of_all_layers():
    weights = [normal(5, 16), normal(3, 16, seed=1)]
    rows = torch.cat(weights).abs()
    expected = torch.cat(
        [
            (group / (group.amax(1, keepdim=True) + 1e-6)).mean(0)
            for group in (rows[:, :8], rows[:, 8:])
        ]
    )
    torch.testing.assert_close(relative_magnitude(weights, 8), expected)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_uniform_activations_need_no_scale(ratio):
    """Every feature is as large as the others: s = 1, whatever the ratio."""
    torch.testing.assert_close(activation_scale(torch.full((7,), 3.0), ratio), torch.ones(7))


def test_a_feature_that_was_always_zero_gets_no_scale():
    """The authors' bound gives it 1e-4, and with it weights that round to nothing."""
    magnitude = torch.tensor([4.0, 0.0, 1.0])
    assert activation_scale(magnitude, 0.5).tolist() == pytest.approx([2**0.5, 1, 2**-0.5])


def test_grids_are_as_published():
    assert [ratio for ratio, _ in GRIDS["authors"]] == pytest.approx([0.05 * i for i in range(20)])
    assert [ratio for ratio, _ in GRIDS["llmcompressor"]][-1] == 1
    assert {len(grid) for grid in GRIDS.values()} == {20}
    assert all(grid[0] == (0.0, False) for grid in GRIDS.values())
    assert pytest.approx([1 - 0.05 * i for i in range(10)]) == list(CLIPPING)


# The rounding within the search, and ratio 0


@settings(deadline=None, max_examples=40)
@given(
    SEEDS,
    st.integers(2, 8),
    st.sampled_from([8, 16, "row"]),
    st.booleans(),
    st.sampled_from(["float16", "float32"]),
)
def test_the_search_rounds_as_the_result_is_stored(seed, n_bits, size, symmetric, dtype):
    method = AWQ(n_bits=n_bits, group_size=size, symmetric=symmetric, scale_dtype=dtype)
    W = normal(6, 32, seed=seed)
    W[2] = 0
    W[3] = W[3].abs()
    expected = method.rounding.quantize(W).dequantize()
    assert torch.equal(method.rounded(W, torch.ones(32)), expected)
    scale = normal(32, seed=seed + 1).exp()
    stored = method.rounding.quantize(W * scale).dequantize() / scale
    assert torch.equal(method.rounded(W, scale), stored)


@MODELS
def test_ratio_0_without_clipping_is_round_to_nearest(make):
    nearest, scaled = with_outliers(make), with_outliers(make)
    quantize_model(nearest, Affine(n_bits=3, group_size=8))
    quantize_model(scaled, awq(ratio=0, clip=False), calibration=some_tokens())
    state = nearest.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in scaled.state_dict().items())


@pytest.mark.parametrize("clip", [False, True])
def test_groups_of_one_sign_do_not_collapse(clip):
    """The authors' grid has no 0: 1.0, 1.1, 1.2, 1.3 become 0.3 each, and a constant 0.5 almost 0."""
    W = torch.tensor([[1.0, 1.1, 1.2, 1.3], [0.5, 0.5, 0.5, 0.5], [-1.0, -1.1, -1.2, -1.3]])
    moments = InputMoments(4, torch.device("cpu"))
    moments.update(normal(50, 4))
    stored = AWQ(n_bits=4, group_size=4, clip=clip).quantize(W, moments).dequantize()
    assert (stored - W).abs().max() < 0.05


# The search


def losses_by_running_the_module(block, fold, inputs, method):
    """Mean squared error of the inspected module's output for all candidates, the long way."""
    module = block.get_submodule(fold.inspected)
    x = [call.args or call.kwargs for call in inputs.calls(block, fold.layers[0])]
    x = torch.cat([(args[0] if isinstance(args, tuple) else args["x"])[0] for args in x])
    index = source_features(block, fold)
    features = int(index.max()) + 1
    magnitude = torch.stack(
        [x[:, index == feature].abs().mean() for feature in range(features)]
    )  # over all columns that read the feature
    layers = [LinearLayer(name, block.get_submodule(name)) for name in fold.layers]
    weights = [layer.weight.clone() for layer in layers]
    relative = relative_magnitude(weights, method.group_size)
    relative = torch.stack([relative[index == feature].mean() for feature in range(features)])
    found = []
    for ratio, duo in method.candidates:
        scale = activation_scale(magnitude, ratio, relative if duo else None)[index]
        calls, errors = list(inputs.calls(block, fold.inspected)), []
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.copy_(method.rounding.quantize(weight * scale).dequantize() / scale)
        for call in calls:
            now = hidden_states(module(*call.args, **call.kwargs))
            errors.append((now - hidden_states(call.output)).square().mean())
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.copy_(weight)
        found.append(torch.stack(errors).mean().item())
    return found


@MODELS
@pytest.mark.parametrize("ratio", ["authors", "duo"])
@torch.no_grad()
def test_losses_are_those_of_the_module_and_the_least_wins(make, ratio):
    block, inputs = first_block(with_outliers(make), some_tokens(3, 24))
    method = awq(ratio=ratio, finalists=None)
    found = method.search(block, inputs)
    assert [one.fold for one in found] == list(folds_of(block))
    for one in found:
        expected = losses_by_running_the_module(block, one.fold, inputs, method)
        assert one.losses == pytest.approx(expected, rel=1e-3)
        assert (one.ratio, one.duo) == method.candidates[one.losses.index(min(one.losses))]


@MODELS
def test_searching_changes_nothing(make):
    model = with_outliers(make)
    before = copy.deepcopy(model.state_dict())
    block, inputs = first_block(model, some_tokens(3, 24))
    hidden = inputs.hidden.clone()
    awq().search(block, inputs)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(inputs.hidden, hidden)
    assert not any(module._forward_hooks for module in model.modules())


@MODELS
@pytest.mark.parametrize("finalists", [1, 4, None])
def test_what_is_found_is_never_worse_than_ratio_0(make, finalists):
    block, inputs = first_block(with_outliers(make), some_tokens(16, 24))
    for one in awq(finalists=finalists).search(block, inputs):
        assert min(one.losses) <= one.losses[0]  # false for NaN, too
        assert one.losses[GRIDS["authors"].index((one.ratio, one.duo))] <= one.losses[0]


@MODELS
def test_finalists_are_measured_on_everything(make):
    block, inputs = first_block(with_outliers(make), some_tokens(16, 24))
    full, some = (awq(finalists=n).search(block, inputs) for n in (None, 3))
    for all_of, few in zip(full, some, strict=True):
        measured = [i for i, loss in enumerate(few.losses) if loss == loss]
        assert len(measured) in (3, 4)
        assert [few.losses[i] for i in measured] == pytest.approx(
            [all_of.losses[i] for i in measured], rel=1e-5
        )


@MODELS
def test_scaling_gains_where_some_features_are_large(make):
    block, inputs = first_block(with_outliers(make), some_tokens(16, 24))
    behind_norms = [
        one
        for one in awq().search(block, inputs)
        if block.get_submodule(one.fold.source).weight.ndim == 1
    ]
    assert len(behind_norms) == 2
    for one in behind_norms:
        assert one.ratio > 0 and min(one.losses) < 0.9 * one.losses[0]


@MODELS
@pytest.mark.parametrize("ratio", ["authors", "duo", 0.5])
@torch.no_grad()
def test_preparing_leaves_the_float_function_as_it_is(make, ratio):
    model, tokens = with_outliers(make), some_tokens(4, 30, seed=1)
    expected = model(tokens).logits
    before = copy.deepcopy(model)
    prepare_model(model, awq(ratio=ratio), some_tokens())
    assert ((model(tokens).logits - expected).norm() / expected.norm()).item() < 1e-4
    changed = [
        not torch.equal(a.weight, b.weight)
        for a, b in zip(linear_layers(before), linear_layers(model), strict=True)
    ]
    assert sum(changed) >= len(changed) - 2  # all but GPT-2's two mlp.c_proj


# Ranges


def a_clip_problem(seed=0):
    """A weight with outliers, and correlated inputs."""
    W = normal(6, 32, seed=seed)
    W[:, ::9] *= 4
    return W, normal(200, 32, seed=seed + 1) @ (normal(32, 32, seed=seed + 2) + torch.eye(32))


@settings(deadline=None, max_examples=8)
@given(SEEDS, st.booleans())
def test_every_group_takes_the_range_that_costs_least_on_its_inputs(seed, symmetric):
    W, x = a_clip_problem(seed)
    moments = InputMoments(32, torch.device("cpu"))
    moments.update(x[:120])
    moments.update(x[120:])
    method = awq(symmetric=symmetric, scale_dtype="float32")
    clipped = method.clipped(W, moments.products)
    stored = method.quantize(W, moments).dequantize()
    assert torch.equal(stored, method.rounding.quantize(clipped).dequantize())
    for row in range(6):
        for group in range(4):
            columns = slice(8 * group, 8 * group + 8)
            w, part = W[row, columns], x[:, columns]
            costs = []
            for factor in CLIPPING:
                most = w.abs().max() * factor
                rounded = method.rounding.quantize(w.clamp(-most, most)[None]).dequantize()[0]
                costs.append((part @ (w - rounded)).square().mean().item())
            cost = (part @ (w - stored[row, columns])).square().mean().item()
            assert cost == pytest.approx(min(costs), rel=1e-3, abs=1e-9)
            limits = torch.tensor([w.abs().max() * factor for factor in CLIPPING])
            assert (clipped[row, columns].abs().max() - limits).abs().min() < 1e-6


def test_clipping_gains():
    W, x = a_clip_problem()
    moments = InputMoments(32, torch.device("cpu"))
    moments.update(x)
    method = awq(n_bits=2)
    kept, clipped = (
        squared_output(W - m.dequantize(), moments.products)
        for m in (method.rounding.quantize(W), method.quantize(W, moments))
    )
    assert clipped < 0.9 * kept


@MODELS
def test_queries_and_keys_are_not_clipped(make):
    model = with_outliers(make)
    quantize_model(model, awq(), calibration=some_tokens())
    kinds = {
        name.rpartition(".")[2]: type(module.method)
        for name, module in model.named_modules()
        if hasattr(module, "quantized_weight")
    }
    unclipped = {"c_attn"} if make is tiny_gpt2 else {"q_proj", "k_proj"}
    assert {name for name, kind in kinds.items() if kind is Affine} == unclipped
    assert {name for name, kind in kinds.items() if kind is AWQ} == kinds.keys() - unclipped
    # not by a part of the name
    assert isinstance(awq().for_layer("layers.0.block_sparse.down_proj"), AWQ)


# Golden vectors: made by `make oracles`, see course_utils/tools/oracles.


def golden(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["made"])


SCALES, MADE = golden("llmcompressor_awq")


@pytest.mark.parametrize(
    ("number", "case"),
    list(enumerate(MADE["cases"])),
    ids=["{ratio}-w{n_bits}g{group_size}".format(**case) for case in MADE["cases"]],
)
@torch.no_grad()
def test_scales_are_those_of_llm_compressor(number, case):
    tensors, made = golden("awq_layers")
    tokens = tensors.pop("tokens")
    model = LlamaForCausalLM(LlamaConfig(**made["shape"])).eval()
    model.load_state_dict(tensors, strict=False)
    inputs = BlockInputs.of_first_block(model, tokens)
    method = AWQ(**case, finalists=None, scale_dtype="float32")
    for name, block in blocks(model):
        for one in method.search(block, inputs):
            expected = SCALES[f"{number}.{name}.{one.fold.source}"]
            torch.testing.assert_close(one.scale, expected, rtol=1e-6, atol=0)
        inputs.advance(block)
    assert len(SCALES) == 8 * len(MADE["cases"])


def test_scales_were_made_with_the_versions_that_make_oracles_installs():
    oracle = TESTS.parent / "course_utils" / "tools" / "oracles" / "llmcompressor"
    requirements = (oracle / "requirements.txt").read_text("utf-8")
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", requirements, re.MULTILINE))
    assert {name: MADE["versions"][name].partition("+")[0] for name in pins} == pins


# Whole models


@MODELS
@torch.no_grad()
def test_a_quantized_model_is_stored_as_round_to_nearest_is_and_survives_saving(make, tmp_path):
    model, nearest, tokens = with_outliers(make), with_outliers(make), some_tokens()
    reference = model(tokens).logits
    report = quantize_model(model, awq(n_bits=8), calibration=tokens)
    plain = quantize_model(nearest, Affine(n_bits=8, group_size=8))
    assert report.nbytes == plain.nbytes
    assert linear_layers(model) == []
    logits = model(tokens).logits
    assert ((logits - reference).norm() / reference.norm()).item() < 0.02
    weights = [m.quantized_weight for m in model.modules() if hasattr(m, "quantized_weight")]
    assert {type(weight) for weight in weights} == {AffineWeight}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, logits)


@MODELS
def test_output_errors_of_the_report_are_those_of_running_the_layers(make):
    tokens = some_tokens(4, 30)
    model = with_outliers(make)
    report = quantize_model(model, awq(), calibration=tokens)
    measured = with_outliers(make)
    prepare_model(measured, awq(), tokens)
    seen = {}
    for layer in linear_layers(measured):
        layer.module.register_forward_pre_hook(
            lambda _, args, name=layer.name: seen.update({name: args[0].flatten(0, 1)})
        )
    measured(tokens)
    floats = {layer.name: layer.weight for layer in linear_layers(measured)}
    for layer in report.layers:
        W, x = floats[layer.name], seen[layer.name]
        Q = model.get_submodule(layer.name).quantized_weight.dequantize()
        error = (x @ (W - Q).T).square().sum() / (x @ W.T).square().sum()
        assert layer.output_error == pytest.approx(error.item(), rel=0.01)


@MODELS
@torch.no_grad()
def test_awq_lowers_the_error_of_a_model_with_large_features(make):
    tokens, errors = some_tokens(16, 30), {}
    for method in (Affine(n_bits=3, group_size=8), awq()):
        model = with_outliers(make)
        expected = hidden_of(model, tokens)
        calibration = tokens if method.needs_calibration else None
        quantize_model(model, method, calibration=calibration)
        errors[method] = ((hidden_of(model, tokens) - expected).norm() / expected.norm()).item()
    nearest, scaled = errors.values()
    assert scaled < 0.9 * nearest


def hidden_of(model, tokens):
    """What the last block puts out."""
    return model(tokens, output_hidden_states=True).hidden_states[-1]


@MODELS
def test_gptq_on_the_folded_model(make):
    """Folding first, then another method's rounding, as in the paper's table of 2 bits."""
    model, tokens = with_outliers(make), some_tokens(16, 30)
    prepare_model(model, awq(), tokens)
    before = {layer.name: layer.weight.clone() for layer in linear_layers(model)}
    report = quantize_model(model, GPTQ(n_bits=3, group_size=8), calibration=tokens)
    assert report.method == GPTQ(n_bits=3, group_size=8)
    for layer in report.layers:
        Q = model.get_submodule(layer.name).quantized_weight.dequantize()
        assert (Q - before[layer.name]).norm() < 0.5 * before[layer.name].norm()


def test_course_lm_keeps_its_perplexity():
    model, tokenizer = load_model("course-lm")
    tokens = evaluation_tokens(tokenizer, 1024)
    before = perplexity(model, tokens, window=256).perplexity
    calibration = calibration_tokens(tokenizer, 4, 128)
    quantize_model(model, get_method("awq", group_size=64), calibration=calibration)
    assert abs(perplexity(model, tokens, window=256).perplexity / before - 1) < 0.03


# Bad input


def test_bad_settings_are_refused():
    for ratio in (1.5, -0.1, "both", True, None):
        with pytest.raises(
            ValueError, match=r"ratio .*: choose a grid \(authors, llmcompressor, duo\)"
        ):
            AWQ(ratio=ratio)
    for finalists in (0, 2.0, "all", True):
        with pytest.raises(ValueError, match="finalists"):
            AWQ(finalists=finalists)
    with pytest.raises(ValueError, match="n_bits 9"):
        AWQ(n_bits=9)
    with pytest.raises(ValueError, match="clip 'no'"):
        AWQ(clip="no")
    assert get_method("awq", **json.loads(json.dumps(asdict(AWQ())))) == AWQ()


def test_an_architecture_without_a_mapping_is_named_with_what_to_write():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=99, hidden_size=24, ffn_dim=40, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, word_embed_proj_dim=24,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    message = (
        r'decoder\.layers\.0: .*class OPTDecoderLayer is not known.*FOLDS\["OPTDecoderLayer"\]'
    )
    with pytest.raises(ValueError, match=message):
        quantize_model(model, awq(), calibration=some_tokens())


def test_calibration_is_needed_and_may_not_be_empty():
    model = tiny_gpt2()
    with pytest.raises(ValueError, match=r"AWQ.*calibration="):
        quantize_model(model, awq(clip=False))
    with pytest.raises(ValueError, match=r"calibration is \[sequences, length\]"):
        prepare_model(model, awq(), torch.empty(0, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="AWQ's ranges need the inputs"):
        awq().quantize(torch.ones(2, 8))
    with pytest.raises(ValueError, match="rewrites no blocks"):
        prepare_model(model, Affine(), some_tokens())


@MODELS
def test_a_model_that_is_quantized_already_is_refused_whole(make):
    model = make()
    name = linear_layers(model)[-1].name  # mlp.c_proj of GPT-2 is in no fold
    name = name.replace("mlp.c_proj", "mlp.c_fc")
    quantize_model(model, {name: Affine(group_size=8)})
    before = copy.deepcopy(model.state_dict())
    message = r"has no float weight to fold a scale into: it is a QuantizedLinear"
    with pytest.raises(ValueError, match=message):
        quantize_model(model, awq(), calibration=some_tokens())
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_a_norm_that_two_blocks_share_is_refused():
    model = tiny_llama()
    first, second = model.model.layers
    second.input_layernorm = first.input_layernorm
    with pytest.raises(ValueError, match="are one parameter"):
        quantize_model(model, awq(), calibration=some_tokens())


def test_groups_that_do_not_divide_are_refused_even_for_layers_that_stay_float():
    """The search rounds all layers of a fold."""
    model = tiny_llama()  # widths 24 and 40
    names = [layer.name for layer in linear_layers(model) if "down_proj" not in layer.name]
    with pytest.raises(ValueError, match=r"block model\.layers\.0: group_size 12 .*40 columns"):
        quantize_model(model, dict.fromkeys(names, awq(group_size=12)), calibration=some_tokens())


@torch.no_grad()
def test_features_that_are_always_zero_keep_their_weights():
    model = with_outliers(tiny_llama)
    for _, block in blocks(model):
        block.input_layernorm.weight[[2, 9]] = 0
    before = copy.deepcopy(model)
    prepare_model(model, awq(ratio=0.5), some_tokens())
    for (_, block), (_, old) in zip(blocks(model), blocks(before), strict=True):
        found, expected = block.self_attn.q_proj.weight, old.self_attn.q_proj.weight
        assert torch.equal(found[:, [2, 9]], expected[:, [2, 9]])
        assert not torch.equal(found, expected)
    quantize_model(model, awq(), calibration=some_tokens())
    assert model(some_tokens()).logits.isfinite().all()


@pytest.mark.parametrize("clip", [False, True])
@torch.no_grad()
def test_inputs_that_are_all_zero_are_refused(clip):
    model = tiny_gpt2()
    for parameter in model.transformer.h[1].ln_2.parameters():
        parameter.zero_()
    with pytest.raises(ValueError, match=r"h\.1.*mlp\.c_fc: all calibration inputs are zero"):
        quantize_model(model, awq(clip=clip), calibration=some_tokens())


@torch.no_grad()
def test_weights_that_no_ratio_can_store_are_refused():
    model = tiny_llama()
    model.model.layers[0].mlp.down_proj.weight *= 1e-6
    message = r"model\.layers\.0: no ratio leaves the output of mlp\.down_proj finite .*float16"
    with pytest.raises(ValueError, match=message):
        quantize_model(model, awq(), calibration=some_tokens())


def test_infinite_inputs_name_block_and_layer():
    model = tiny_llama()
    model.model.layers[1].input_layernorm.weight.data[0] = float("inf")
    with pytest.raises(ValueError, match=r"block model\.layers\.1: layer self_attn\.q_proj: 20 of"):
        quantize_model(model, awq(), calibration=some_tokens())
