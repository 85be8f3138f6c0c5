"""SmoothQuant: its equations, the float function unchanged, and what smoothing gains and costs."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import some_tokens, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM

from course_utils.compression import get_method, quantize_model
from course_utils.data.tokens import calibration_tokens, evaluation_tokens
from course_utils.evaluation import perplexity
from course_utils.models import BlockInputs, LinearLayer, blocks, linear_layers, load_model
from course_utils.models.structure import norm_groups
from course_utils.quantizers.llm_int8 import LLMInt8
from course_utils.quantizers.smoothquant import SmoothQuant, smoothing_factors

PLAIN = LLMInt8(threshold=0.0)
MODELS = pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])


def with_outliers(make, factor=64.0, channels=(3, 17)):
    """A tiny model with norms that make some channels large, and with biases and weights unlike 1 and 0."""
    model = make()
    generator = torch.Generator().manual_seed(1)
    for _, block in blocks(model):
        for group in norm_groups(block):
            for parameter in group.norm.parameters():
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.data[list(channels)] *= factor
    return model


def layers_of(block, group):
    return [LinearLayer(name, block.get_submodule(name)) for name in group.layers]


def smooth(model, alpha=0.5, tokens=None):
    """Rewrite all blocks of `model` and quantize none."""
    tokens = some_tokens() if tokens is None else tokens
    for i, (_, block) in enumerate(blocks(model)):
        inputs = BlockInputs.of_first_block(model, tokens)
        for _, before in blocks(model)[:i]:
            inputs.advance(before)
        SmoothQuant(alpha).prepare(block, inputs)


# Which layers read which norm


@MODELS
@torch.no_grad()
def test_groups_hold_just_the_layers_that_read_the_norm(make):
    model = make()
    _, block = blocks(model)[1]
    outputs, inputs = {}, {}
    for group in norm_groups(block):
        group.norm.register_forward_hook(lambda m, _, y, g=group: outputs.update({g.layers: y}))
    for layer in linear_layers(block):
        layer.module.register_forward_hook(lambda m, x, _, n=layer.name: inputs.update({n: x[0]}))
    model(some_tokens())
    for names, output in outputs.items():
        assert {name for name, x in inputs.items() if torch.equal(x, output)} == set(names)
    assert len(outputs) == 2


def test_blocks_of_other_models_are_refused():
    with pytest.raises(
        ValueError, match=r"class Linear is not known.*GPT2Block and LlamaDecoderLayer"
    ):
        norm_groups(torch.nn.Linear(2, 2))


# Factors

POSITIVE = st.floats(2**-10, 2**13, width=32)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=20), st.floats(0, 1))
def test_factors_are_equation_4_with_its_special_cases(maxima, alpha):
    x_max, w_max = torch.tensor(maxima).T
    factors = smoothing_factors(x_max, w_max, alpha)
    expected = x_max.double() ** alpha / w_max.double() ** (1 - alpha)
    torch.testing.assert_close(factors.double(), expected.clamp(min=1e-5), rtol=1e-5, atol=0)
    half = smoothing_factors(x_max, w_max, 0.5)  # the difficulty in equal halves
    torch.testing.assert_close(x_max / half, w_max * half, rtol=1e-5, atol=0)
    torch.testing.assert_close(x_max / half, (x_max * w_max).sqrt(), rtol=1e-5, atol=0)
    ones = torch.ones(len(x_max))
    flat_x, flat_w = smoothing_factors(x_max, w_max, 1.0), smoothing_factors(x_max, w_max, 0.0)
    torch.testing.assert_close(x_max / flat_x, ones, rtol=1e-5, atol=0)
    torch.testing.assert_close(w_max * flat_w, ones, rtol=1e-5, atol=0)


def test_flat_inputs_and_weights_get_one_factor_for_all():
    factors = smoothing_factors(torch.full((7,), 3.0), torch.full((7,), 0.2), 0.4)
    assert len(factors.unique()) == 1


def test_degenerate_features():
    x_max, w_max = torch.tensor([0.0, 0.0, 4.0, 1e-30]), torch.tensor([0.5, 0.0, 0.0, 0.5])
    factors = smoothing_factors(x_max, w_max, 0.5)
    expected = torch.tensor([1.0, 1.0, 2 / 1e-5**0.5, 1e-5])  # never seen, no weight, tiny
    torch.testing.assert_close(factors, expected)


# Preparation


@MODELS
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
@torch.no_grad()
def test_smoothing_leaves_the_float_function_as_it_is(make, alpha):
    model = with_outliers(make)
    smoothed = copy.deepcopy(model)
    smooth(smoothed, alpha)
    tokens = some_tokens(4, 30, seed=1)  # not those of the calibration
    expected, found = model(tokens).logits, smoothed(tokens).logits
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5
    changed = [
        not torch.equal(a.weight, b.weight)
        for a, b in zip(linear_layers(model), linear_layers(smoothed), strict=True)
    ]
    assert any(changed)


@MODELS
@torch.no_grad()
def test_factors_that_are_powers_of_two_change_no_bit(make):
    """With alpha 0 a factor is the inverse of a column's largest weight: these are powers of two here."""
    model = with_outliers(make)
    for _, block in blocks(model):
        for group in norm_groups(block):
            for layer in layers_of(block, group):
                largest = 2.0 ** (torch.arange(24) % 5 - 4)
                layer.weight.clamp_(-largest, largest)
                layer.weight[0] = largest
    smoothed = copy.deepcopy(model)
    smooth(smoothed, alpha=0.0)
    for _, block in blocks(smoothed):
        for group in norm_groups(block):
            for layer in layers_of(block, group):
                assert torch.equal(layer.weight.abs().amax(0), torch.ones(24))
    tokens = some_tokens(4, 30, seed=1)
    assert torch.equal(smoothed(tokens).logits, model(tokens).logits)


@MODELS
@torch.no_grad()
def test_factors_are_shared_by_all_that_read_a_norm_and_nothing_else_changes(make):
    model = with_outliers(make)
    smoothed, tokens = copy.deepcopy(model), some_tokens(3)
    inputs = BlockInputs.of_first_block(model, tokens)
    (_, block), (_, after) = blocks(model)[0], blocks(smoothed)[0]
    x_max = {}
    for group in norm_groups(block):

        def watch(_, __, y, key=group.layers):
            seen = x_max.get(key, torch.zeros(24))
            x_max[key] = torch.maximum(seen, y.abs().amax((0, 1)))

        group.norm.register_forward_hook(watch)
    list(inputs.outputs(block))
    SmoothQuant(0.3).prepare(after, inputs)
    untouched = dict(after.named_parameters())
    for group, smooth_group in zip(norm_groups(block), norm_groups(after), strict=True):
        layers, found = layers_of(block, group), layers_of(after, smooth_group)
        w_max = torch.cat([layer.weight for layer in layers]).abs().amax(0)  # of all of them
        factors = smoothing_factors(x_max[group.layers], w_max, 0.3)
        for layer, smoothed_layer in zip(layers, found, strict=True):
            torch.testing.assert_close(smoothed_layer.weight, layer.weight * factors)
            untouched.pop(f"{layer.name}.weight")
        parameters = zip(group.norm.parameters(), smooth_group.norm.named_parameters(), strict=True)
        for before, (_, divided) in parameters:
            torch.testing.assert_close(divided, before / factors)
            untouched = {name: p for name, p in untouched.items() if p is not divided}
    assert untouched and all(
        torch.equal(p, block.get_parameter(name)) for name, p in untouched.items()
    )


def test_nan_while_smoothing_names_block_and_layer():
    model = tiny_llama()
    model.model.layers[1].input_layernorm.weight.data[0] = float("inf")
    with pytest.raises(
        ValueError, match=r"block model\.layers\.1: layer self_attn\.q_proj: 20 of its 480 inputs"
    ):
        quantize_model(model, SmoothQuant(), calibration=some_tokens())


# Quantized models


def errors_of(make, method, only_fed=True):
    """Output errors of the layers that read a norm, on a model with outlier channels."""
    model = with_outliers(make)
    _, block = blocks(model)[0]
    fed = tuple(name for group in norm_groups(block) for name in group.layers)
    report = quantize_model(model, method, calibration=some_tokens(4, 30))
    return {r.name: r.output_error for r in report.layers if r.name.endswith(fed) == only_fed}


@MODELS
def test_smoothing_lowers_the_error_and_both_ends_of_alpha_do_not(make):
    plain = errors_of(make, PLAIN)
    errors = {alpha: errors_of(make, SmoothQuant(alpha)) for alpha in (0.0, 0.5, 1.0)}
    for name, error in plain.items():
        assert errors[0.5][name] < error / 4
        assert errors[0.5][name] < errors[0.0][name] / 4
        assert errors[0.5][name] < errors[1.0][name] / 4


@MODELS
def test_layers_that_read_no_norm_gain_nothing(make):
    plain, smoothed = (errors_of(make, m, only_fed=False) for m in (PLAIN, SmoothQuant()))
    for name, error in plain.items():
        assert smoothed[name] == pytest.approx(error, rel=0.05)


def test_per_token_is_the_plain_int8_product():
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(9, 40, generator=generator), torch.randn(5, 40, generator=generator)
    bias = torch.arange(5.0)
    method = SmoothQuant()
    stored, plain = method.quantize(W), PLAIN.quantize(W)
    assert torch.equal(stored.codes, plain.codes) and torch.equal(stored.absmax, plain.absmax)
    assert set(stored.tensors()) == {"codes", "absmax"} and stored.nbytes == 5 * 40 + 5 * 4
    torch.testing.assert_close(
        method.linear(x, stored, bias), PLAIN.linear(x, plain, bias), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(stored.dequantize(), plain.dequantize(), rtol=1e-6, atol=0)


def test_static_inputs_equal_torchs_fake_quantization():
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(64, 40, generator=generator), torch.randn(5, 40, generator=generator)
    x[40, 3] = -10.0  # not seen in calibration, and clipped
    method = SmoothQuant(inputs="static")
    maxima = method.new_statistics(40, torch.device("cpu"))
    for part in x[:32].split(8):
        maxima.update(part)
    assert torch.equal(maxima.maxima, x[:32].abs().amax(0))
    stored = method.quantize(W, maxima)
    absmax = x[:32].abs().max()
    assert stored.input_absmax == absmax and absmax < 10
    on_grid = torch.fake_quantize_per_tensor_affine(x, (absmax / 127).item(), 0, -127, 127)
    torch.testing.assert_close(
        method.linear(x, stored, None), on_grid @ stored.dequantize().T, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("inputs", ["per_token", "static"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_inputs_are_not_hidden(inputs, bad):
    method, W = SmoothQuant(inputs=inputs), torch.ones(3, 8)
    maxima = method.new_statistics(8, torch.device("cpu"))
    maxima.update(torch.ones(1, 8))
    x = torch.ones(2, 8)
    x[1, 2] = bad
    y = method.linear(x, method.quantize(W, maxima), None)
    assert y[0].isfinite().all() and not y[1].isfinite().any()


def test_static_inputs_that_were_zero_in_calibration_are_refused():
    """They would clip all later inputs away."""
    method = SmoothQuant(inputs="static")
    with pytest.raises(ValueError, match="all calibration inputs are zero"):
        method.quantize(torch.ones(3, 8), method.new_statistics(8, torch.device("cpu")))


@MODELS
@pytest.mark.parametrize(("inputs", "close"), [("per_token", 0.05), ("static", 0.2)])
@torch.no_grad()
def test_a_smoothed_model_is_close_and_survives_saving(make, inputs, close, tmp_path):
    model, tokens = with_outliers(make), some_tokens()
    reference = model(tokens).logits
    quantize_model(model, SmoothQuant(inputs=inputs), calibration=tokens)
    logits = model(tokens).logits
    assert ((logits - reference).norm() / reference.norm()).item() < close
    assert linear_layers(model) == []
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, logits)


def test_a_block_that_holds_a_quantized_layer_is_refused_before_any_is_touched():
    """It was an AttributeError, when the blocks before were quantized already."""
    model = tiny_llama()
    key = "model.layers.1.self_attn.k_proj"
    quantize_model(model, {key: PLAIN})
    before = copy.deepcopy(model.state_dict())
    message = (
        r"block model\.layers\.1: layer self_attn\.k_proj .* it is a QuantizedLinear\. Smooth a"
    )
    with pytest.raises(ValueError, match=message):
        quantize_model(model, SmoothQuant(), calibration=some_tokens())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert len(linear_layers(model)) == 13
    unaffected = [layer.name for layer in linear_layers(model) if ".layers.0." in layer.name]
    quantize_model(model, dict.fromkeys(unaffected, SmoothQuant()), calibration=some_tokens())


def test_course_lm_keeps_its_perplexity():
    model, tokenizer = load_model("course-lm")
    tokens = evaluation_tokens(tokenizer, 1024)
    before = perplexity(model, tokens, window=256).perplexity
    method = get_method("smoothquant", alpha=0.5)
    quantize_model(model, method, calibration=calibration_tokens(tokenizer, 2, 128))
    assert abs(perplexity(model, tokens, window=256).perplexity / before - 1) < 0.01


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"alpha 1\.5"):
        SmoothQuant(alpha=1.5)
    with pytest.raises(ValueError, match="'per_channel'"):
        SmoothQuant(inputs="per_channel")
    with pytest.raises(ValueError, match="needs the statistics"):
        SmoothQuant(inputs="static").quantize(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"SmoothQuant.*calibration="):
        quantize_model(tiny_gpt2(), SmoothQuant())
