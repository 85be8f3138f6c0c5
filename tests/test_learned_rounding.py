"""Learned rounding: where it starts and how far it moves, the block's loss, whole models, bad input."""

import copy

import pytest
import torch
from tiny_models import some_tokens, tiny_gpt2, tiny_llama

from course_utils.compression import get_method, prepare_model, quantize_model
from course_utils.data.tokens import calibration_tokens
from course_utils.models import BlockInputs, blocks, linear_layers, load_model
from course_utils.models.walk import replace_module
from course_utils.quantizers.affine import Affine
from course_utils.quantizers.learned_rounding import LearnedRounding, LearningLinear

MODELS = pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def short(**changed):
    """Groups that divide the widths of the tiny models, and few updates."""
    return LearnedRounding(**{"group_size": 8, "iterations": 20, "batch": 2} | changed)


def learned_block(method, make=tiny_gpt2):
    """A first block with layers that have learned, and the losses on the way."""
    model = make()
    _, block = blocks(model)[0]
    inputs = BlockInputs.of_first_block(model, some_tokens(6, 20))
    with torch.no_grad():
        targets = torch.cat(list(inputs.outputs(block)))
    layers = linear_layers(block)
    learning = {of.name: LearningLinear(of.weight, of.bias, method) for of in layers}
    for name, module in learning.items():
        replace_module(block, name, module)
    return learning, method.learn(block, inputs, targets, list(learning.values()))


@pytest.mark.parametrize("n_bits", [2, 3, 4])
@pytest.mark.parametrize("size", [16, "row"])
def test_it_starts_as_round_to_nearest(n_bits, size):
    weight = normal(12, 48)
    weight[3] = 0
    weight[4] = weight[4].abs() + 1  # a range that does not hold 0 by itself
    start = LearningLinear(weight, None, LearnedRounding(n_bits, size)).packed()
    nearest = Affine(n_bits, size).quantize(weight)
    for name, stored in nearest.tensors().items():
        assert torch.equal(start.tensors()[name], stored), name


def test_values_of_the_forward_pass_are_those_that_are_packed():
    weight, x, method = normal(12, 48), normal(5, 48, seed=1), LearnedRounding(3, 16)
    layer = LearningLinear(weight, normal(12, seed=2), method)
    layer.V.data = normal(12, 3, 16, seed=3).clamp(-0.5, 0.5)
    layer.factors.data = 1 - normal(2, 12, 3, 1, seed=4).abs().clamp(max=0.5)
    expected = x @ layer.packed().dequantize().T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_straight_through():
    """Inside the range the gradient of V is that of the value times the scale, and 0 where it is clipped."""
    weight, method = torch.tensor([[-1.0, 0.4, 0.7, 2.0]]), LearnedRounding(2, "row")
    layer = LearningLinear(weight, None, method)
    layer.V.data[0, 0, 3] = 0.9  # rounds beyond the last code
    layer(torch.eye(4)).sum().backward()
    S, _ = layer.grid()
    torch.testing.assert_close(layer.V.grad[0, 0], S.item() * torch.tensor([1.0, 1, 1, 0]))
    assert layer.factors.grad.abs().sum() > 0


@MODELS
def test_the_loss_of_the_block_never_ends_above_round_to_nearest(make):
    _, losses = learned_block(short(), make)
    assert len(losses) == 11 and min(losses) < 0.8 * losses[0]
    for seed in range(3):
        method = short(iterations=2, seed=seed, n_bits=8)  # there is next to nothing to win
        learning, losses = learned_block(method, make)
        assert min(losses) <= losses[0]
        if losses[0] == min(losses):
            assert not any(layer.V.any() for layer in learning.values())


@MODELS
def test_no_weight_moves_further_than_to_a_neighbour(make):
    learning, _ = learned_block(short(iterations=50), make)
    largest = max(layer.V.abs().max().item() for layer in learning.values())
    assert 0.1 < largest <= 0.5 + 0.5 / 50 + 1e-6
    assert all(((of.factors >= 0) & (of.factors <= 1)).all() for of in learning.values())


@MODELS
def test_the_block_itself_stays_as_it_is(make):
    model = make()
    before = copy.deepcopy(model.state_dict())
    prepare_model(model, short(), some_tokens(4, 20))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@MODELS
def test_models_are_quantized_saved_and_loaded(make, tmp_path):
    model, tokens = make(), some_tokens()
    plain = copy.deepcopy(model)
    report = quantize_model(model, short(), calibration=some_tokens(6, 20, seed=1))
    assert len(report.layers) == len(linear_layers(plain))
    # weights are compared with the float ones: learned codes are further from them than nearest ones
    nearest = quantize_model(plain, Affine(2, 8))
    errors = [sum(layer.weight_error for layer in r.layers) for r in (report, nearest)]
    assert errors[0] > errors[1]
    assert report.bits_per_weight == nearest.bits_per_weight
    with torch.no_grad():
        expected = model(tokens).logits
        model.save_pretrained(tmp_path)
        assert torch.equal(type(model).from_pretrained(tmp_path)(tokens).logits, expected)


def test_the_same_seed_gives_the_same_codes():
    made = []
    for seed in (0, 0, 1):
        model = tiny_gpt2()
        quantize_model(model, short(seed=seed), calibration=some_tokens(6, 20, seed=1))
        made.append(model.transformer.h[0].mlp.c_fc.quantized_weight.codes)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_without_iterations_it_is_round_to_nearest():
    learned, nearest = tiny_gpt2(), tiny_gpt2()
    quantize_model(learned, short(iterations=0), calibration=some_tokens(6, 20))
    quantize_model(nearest, Affine(2, 8))
    tokens = some_tokens()
    with torch.no_grad():
        assert torch.equal(learned(tokens).logits, nearest(tokens).logits)


def test_course_lm_errs_less_than_by_round_to_nearest():
    outputs = []
    for name, settings in (("learned_rounding", {"iterations": 8, "batch": 2}), ("affine", {})):
        model, tokenizer = load_model("course-lm")
        calibration = calibration_tokens(tokenizer, 4, 128)
        method = get_method(name, n_bits=2, group_size=64, **settings)
        quantize_model(model, method, calibration=calibration)
        with torch.no_grad():
            outputs.append(model(calibration[:2]).logits)
    exact = load_model("course-lm").model(calibration[:2]).logits
    errors = [(exact - found).square().mean().item() for found in outputs]
    assert errors[0] < errors[1]


def test_refusals():
    with pytest.raises(ValueError, match="iterations -1: choose a whole number from 0 on"):
        get_method("learned_rounding", iterations=-1)
    with pytest.raises(ValueError, match="batch 0: choose a whole number from 1 on"):
        get_method("learned_rounding", batch=0)
    with pytest.raises(ValueError, match="n_bits 1: choose 2 to 8"):
        get_method("learned_rounding", n_bits=1)
    with pytest.raises(ValueError, match=r"this weight was never learned: .* method 'affine'"):
        LearnedRounding().quantize(normal(8, 64))
    with pytest.raises(ValueError, match="group_size 64 does not divide the 24 columns"):
        quantize_model(tiny_gpt2(), LearnedRounding(), calibration=some_tokens())
    with pytest.raises(ValueError, match=r"looks at the layer's inputs. Give quantize_model"):
        quantize_model(tiny_gpt2(), short())
