"""What a part's quantization costs the model, and how bytes are shared out."""

import copy
import itertools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import some_tokens, tiny_gpt2, tiny_llama

from course_utils.compression import Method, quantize_model
from course_utils.compression.sensitivity import Choice, allocate, sensitivity
from course_utils.data.tokens import evaluation_tokens
from course_utils.evaluation import perplexity
from course_utils.models import blocks, linear_layers, load_model
from course_utils.models.structure import norm_groups
from course_utils.quantizers.llm_int8 import Int8Weight, LLMInt8
from course_utils.quantizers.smoothquant import SmoothQuant

INT8 = LLMInt8(threshold=0.0)
IMPORTANT = "transformer.h.2.mlp.c_fc"


@pytest.fixture(scope="module")
def planted():
    """course-lm with one feature in front of one layer 1024 times larger, and its weights as much smaller.

    The float function is the same bit for bit. Int8 inputs of that layer are not: the feature takes
    all their range.
    """
    model, tokenizer = load_model("course-lm")
    tokens = evaluation_tokens(tokenizer, 256)
    before = perplexity(model, tokens, window=128).nats
    norm = model.transformer.h[2].ln_2
    norm.weight.data[5] *= 1024
    norm.bias.data[5] *= 1024
    model.get_submodule(IMPORTANT).weight.data[5] /= 1024
    assert perplexity(model, tokens, window=128).nats == before
    return model, tokens


def test_the_planted_layer_is_found(planted):
    model, tokens = planted
    found = sensitivity(model, INT8, tokens, window=128)
    assert list(found) == [layer.name for layer in linear_layers(model)]
    important = found.pop(IMPORTANT)
    assert important > 0.1 and important > 10 * max(map(abs, found.values()))


def test_the_block_of_the_planted_layer_is_found(planted):
    model, tokens = planted
    found = sensitivity(model, INT8, tokens, window=128, parts="blocks")
    assert list(found) == [name for name, _ in blocks(model)]
    important = found.pop("transformer.h.2")
    assert important > 0.1 and important > 10 * max(map(abs, found.values()))


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_it_is_the_increase_that_quantizing_the_part_alone_gives(make):
    model, tokens = make(), some_tokens(1, 60)[0]
    before = perplexity(model, tokens, window=20).nats
    layers = [layer.name for layer in linear_layers(model)]
    name, _ = blocks(model)[1]
    by_layer = sensitivity(model, INT8, tokens, window=20)
    by_block = sensitivity(model, INT8, tokens, window=20, parts="blocks")
    for part, found in ((layers[2], by_layer), (name, by_block)):
        alone = copy.deepcopy(model)
        inside = [layer for layer in layers if layer == part or layer.startswith(f"{part}.")]
        quantize_model(alone, dict.fromkeys(inside, INT8))
        assert found[part] == perplexity(alone, tokens, window=20).nats - before


@dataclass(frozen=True)
class Failing(Method):
    """Refuses the narrower weights of a tiny model."""

    weight_type: ClassVar[type] = Int8Weight

    def quantize(self, weight, statistics=None):
        if weight.shape[1] > 24:
            raise ValueError("too wide")
        return INT8.quantize(weight)

    def linear(self, x, weight, bias):
        return INT8.linear(x, weight, bias)


@pytest.mark.parametrize("parts", ["layers", "blocks"])
@pytest.mark.parametrize("method", [INT8, Failing()])
def test_the_model_is_the_same_afterwards_bit_for_bit(method, parts):
    model, tokens = tiny_gpt2(), some_tokens(1, 40)[0]
    modules = dict(model.named_modules())
    state = copy.deepcopy(model.state_dict())
    if isinstance(method, Failing):
        with pytest.raises(ValueError, match=r"layer transformer\.h\.0\.mlp\.c_proj: too wide"):
            sensitivity(model, method, tokens, window=20, parts=parts)
    else:
        sensitivity(model, method, tokens, window=20, parts=parts)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not getattr(model, "is_quantized", False)


def test_bad_requests_are_refused():
    model, tokens = tiny_gpt2(), some_tokens(1, 40)[0]
    with pytest.raises(ValueError, match=r"SmoothQuant.* needs calibration"):
        sensitivity(model, SmoothQuant(), tokens, window=20)
    with pytest.raises(ValueError, match="'heads'"):
        sensitivity(model, INT8, tokens, window=20, parts="heads")
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        sensitivity(model.train(), INT8, tokens, window=20)  # dropout made it random


# Sharing out bytes


@dataclass(frozen=True)
class Bits(Method):
    """Stands for a method in these tests; quantizes nothing."""

    n_bits: int


def brute_force(choices: dict[str, list[Choice]], budget: int) -> float:
    """The least total loss of all allocations within the budget."""
    every = itertools.product(*choices.values())
    return min(sum(c.loss for c in a) for a in every if sum(c.nbytes for c in a) <= budget)


def cost(choices, allocation) -> tuple[int, float]:
    """Bytes and estimated loss of an allocation."""
    chosen = [
        next(c for c in choices[name] if c.method == method) for name, method in allocation.items()
    ]
    return sum(c.nbytes for c in chosen), sum(c.loss for c in chosen)


@st.composite
def problems(draw, *, equal_steps):
    """Up to 4 layers with 3 choices each, of convex losses, and a budget that can be met."""
    choices, least, most = {}, 0, 0
    for i in range(draw(st.integers(1, 4))):
        step = 10 if equal_steps else draw(st.integers(1, 40))
        gains = sorted(draw(st.lists(st.integers(0, 100), min_size=2, max_size=2)), reverse=True)
        losses = [float(sum(gains[k:])) for k in range(3)]  # falls by less and less
        choices[f"layer {i}"] = [Choice(Bits(2 + k), step * (1 + k), losses[k]) for k in range(3)]
        least, most = least + step, most + 3 * step
    return choices, draw(st.integers(least, most + 5))


@settings(deadline=None, max_examples=150)
@given(problems(equal_steps=True))
def test_greedy_is_optimal_for_convex_losses_and_equal_steps(problem):
    choices, budget = problem
    nbytes, loss = cost(choices, allocate(choices, budget))
    assert nbytes <= budget
    assert loss == brute_force(choices, budget)


@settings(deadline=None, max_examples=150)
@given(problems(equal_steps=False))
def test_it_keeps_the_budget_never_loses_to_uniform_and_misses_at_most_one_step(problem):
    choices, budget = problem
    allocation = allocate(choices, budget)
    assert list(allocation) == list(choices)
    nbytes, loss = cost(choices, allocation)
    assert nbytes <= budget
    for bits in (2, 3, 4):
        uniform_bytes, uniform_loss = cost(choices, dict.fromkeys(choices, Bits(bits)))
        assert uniform_bytes > budget or loss <= uniform_loss
    largest = max(
        a.loss - b.loss for options in choices.values() for a, b in itertools.pairwise(options)
    )
    best = brute_force(choices, budget)
    assert best <= loss <= best + largest


def test_a_budget_is_used_to_its_last_byte_and_not_one_beyond():
    choices = {
        name: [Choice(Bits(2), 100, loss), Choice(Bits(4), 200, 0.0)]
        for name, loss in (("a", 1.0), ("b", 3.0), ("c", 2.0))
    }
    assert allocate(choices, 300) == dict.fromkeys("abc", Bits(2))
    assert allocate(choices, 399) == dict.fromkeys("abc", Bits(2))
    assert allocate(choices, 400) == {"a": Bits(2), "b": Bits(4), "c": Bits(2)}
    assert allocate(choices, 500) == {"a": Bits(2), "b": Bits(4), "c": Bits(4)}
    assert allocate(choices, 600) == dict.fromkeys("abc", Bits(4))


def test_where_small_steps_would_crowd_out_a_large_one_uniform_wins():
    """Byte for byte the small layer gains more; but then the large one no longer fits."""
    choices = {
        "large": [
            Choice(Bits(2), 100, 60.0),
            Choice(Bits(4), 200, 10.0),
            Choice(Bits(8), 300, 9.0),
        ],
        "small": [Choice(Bits(2), 10, 20.0), Choice(Bits(4), 20, 10.0), Choice(Bits(8), 30, 1.0)],
    }
    assert allocate(choices, 220) == {"large": Bits(4), "small": Bits(4)}
    assert allocate(choices, 230) == {"large": Bits(4), "small": Bits(8)}


def test_a_choice_that_costs_more_and_gains_nothing_is_not_taken():
    choices = {"a": [Choice(Bits(2), 10, 1.0), Choice(Bits(3), 15, 1.5), Choice(Bits(4), 20, 0.5)]}
    assert allocate(choices, 19) == {"a": Bits(2)}
    assert allocate(choices, 20) == {"a": Bits(4)}
    assert allocate({"a": choices["a"][:2]}, 100) == {"a": Bits(2)}


def test_bad_choices_are_refused():
    options = [Choice(Bits(2), 1000, 1.0)]
    with pytest.raises(ValueError, match=r"budget of 1,999 bytes is below the 2,000"):
        allocate({"a": options, "b": options}, 1999)
    with pytest.raises(ValueError, match="layer b needs choices with finite losses"):
        allocate({"a": options, "b": []}, 5000)
    with pytest.raises(ValueError, match=r"layer a needs choices with finite losses, got .*nan"):
        allocate({"a": [Choice(Bits(2), 10, float("nan"))]}, 5000)
    with pytest.raises(ValueError, match="no layers"):
        allocate({}, 5000)


def test_an_allocation_is_a_mapping_that_quantize_model_takes(planted):
    """int8 with decomposition where it counts, plain where it does not: the planted layer gets it."""
    model = copy.deepcopy(planted[0])
    group = norm_groups(model.transformer.h[2])[1]
    assert group.layers == ("mlp.c_fc",)
    decomposed = LLMInt8(outlier_weights="original")
    losses = {m: sensitivity(model, m, planted[1], window=128) for m in (INT8, decomposed)}
    choices = {
        layer.name: [
            Choice(method, method.quantize(layer.weight).nbytes, losses[method][layer.name])
            for method in losses
        ]
        for layer in linear_layers(model)
    }
    least = sum(options[0].nbytes for options in choices.values())
    room = choices[IMPORTANT][1].nbytes - choices[IMPORTANT][0].nbytes
    allocation = allocate(choices, least + room)
    assert allocation[IMPORTANT] == decomposed
    report = quantize_model(model, allocation)
    assert report.nbytes <= least + room
