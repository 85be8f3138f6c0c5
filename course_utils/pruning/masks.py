"""Masks: which weights of a matrix stay, as plain functions of a score for each weight.

A mask is a bool tensor in the shape of the scores, True where the weight stays. Low scores go. With the
magnitude |W| as the score this is the pruning of Han et al. 2015, arXiv 1506.02626; `wanda` and `sparsegpt`
bring scores of their own. Four ways to compare weights: all of one layer (`layer_mask`), all of several
layers (`global_masks`), those of a row (`row_mask`), those of m neighbours in a row (`n_m_mask`).

Counts are exact: of N weights `round(sparsity * N)` go, half to even, as in `torch.nn.utils.prune`. Among
equal scores the first in row order goes first; torch leaves that open. Left out: structures that are
removed whole (rows, heads, layers).
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

PATTERN = re.compile(r"([1-9]\d*):([1-9]\d*)")


def check_sparsity(sparsity: float) -> None:
    """Refuse a share of weights to remove that does not lie in [0, 1): TypeError, ValueError."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
        raise TypeError(f"sparsity {sparsity!r}: give the share of weights to remove, a number")
    if not 0 <= sparsity < 1:  # NaN as well
        hint = f": did you mean {sparsity / 100:g}?" if 1 < sparsity < 100 else ""
        raise ValueError(
            f"sparsity {sparsity} is not in [0, 1): it is the share of weights to remove, and some have "
            f"to stay{hint}"
        )


def n_zeros(count: int, sparsity: float) -> int:
    """How many of `count` weights go: `round(sparsity * count)`, half to even. Of a few it may be all."""
    check_sparsity(sparsity)
    return round(sparsity * count)


def n_m(pattern: str) -> tuple[int, int]:
    """(n, m) of a pattern "n:m": n weights STAY of each m neighbours. "2:4" is NVIDIA's.

    The code of SparseGPT and Wanda counts the m - n that go (`prune_n`). ValueError if it is no such pattern,
    or if nothing would go.
    """
    found = PATTERN.fullmatch(pattern)
    if not found:
        raise ValueError(f"pattern {pattern!r}: write n:m, as '2:4' for 2 that stay of each 4")
    n, m = map(int, found.groups())
    if n >= m:
        raise ValueError(
            f"pattern {pattern!r} keeps {n} of each {m} weights, so none would go: n has to be below m, as "
            "in '2:4'"
        )
    return n, m


def check_pattern(pattern: str, columns: int) -> None:
    """Refuse a row of `columns` weights that groups of m do not divide."""
    _, m = n_m(pattern)
    if columns % m:
        raise ValueError(
            f"pattern {pattern!r}: groups of {m} do not divide the {columns} columns of this layer: take an "
            "m that does, or a share of the weights instead"
        )


def sparsity_of(mask: Tensor) -> float:
    """The share of weights that a mask removes."""
    return 1 - mask.sum().item() / mask.numel()


def layer_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Keep the highest of all `scores` (any shape), whatever their rows; exactly `n_zeros` go."""
    _check_scores(scores)
    return without_lowest(scores.flatten(), n_zeros(scores.numel(), sparsity)).view(scores.shape)


def row_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Keep the highest `scores` `[out, in]` of each row; exactly `n_zeros(in)` go from every row."""
    _check_scores(scores)
    return without_lowest(scores, n_zeros(scores.shape[-1], sparsity))


def n_m_mask(scores: Tensor, pattern: str) -> Tensor:
    """Keep the n highest `scores` `[out, in]` of every m neighbours in a row, for a pattern "n:m".

    Raises ValueError if it is no such pattern, or if m does not divide the columns.
    """
    _check_scores(scores)
    check_pattern(pattern, scores.shape[-1])
    n, m = n_m(pattern)
    return without_lowest(scores.unflatten(-1, (-1, m)), m - n).flatten(-2)


def global_masks(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Keep the highest of the scores of all layers, compared with each other; a mask for each name.

    Exactly `n_zeros` of all weights go, from some layers more than from others: `sparsity_of` tells. Among
    equal scores those of the first layer go first. Raises ValueError if there are no layers.
    """
    if not scores:
        raise ValueError("no scores at all: give those of one layer at least")
    for name, values in scores.items():
        _check_scores(values, f"layer {name}: ")
    flat = torch.cat([values.flatten() for values in scores.values()])
    kept = without_lowest(flat, n_zeros(len(flat), sparsity))
    parts = kept.split([values.numel() for values in scores.values()])
    return {
        name: part.view(values.shape)
        for (name, values), part in zip(scores.items(), parts, strict=True)
    }


def mask_for(scores: Tensor, sparsity: float | str) -> Tensor:
    """`n_m_mask` for a pattern, `row_mask` for a share."""
    if isinstance(sparsity, str):
        return n_m_mask(scores, sparsity)
    return row_mask(scores, sparsity)


def check_setting(sparsity: float | str) -> None:
    """Refuse what is neither a share of the weights nor a pattern "n:m"."""
    if isinstance(sparsity, str):
        n_m(sparsity)
    else:
        check_sparsity(sparsity)


def without_lowest(scores: Tensor, zeros: int) -> Tensor:
    """False at the `zeros` lowest `scores` along the last dimension; of equal ones, at the first."""
    if not zeros:
        return torch.ones_like(scores, dtype=torch.bool)
    highest = scores.kthvalue(zeros, dim=-1, keepdim=True).values  # of those that go
    below, equal = scores < highest, scores == highest
    places = zeros - below.sum(-1, keepdim=True)  # of the equal ones, so many go
    return ~(below | (equal & (equal.cumsum(-1) <= places)))


def _check_scores(scores: Tensor, where: str = "") -> None:
    if not scores.numel():
        raise ValueError(
            f"{where}scores {tuple(scores.shape)} are empty: there is nothing to prune"
        )
    if scores.isnan().any():
        raise ValueError(
            f"{where}{int(scores.isnan().sum())} of {scores.numel()} scores are NaN, which has no rank: look "
            "for NaN in the weights and activations"
        )
