"""An n-gram language model: the baseline that a neural model of the same text must beat.

Interpolated modified Kneser-Ney smoothing (Chen and Goodman 1999, "An empirical study of smoothing
techniques for language modeling", section 3). The probability of a word w after the context h is

    p(w | h) = (c(h w) - D(c(h w))) / c(h .) + gamma(h) p(w | h'),

where h' is h without its first word, D the discount of its count, and gamma(h) the mass that the
discounts took away. c counts occurrences in the highest order, and distinct words in front of the
n-gram in the lower ones. The recursion ends at the uniform distribution over the vocabulary.
"""

from typing import NamedTuple

import numpy as np

from course_utils.evaluation.perplexity import Perplexity


class _Level(NamedTuple):
    """The n-grams of one order, sorted by key: (number of their context) * vocabulary + last token.

    The context is the (n-1)-gram in front; its number is its place among those of its own order.
    """

    keys: np.ndarray  # [n-grams]
    share: np.ndarray  # [n-grams] discounted count / count of the context
    gamma: np.ndarray  # [contexts] weight of the lower order


class NGram:
    """Modified Kneser-Ney model of order `order`, counted on the token stream `tokens` `[n]`.

    The stream is taken as it is: n-grams reach over the ends of documents, as the windows of a
    neural model do. Memory is about 24 bytes for each distinct n-gram.
    Raises `ValueError` for tokens outside the vocabulary, or fewer than `order`.
    """

    def __init__(self, tokens, vocabulary: int, order: int = 5):
        if order < 1:
            raise ValueError(f"order {order} must be at least 1")
        self.vocabulary, self.order = vocabulary, order
        tokens = self._checked(tokens)
        if len(tokens) < order:
            raise ValueError(f"{len(tokens)} tokens hold no {order}-gram: give more text")
        ids = np.zeros(len(tokens) + 1, dtype=np.int64)  # of the n-gram that begins at each place
        keys, counts = [], []
        for n in range(1, order + 1):
            found, first, inverse, occurrences = np.unique(
                ids[: len(tokens) - n + 1] * vocabulary + tokens[n - 1 :],
                return_index=True,
                return_inverse=True,
                return_counts=True,
            )
            if (
                n > 1
            ):  # each distinct n-gram puts one more word in front of the (n-1)-gram it ends in
                counts.append(np.bincount(ids[first + 1], minlength=len(keys[-1])))
            keys.append(found)
            ids = inverse
        counts.append(occurrences)
        contexts = [1, *map(len, keys)]
        self._levels = [self._level(*level) for level in zip(keys, counts, contexts, strict=False)]

    def nats(self, tokens) -> np.ndarray:
        """-log p of each token of the stream `tokens` `[n]` after those before it: float64 `[n]`."""
        tokens = self._checked(tokens)
        p = np.full(len(tokens), 1 / self.vocabulary)
        context = np.zeros(len(tokens), dtype=np.int64)  # number of the context; -1: never counted
        for n, level in enumerate(self._levels):
            wanted = context * self.vocabulary + tokens[n:]
            at = np.searchsorted(level.keys, wanted).clip(max=len(level.keys) - 1)
            seen = level.keys[at] == wanted  # not where context is -1: keys are not negative
            p[n:] *= np.where(context < 0, 1.0, level.gamma[context])
            p[n:] += np.where(seen, level.share[at], 0.0)
            context = np.where(seen, at, -1)[: len(tokens) - n - 1]
        return -np.log(p)

    def perplexity(self, tokens) -> Perplexity:
        """Perplexity on the stream `tokens` `[n]`; its first token is not predicted.

        These are the tokens that `evaluation.perplexity` predicts when its windows overlap.
        """
        nats = self.nats(tokens)[1:]
        return Perplexity(float(nats.sum()), len(nats), len(tokens), window=self.order, stride=1)

    def _checked(self, tokens) -> np.ndarray:
        tokens = np.asarray(tokens, dtype=np.int64)
        if tokens.ndim != 1 or not len(tokens):
            raise ValueError(f"tokens must be a stream [n] of at least 1, got shape {tokens.shape}")
        if tokens.min() < 0 or tokens.max() >= self.vocabulary:
            raise ValueError(
                f"tokens from {tokens.min()} to {tokens.max()} do not fit a vocabulary of "
                f"{self.vocabulary}: use the tokenizer that the model was counted with."
            )
        return tokens

    def _level(self, keys: np.ndarray, counts: np.ndarray, contexts: int) -> _Level:
        discounts = _discounts(counts)[np.minimum(counts, 3)]
        context = keys // self.vocabulary
        total = np.bincount(context, counts, minlength=contexts)
        taken = np.bincount(context, discounts, minlength=contexts)
        # A context that only ends the stream is followed by nothing: all its mass is the lower order's.
        gamma = np.divide(taken, total, out=np.ones(contexts), where=total > 0)
        share = (counts - discounts) / np.maximum(total, 1)[context]
        return _Level(keys, share, gamma)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """[4] discounts of the counts 0, 1, 2, and 3 and more (Chen and Goodman 1999, equation 26).

    Where the estimate does not exist (no n-gram has one of the counts 1 to 4, as in very little text
    or for unigrams of a small vocabulary), each count up to 3 is discounted by its half.
    """
    fallback = np.array([0, 0.5, 1.0, 1.5])
    _, n1, n2, n3, n4 = np.bincount(np.minimum(counts, 5), minlength=6)[:5].astype(float)
    if not min(n1, n2, n3, n4):
        return fallback
    y = n1 / (n1 + 2 * n2)
    found = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return found if (found >= 0).all() else fallback


def overlap(training, tokens, n: int = 13) -> float:
    """Share of the n-grams of the stream `tokens` that `training` holds as well, from 0 to 1.

    13 is the length that GPT-3's authors looked for (Brown et al. 2020, arXiv 2005.14165,
    appendix C). n-grams are compared by a hash of 64 bits.
    """
    return float(np.isin(_hashes(tokens, n), _hashes(training, n)).mean())


def _hashes(tokens, n: int) -> np.ndarray:
    tokens = np.asarray(tokens).astype(np.uint64)
    if len(tokens) < n:
        raise ValueError(f"{len(tokens)} tokens hold no {n}-gram: give more text")
    windows = np.lib.stride_tricks.sliding_window_view(tokens + np.uint64(1), n)
    factor = np.uint64(6364136223846793005)  # odd and large: Knuth's multiplier, MMIX
    hashes = np.zeros(len(windows), dtype=np.uint64)
    for i in range(n):
        hashes = hashes * factor + windows[:, i]
    return hashes
