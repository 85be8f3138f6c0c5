"""Perplexity, bytes, timing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
