"""The measured comparison, as `course leaderboard` shipped it: one protocol, a row for each method.

`assets/leaderboard/MODEL.json` holds, beside each row's bytes and seconds, its loss summed over every
document of the two texts. So any two rows can be compared in pairs, with the error over documents, and
nothing is run. For `chronology/comparison`.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from course_utils.evaluation.estimate import Estimate, over_units

SHIPPED = Path(__file__).parent.parent / "assets" / "leaderboard"
FLOAT = "float"


@dataclass(frozen=True)
class Score:
    """What a row lost on one text."""

    nats: tuple[float, ...]  # the row's own loss, summed over the tokens of each document
    divergence: float  # KL from the float model, nats per token
    divergence_error: float
    agreement: float  # share of the tokens with the float model's likeliest token
    agreement_error: float


@dataclass(frozen=True)
class Row:
    """A method at one setting. Sizes in bytes; the speed is that of this course's kernels."""

    name: str  # a part of keys
    method: str
    settings: dict
    stored: str  # the format
    kernel: str  # what multiplies with it
    algorithm: str  # how the codes are chosen
    data: bool  # whether it reads calibration text
    bits: float  # stored per weight of the linear layers
    tensor_bytes: int  # of all tensors of the model, embeddings included
    file_bytes: int
    resident_bytes: int  # by which a fresh process grows when it loads the model
    seconds: float  # to quantize
    added_bytes: int  # at most, while quantizing, over the loaded float model
    milliseconds: float  # a generated token
    times_as_fast: float  # as the float model, in turns with it
    scores: dict[str, Score]  # by text
    cloze: tuple[int, ...]  # 1 for each word that was found


@dataclass(frozen=True)
class Leaderboard:
    """All rows of one model, with their protocol and where they were measured."""

    model: str
    protocol: dict
    machine: dict
    tokens: dict[str, tuple[int, ...]]  # by text: predicted tokens of each document
    words: tuple[int, ...]  # the document of each word of the cloze task
    rows: dict[str, Row]

    def loss(self, name: str, text: str) -> Estimate:
        """Nats per token that the row `name` loses to the float model on `text`, paired."""
        return self.difference(name, FLOAT, text)

    def difference(self, one: str, other: str, text: str) -> Estimate:
        """Nats per token that the row `one` loses more than `other` on `text`, paired."""
        return _mean(self._sums(one, text) - self._sums(other, text), self._sizes(text))

    def perplexity(self, name: str, text: str) -> float:
        """exp of the row's mean loss on `text`."""
        return math.exp((self._sums(name, text).sum() / self._sizes(text).sum()).item())

    def cloze_difference(self, name: str) -> Estimate:
        """Share of words that the row finds, less that of the float model, paired over documents."""
        found, reference = (torch.tensor(self.rows[n].cloze).double() for n in (name, FLOAT))
        return over_units(found - reference, torch.tensor(self.words), "documents")

    def losses(self, text: str) -> tuple[list[str], Tensor, Tensor]:
        """Names of the rows but the float one, their nats lost `[rows, documents]`, tokens `[documents]`."""
        names = [name for name in self.rows if name != FLOAT]
        of_float = self._sums(FLOAT, text)
        return (
            names,
            torch.stack([self._sums(n, text) - of_float for n in names]),
            self._sizes(text),
        )

    def _sums(self, name: str, text: str) -> Tensor:
        if name not in self.rows:
            raise ValueError(f"no row {name!r}: there are {', '.join(self.rows)}")
        scores = self.rows[name].scores
        if text not in scores:
            raise ValueError(f"no text {text!r}: there are {', '.join(scores)}")
        return torch.tensor(scores[text].nats, dtype=torch.float64)

    def _sizes(self, text: str) -> Tensor:
        return torch.tensor(self.tokens[text])


def leaderboard(model: str = "course-lm", folder: Path = SHIPPED) -> Leaderboard | None:
    """The rows that were measured on `model`; None if none were shipped yet."""
    file = Path(folder) / f"{model}.json"
    if not file.is_file():
        return None
    told = json.loads(file.read_text("utf-8"))
    rows = [row_from(row) for row in told["rows"]]
    tokens = {text: tuple(sizes) for text, sizes in told["tokens"].items()}
    return Leaderboard(
        told["model"],
        told["protocol"],
        told["machine"],
        tokens,
        tuple(told["words"]),
        {row.name: row for row in rows},
    )


def row_from(told: dict) -> Row:
    """A row from its JSON."""
    scores = {
        text: Score(**score | {"nats": tuple(score["nats"])})
        for text, score in told["scores"].items()
    }
    return Row(**told | {"scores": scores, "cloze": tuple(told["cloze"])})


def retention(nats: float) -> float:
    """The share of the float model's perplexity that is kept: exp(-nats), 1 for a model that loses nothing.

    It is perplexity of the float model / perplexity of the other, on the same tokens: another way to
    write nats lost, and no further measurement.
    """
    return math.exp(-nats)


def kendall(a: Tensor, b: Tensor) -> float:
    """Kendall's tau of two lists `[n]`: (pairs in the same order - pairs in the other) / all pairs.

    1 for the same order, -1 for the reverse; a tie in either counts for none. Raises `ValueError` for
    lists of different lengths, or of less than 2.
    """
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"lists {tuple(a.shape)} and {tuple(b.shape)}: give two of one length")
    first, second = torch.combinations(torch.arange(len(a))).T
    signs = (a[first] - a[second]).sign() * (b[first] - b[second]).sign()
    return signs.double().mean().item()


def kendall_interval(
    board: Leaderboard, texts: tuple[str, str], names: list[str], draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Kendall's tau of the losses of `names` on two texts, and the middle 95% of it over `draws`.

    Each draw takes documents of both texts with replacement, as many as there are (a bootstrap).
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for text in texts:
        rows, sums, sizes = board.losses(text)
        parts.append((sums[[rows.index(name) for name in names]], sizes))
    taus = torch.empty(draws, dtype=torch.float64)
    for i in range(draws):
        means = []
        for sums, sizes in parts:
            drawn = torch.randint(len(sizes), (len(sizes),), generator=generator)
            means.append(sums[:, drawn].sum(1) / sizes[drawn].sum())
        taus[i] = kendall(*means)
    low, high = taus.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return kendall(*(sums.sum(1) / sizes.sum() for sums, sizes in parts)), low, high


def _mean(sums: Tensor, sizes: Tensor) -> Estimate:
    """The mean over all tokens, from sums over documents of `sizes` tokens, with its error."""
    unit = torch.arange(len(sizes)).repeat_interleave(sizes)
    return over_units((sums / sizes).repeat_interleave(sizes), unit, "documents")
