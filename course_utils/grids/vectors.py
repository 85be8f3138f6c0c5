"""Codebooks of vectors: one code for several neighbouring weights, found by k-means.

A code of b bits for `length` weights costs b / length bits a weight, and its 2^b values fill the space as
the data does, which levels for each weight by itself cannot. The squared error may be weighted, coordinate by
coordinate, as the Hessian's diagonal says how much an error of each column matters. Lloyd's method (1982,
"Least squares quantization in PCM", section IV) in more than one dimension. Built step by step in
`chronology/tpoti_two_bit_ladder`.
"""

import torch
from torch import Tensor

PART = 2**14  # vectors compared with the codebook at a time


def nearest_vectors(x: Tensor, codebook: Tensor, weights: Tensor | None = None) -> Tensor:
    """The entry (int64 `[n]`) of `codebook` `[entries, length]` that is nearest to each of `x` `[n, length]`.

    Nearest by sum w (x - c)^2 with `weights` `[n, length]`, all 1 if None. A tie goes to the lower entry.
    """
    of_entries = codebook.square()
    found = []
    for start in range(0, len(x), PART):
        part = x[start : start + PART]
        if weights is None:
            distance = of_entries.sum(1) - 2 * (part @ codebook.T)  # but for |x|^2
        else:
            w = weights[start : start + PART]
            distance = w @ of_entries.T - 2 * ((w * part) @ codebook.T)
        found.append(distance.argmin(1))
    return torch.cat(found)


def kmeans(
    x: Tensor,
    entries: int,
    weights: Tensor | None = None,
    *,
    start: Tensor | None = None,
    iterations: int = 20,
    seed: int = 0,
) -> Tensor:
    """A codebook `[entries, length]` of small squared error for `x` `[n, length]`, float32.

    Turns of Lloyd's method: each vector goes to its nearest entry, each entry becomes the mean of its
    vectors, weighted by `weights` `[n, length]` in every coordinate. No turn raises the error. It starts from
    `start`, else from vectors drawn by `seed`, and ends after `iterations` turns, or when no vector changes
    its entry. An entry without vectors moves to a vector of large error, the largest first; where all
    vectors are met exactly it stays. The same input and seed give the same codebook.

    Raises ValueError for fewer vectors than entries, for weights of another shape, for negative ones, and for
    values that are not finite.
    """
    x = x.float()
    _check(x, entries, weights)
    w = torch.ones_like(x) if weights is None else weights.float()
    if start is None:
        draw = torch.Generator().manual_seed(seed)
        start = x[torch.randperm(len(x), generator=draw)[:entries].to(x.device)]
    book, before = start.float().clone(), None
    for _ in range(iterations):
        codes = nearest_vectors(x, book, weights)
        if before is not None and torch.equal(codes, before):
            break
        before = codes
        _reseed(book, codes, x, w)
        mass = torch.zeros_like(book).index_add_(0, codes, w)
        sums = torch.zeros_like(book).index_add_(0, codes, w * x)
        book = torch.where(mass > 0, sums / mass.clamp(min=torch.finfo(mass.dtype).tiny), book)
    return book


def _reseed(book: Tensor, codes: Tensor, x: Tensor, w: Tensor) -> None:
    """Give each entry without vectors the vector of largest error, and that vector to it; in place."""
    empty = (codes.bincount(minlength=len(book)) == 0).nonzero().flatten()
    if not len(empty):
        return
    error = (w * (x - book[codes]).square()).sum(1)  # [n]
    worst = error.argsort(descending=True, stable=True)[: len(empty)]
    worst = worst[error[worst] > 0]
    empty = empty[: len(worst)]
    book[empty] = x[worst]
    codes[worst] = empty


def _check(x: Tensor, entries: int, weights: Tensor | None) -> None:
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"vectors are [n, length], got {tuple(x.shape)}")
    if entries < 1 or len(x) < entries:
        raise ValueError(
            f"{entries} entries for {len(x)} vectors: a codebook has at least one entry, and no more than "
            "there are vectors. Take fewer bits, or shorter vectors"
        )
    if not x.isfinite().all():
        raise ValueError("some vectors are NaN or infinite: repair the input")
    if weights is None:
        return
    if weights.shape != x.shape:
        raise ValueError(
            f"weights {tuple(weights.shape)} for vectors {tuple(x.shape)}: give one for each number"
        )
    if not (weights.isfinite().all() and (weights >= 0).all()):
        raise ValueError("weights have to be finite, and not negative")
