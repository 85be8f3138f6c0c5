"""A task with answers that can be checked: the last word of a clause.

As in LAMBADA (Paperno and others 2016, arXiv 1606.06031) a model reads what comes before a word, and is right
if the word is what it finds likeliest, each of its tokens in turn. Unlike there the words were not chosen by
people so that only the context gives them away: many can be guessed by nobody, and shares are low. What
counts is the difference between two models on the same words.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from course_utils.data.corpora import documents

LAST_WORD = re.compile(r" ([A-Za-z]{4,})[.,;](?=\s)")
CHARACTERS = 8  # of text for a token of context: enough for any tokenizer of words


@dataclass(frozen=True)
class Blank:
    """A context and the word that follows it, as tokens."""

    tokens: Tensor  # [context + answer]
    answer: int  # how many of them, the last ones, are the word
    document: int  # which one it is from, in the order of the corpus


def blanks(tokenizer, count: int, context: int, corpus: str = "factbook") -> list[Blank]:
    """`count` last words of clauses, each after `context` tokens; the same ones every time.

    They lie evenly in each document of the evaluation split, as many in one as in another where there are
    so many. Words have four letters or more. Raises `ValueError` if the split does not hold so many.
    """
    places = []  # of each document: its words
    for number, document in enumerate(documents(corpus, "evaluation")):
        found = [
            (number, document.text, match)
            for match in LAST_WORD.finditer(document.text)
            if match.start() >= CHARACTERS * context
        ]
        places.append(found)
    if not 1 <= count <= (available := sum(map(len, places))):
        raise ValueError(
            f"cannot take {count} last words: the evaluation split has {available} with {context} tokens "
            "before them. Ask for at least one and at most that many, or for shorter contexts."
        )
    chosen, wanted = [], count
    by_length = sorted(places, key=len)
    for place, found in enumerate(by_length):  # what a short document lacks, the longer ones give
        share = min(len(found), -(-wanted // (len(by_length) - place)))
        chosen += [found[i * len(found) // share] for i in range(share)]
        wanted -= share
    return [_blank(tokenizer, text, match, context, number) for number, text, match in chosen]


def _blank(tokenizer, text: str, match: re.Match, context: int, number: int) -> Blank:
    before = text[: match.start()][-CHARACTERS * context :]
    ids = tokenizer(before, add_special_tokens=False, verbose=False).input_ids[-context:]
    word = tokenizer(f" {match[1]}", add_special_tokens=False).input_ids
    return Blank(torch.tensor([*ids, *word]), len(word), number)


@torch.no_grad()
def filled(model: nn.Module, items: Sequence[Blank]) -> Tensor:
    """Whether `model` finds each word, all of its tokens, likeliest: bool `[items]`.

    Raises `ValueError` for no items, and for a model in training mode.
    """
    if not items:
        raise ValueError("no blanks to fill: ask `blanks` for some")
    if model.training:
        raise ValueError("the model is in training mode, where dropout is on: call .eval() first.")
    device = next(model.parameters()).device
    right = []
    for item in items:
        logits = model(input_ids=item.tokens[None, :-1].to(device)).logits[0, -item.answer :]
        right.append(torch.equal(logits.argmax(-1).cpu(), item.tokens[-item.answer :]))
    return torch.tensor(right)
