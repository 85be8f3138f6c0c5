"""The Kneser-Ney baseline: a proper distribution, equal to a naive reference, better with order."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course_utils.data.corpora import documents
from course_utils.tools.site.ngram import NGram, overlap

VOCABULARY = 5
streams = st.lists(st.integers(0, VOCABULARY - 1), min_size=5, max_size=80)


def probability(model: NGram, context: list[int], token: int) -> float:
    return math.exp(-model.nats([*context, token])[-1])


class Naive:
    """Chen and Goodman's modified Kneser-Ney by dictionaries, straight from the definition."""

    def __init__(self, tokens, vocabulary, order):
        self.vocabulary, self.order = vocabulary, order
        grams = {
            n: Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
            for n in range(1, order + 1)
        }
        self.counts = {order: dict(grams[order])}
        for n in range(1, order):
            in_front = defaultdict(set)
            for gram in grams[n + 1]:
                in_front[gram[1:]].add(gram[0])
            self.counts[n] = {gram: len(words) for gram, words in in_front.items()}

    def discount(self, n, count):
        found = Counter(self.counts[n].values())
        n1, n2, n3, n4 = (found[k] for k in (1, 2, 3, 4))
        fallback = (0.5, 1.0, 1.5)
        if 0 in (n1, n2, n3, n4):
            return fallback[min(count, 3) - 1]
        y = n1 / (n1 + 2 * n2)
        estimated = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        return (estimated if min(estimated) >= 0 else fallback)[min(count, 3) - 1]

    def p(self, context, token):
        context = tuple(context[max(0, len(context) - self.order + 1) :])
        return self._p(len(context) + 1, context, token)

    def _p(self, n, context, token):
        if n == 0:
            return 1 / self.vocabulary
        following = {g[-1]: c for g, c in self.counts[n].items() if g[:-1] == context}
        lower = self._p(n - 1, context[1:], token)
        total = sum(following.values())
        if not total:
            return lower
        count = following.get(token, 0)
        share = (count - self.discount(n, count)) / total if count else 0
        return share + sum(self.discount(n, c) for c in following.values()) / total * lower


@settings(max_examples=60, deadline=None)
@given(streams, st.integers(1, 5), st.lists(st.integers(0, VOCABULARY - 1), max_size=7))
def test_probabilities_sum_to_one_after_any_context(tokens, order, context):
    model = NGram(tokens, VOCABULARY, order)
    total = sum(probability(model, context, token) for token in range(VOCABULARY))
    assert total == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_probabilities_sum_to_one_after_a_context_never_seen(order):
    model = NGram([0, 1, 0, 2, 0, 1, 1], 9, order)
    for context in ([8], [0, 8, 7], [1, 8, 1, 0, 2, 1]):
        assert sum(probability(model, context, token) for token in range(9)) == pytest.approx(1)
        assert probability(model, context, 8) > 0  # never counted, yet not impossible


@settings(max_examples=60, deadline=None)
@given(streams, st.integers(1, 5), streams)
def test_equals_a_naive_reference(tokens, order, evaluated):
    nats = NGram(tokens, VOCABULARY, order).nats(evaluated)
    naive = Naive(tokens, VOCABULARY, order)
    expected = [-math.log(naive.p(evaluated[:i], w)) for i, w in enumerate(evaluated)]
    np.testing.assert_allclose(nats, expected, rtol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_equals_a_naive_reference_where_discounts_are_estimated(order):
    rng = np.random.default_rng(0)
    tokens = (rng.zipf(1.3, 3000) % 60).tolist()
    evaluated = (rng.zipf(1.3, 60) % 60).tolist()
    naive = Naive(tokens, 60, order)
    if order > 1:  # so that this is another case than the one above
        assert naive.discount(order, 1) != 0.5
    expected = [-math.log(naive.p(evaluated[:i], w)) for i, w in enumerate(evaluated)]
    np.testing.assert_allclose(NGram(tokens, 60, order).nats(evaluated), expected, rtol=1e-9)


def test_bigram_by_hand():
    # 0 1 0 2: bigrams 01, 10, 02. In front of 0 stands {1}, of 1 {0}, of 2 {0}: one each. The
    # discounts fall back to 1/2 for a count of 1.
    model = NGram([0, 1, 0, 2], 4, order=2)
    unigram = (1 - 0.5) / 3 + 3 * 0.5 / 3 * (1 / 4)  # = 7/24
    assert probability(model, [0], 1) == pytest.approx((1 - 0.5) / 2 + 2 * 0.5 / 2 * unigram)
    assert probability(model, [0], 3) == pytest.approx(1 / 2 * (1 / 2) * (1 / 4))
    assert probability(model, [2], 1) == pytest.approx(unigram)  # nothing ever followed 2


def test_higher_orders_predict_held_out_text_better():
    text = {
        split: "".join(d.text for d in documents("factbook", split)[:20]).encode()
        for split in ("train", "evaluation")
    }
    training, evaluated = (np.frombuffer(text[s], np.uint8) for s in ("train", "evaluation"))
    found = [NGram(training, 256, n).perplexity(evaluated[:50_000]).perplexity for n in range(1, 6)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 15 and found[4] < 5  # letters alone; letters after four others


def test_perplexity_predicts_all_but_the_first_token():
    model = NGram([0, 1, 2, 0, 1, 2, 0], 3, order=2)
    found = model.perplexity(torch.tensor([0, 1, 2, 0]))
    assert found.predicted == 3 and found.tokens == 4
    assert found.total_nats == pytest.approx(model.nats([0, 1, 2, 0])[1:].sum())


def test_clear_errors():
    with pytest.raises(ValueError, match="order 0"):
        NGram([0, 1], 2, order=0)
    with pytest.raises(ValueError, match="2 tokens hold no 3-gram"):
        NGram([0, 1], 2, order=3)
    with pytest.raises(ValueError, match=r"from 0 to 7 .* vocabulary of 2"):
        NGram([0, 7], 2, order=1)
    with pytest.raises(ValueError, match="shape"):
        NGram([[0, 1]], 2, order=1)
    with pytest.raises(ValueError, match="from -1"):
        NGram([0, 1], 2, order=1).nats([-1])


@settings(max_examples=60, deadline=None)
@given(streams, streams, st.integers(1, 4))
def test_overlap_counts_shared_ngrams(training, tokens, n):
    grams = {tuple(training[i : i + n]) for i in range(len(training) - n + 1)}
    of = [tuple(tokens[i : i + n]) in grams for i in range(len(tokens) - n + 1)]
    assert overlap(training, tokens, n) == pytest.approx(sum(of) / len(of))
    assert overlap(tokens, tokens, n) == 1


def test_overlap_of_too_little_text():
    with pytest.raises(ValueError, match="3 tokens hold no 13-gram"):
        overlap(torch.arange(20), torch.arange(3))
