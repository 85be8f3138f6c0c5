"""Perplexity, bytes, timing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from course_utils.data.tokens import evaluation_tokens
from course_utils.evaluation import perplexity, tensor_bytes, time_per_token
from course_utils.models import load_model


@pytest.fixture(scope="module")
def course_lm():
    return load_model("course-lm")


@torch.no_grad()
def plain_loop(model, tokens, window, stride):
    """The sliding-window loop of the transformers documentation, with labels of -100."""
    total, count, previous_end = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + window, len(tokens))
        ids = tokens[None, begin:end]
        labels = ids.clone()
        labels[:, : -(end - previous_end)] = -100
        predicted = int((labels[:, 1:] != -100).sum())
        total += model(ids, labels=labels).loss.item() * predicted
        count += predicted
        previous_end = end
        if end == len(tokens):
            break
    return math.exp(total / count), count


@pytest.mark.parametrize(("window", "stride"), [(256, 256), (256, 128), (100, 33), (64, 1)])
def test_perplexity_equals_a_plain_transformers_loop(course_lm, window, stride):
    tokens = evaluation_tokens(course_lm.tokenizer, 130 if stride == 1 else 700)
    ours = perplexity(course_lm.model, tokens, window=window, stride=stride)
    theirs, count = plain_loop(course_lm.model, tokens, window, stride)
    assert ours.predicted == count
    assert ours.perplexity == pytest.approx(theirs, rel=1e-4)


class Uniform(torch.nn.Module):
    """Predicts every token with the same probability, and notes what it was asked."""

    def __init__(self, vocabulary):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(vocabulary))

    def forward(self, input_ids):
        class Output:
            logits = self.weight.expand(*input_ids.shape, -1)

        return Output


@settings(deadline=None)
@given(st.integers(2, 200), st.integers(2, 50), st.data())
def test_every_token_is_predicted_once(n, window, data):
    stride = data.draw(st.integers(1, window))
    result = perplexity(
        Uniform(11), torch.zeros(n, dtype=torch.int64), window=window, stride=stride
    )
    assert result.perplexity == pytest.approx(11)
    if stride < window:  # windows overlap: all but the very first token
        assert result.predicted == n - 1
    else:
        assert result.predicted == n - math.ceil(n / window)


def test_bits_per_byte_is_total_bits_over_bytes():
    result = perplexity(Uniform(256), torch.zeros(9, dtype=torch.int64), window=9)
    assert result.bits_per_byte("12345678") == pytest.approx(8 * 8 / 8)
    assert result.bits_per_byte("é") == pytest.approx(8 * 8 / 2)


@pytest.mark.parametrize(("window", "stride"), [(257, 257), (1, 1), (8, 9), (8, 0)])
def test_bad_windows_are_refused(course_lm, window, stride):
    with pytest.raises(ValueError, match=f"window {window} and stride {stride}"):
        perplexity(
            course_lm.model, torch.zeros(300, dtype=torch.int64), window=window, stride=stride
        )


def test_a_stream_is_asked_for(course_lm):
    with pytest.raises(ValueError, match=r"\(1, 20\)"):
        perplexity(course_lm.model, torch.zeros(1, 20, dtype=torch.int64), window=8)


def test_tied_tensors_count_once(course_lm):
    model = course_lm.model
    parameters = sum(p.numel() for p in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert tensor_bytes(model) == 4 * parameters


def test_timing_decodes_the_tokens_that_it_says(course_lm):
    timing = time_per_token(course_lm.model, torch.arange(5), new_tokens=6, warmup=1)
    assert len(timing.milliseconds) == 6 and timing.median > 0
    assert timing.quartiles[0] <= timing.median <= timing.quartiles[1]
    assert f"{timing.threads} threads" in str(timing)


class Sure(Uniform):
    """Gives all the probability to token 0, and to token 1 a logit that is `nats` lower."""

    def __init__(self, nats):
        super().__init__(2)
        self.weight = torch.nn.Parameter(torch.tensor([nats, 0.0]))


@pytest.mark.parametrize(
    ("nats", "expected"), [(700, 1.0142e304), (1000, math.inf), (1e30, math.inf)]
)
def test_a_perplexity_above_709_nats_is_infinite(nats, expected):
    """exp once raised an OverflowError, and so did `str`."""
    result = perplexity(Sure(float(nats)), torch.ones(5, dtype=torch.int64), window=5)
    assert result.nats == pytest.approx(nats)
    assert result.perplexity == pytest.approx(expected, rel=1e-3)
    assert str(result).startswith(f"{result.perplexity:.2f} (5 tokens")


class Forgetful(DynamicCache):
    """Hands back what a pass writes as it is, and keeps it rounded: as quantized caches do."""

    def update(self, keys, values, layer, *args, **kwargs):
        found = super().update(keys, values, layer, *args, **kwargs)
        kept = self.layers[layer]
        kept.keys, kept.values = kept.keys.round(), kept.values.round()
        return found


@pytest.mark.parametrize("cached_step", [1, 7, 100])
def test_a_cache_in_full_precision_gives_the_perplexity_of_none(course_lm, cached_step):
    tokens = evaluation_tokens(course_lm.tokenizer, 150)
    model, protocol = course_lm.model, {"window": 64, "stride": 40}
    plain = perplexity(model, tokens, **protocol)
    cached = perplexity(model, tokens, **protocol, cache=DynamicCache, cached_step=cached_step)
    assert cached.predicted == plain.predicted
    assert cached.nats == pytest.approx(plain.nats, rel=1e-5)


def test_a_cache_that_rounds_costs_perplexity_unless_a_step_takes_the_window(course_lm):
    tokens = evaluation_tokens(course_lm.tokenizer, 64)
    nats = [
        perplexity(course_lm.model, tokens, window=64, cache=Forgetful, cached_step=step).nats
        for step in (1, 16, 64)
    ]
    assert nats[0] > nats[1] > nats[2]
    assert nats[2] == pytest.approx(perplexity(course_lm.model, tokens, window=64).nats, rel=1e-5)


def test_a_step_of_no_tokens_is_refused(course_lm):
    with pytest.raises(ValueError, match="cached_step 0: read at least 1"):
        perplexity(course_lm.model, torch.arange(9), window=8, cache=DynamicCache, cached_step=0)


def test_timing_reads_and_writes_the_cache_that_it_is_given(course_lm):
    made = []

    def cache():
        made.append(DynamicCache())
        return made[-1]

    time_per_token(course_lm.model, torch.arange(5), new_tokens=6, warmup=1, cache=cache)
    assert [kept.get_seq_length() for kept in made] == [5 + 1 + 6]
