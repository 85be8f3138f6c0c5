"""Calibration and evaluation tokens for any model's tokenizer."""

import warnings

import torch
from torch import Tensor

from course_utils.data.corpora import documents


def evaluation_tokens(tokenizer, n_tokens: int, corpus: str = "factbook") -> Tensor:
    """`[n_tokens]` tokens of the evaluation split: its `evaluation_documents` one after another."""
    return torch.cat(evaluation_documents(tokenizer, n_tokens, corpus))


def evaluation_documents(tokenizer, n_tokens: int, corpus: str = "factbook") -> list[Tensor]:
    """The start of each document of the evaluation split, in equal shares, `n_tokens` tokens in all.

    A document shorter than its share is taken whole, and the longer ones give what it lacks. Raises
    `ValueError` if the split does not hold so many tokens.
    """
    streams = [
        tokenizer(document.text, add_special_tokens=False, verbose=False).input_ids
        for document in documents(corpus, "evaluation")
    ]
    available = sum(map(len, streams))
    if not 1 <= n_tokens <= available:
        raise ValueError(
            f"cannot take {n_tokens} tokens: the evaluation split holds {available} of this "
            "tokenizer's. Ask for at least one and at most that many."
        )
    lengths, wanted = {}, n_tokens
    by_length = sorted(range(len(streams)), key=lambda i: len(streams[i]))
    for place, i in enumerate(by_length):  # what a short document lacks, the longer ones give
        lengths[i] = min(len(streams[i]), -(-wanted // (len(streams) - place)))
        wanted -= lengths[i]
    return [torch.tensor(ids[: lengths[i]], dtype=torch.int64) for i, ids in enumerate(streams)]


def calibration_tokens(tokenizer, sequences: int, length: int, *, seed: int = 0) -> Tensor:
    """`[sequences, length]` tokens: windows at seeded random places of the calibration split.

    No document of the calibration split is in the evaluation split (`corpora.split_of`), nor in the
    training text of course-lm. Raises `ValueError` if the text has fewer different windows than `sequences`,
    and warns if the windows overlap so much that half of the tokens are repeated.
    """
    text = "\n\n".join(document.text for document in documents("factbook", "calibration"))
    stream = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    if sequences < 1 or not 1 <= length <= len(stream):
        raise ValueError(
            f"cannot cut {sequences} sequences of {length} tokens from a text of {len(stream)}: "
            "ask for at least one sequence, no longer than the text."
        )
    if (windows := len(stream) - length + 1) < sequences:
        raise ValueError(
            f"a text of {len(stream)} tokens has only {windows} different windows of {length}, not "
            f"{sequences}: ask for fewer or shorter sequences."
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - length + 1, (sequences,), generator=generator)
    places = starts[:, None] + torch.arange(length)
    if (different := len(places.unique())) < places.numel() / 2:
        warnings.warn(
            f"{sequences} sequences of {length} tokens are {places.numel()}, but they hold only {different} "
            f"different ones of a text of {len(stream)}: ask for fewer or shorter sequences.",
            stacklevel=2,
        )
    return stream[places]
