"""Perplexity with its protocol stated: tokens, window, stride."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.std import tqdm
from transformers import Cache


@dataclass(frozen=True)
class Perplexity:
    """Result of `perplexity`, with the protocol that it was measured by."""

    total_nats: float  # summed over the predicted tokens
    predicted: int  # number of predicted tokens
    tokens: int
    window: int
    stride: int

    @property
    def nats(self) -> float:
        """Mean negative log-likelihood in nats per predicted token."""
        return self.total_nats / self.predicted

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood; `inf` above 709 nats, where a float ends."""
        try:
            return math.exp(self.nats)
        except OverflowError:
            return math.inf

    def bits_per_byte(self, text: str) -> float:
        """Bits per UTF-8 byte of `text`, the text of the tokens: comparable between tokenizers."""
        return self.total_nats / math.log(2) / len(text.encode("utf-8"))

    def __str__(self) -> str:
        return f"{self.perplexity:.2f} ({self.tokens:,} tokens, window {self.window}, stride {self.stride})"


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    window: int,
    stride: int | None = None,
    cache: Callable[[], Cache] | None = None,
    cached_step: int = 1,
    progress: bool = False,
) -> Perplexity:
    """Perplexity of `model` on the token stream `tokens` `[n]`.

    Windows of `window` tokens start every `stride` tokens (default: `window`, no overlap). Each
    token is predicted once, in the first window that holds it, from what stands before it there; the
    first token of a window that overlaps no other has nothing before it and is not predicted. This
    is the sliding-window protocol of the `transformers` documentation ("Perplexity of fixed-length
    models").

    `cache`, as `transformers.DynamicCache`, makes a key-value cache for each window. The window is then
    read `cached_step` tokens at a time, so that each reads the earlier ones through the cache, as in
    generation. A whole window at once would say nothing of a cache that rounds: most hand back, in the
    pass that writes it, what was written. More tokens a step take less time, and hide that much more.
    """
    stride = window if stride is None else stride
    check_window(model, window, stride)
    if tokens.ndim != 1 or len(tokens) < 2:
        raise ValueError(f"tokens must be a stream [n] of at least 2, got {tuple(tokens.shape)}")
    if cached_step < 1:
        raise ValueError(f"cached_step {cached_step}: read at least 1 token at a time")
    device = next(model.parameters()).device
    total, predicted, seen = 0.0, 0, 0  # `seen`: tokens before this were predicted already
    for start in tqdm(range(0, len(tokens), stride), disable=not progress, desc="perplexity"):
        piece = tokens[start : start + window].to(device)
        first = max(seen - start, 1)
        if first < len(piece):
            logits = _logits(model, piece[:-1], cache and cache(), cached_step)[first - 1 :]
            nats = F.cross_entropy(logits.float(), piece[first:], reduction="sum")
            total += nats.item()
            predicted += len(piece) - first
        seen = start + len(piece)
        if seen == len(tokens):
            break
    return Perplexity(total, predicted, len(tokens), window, stride)


def check_window(model: nn.Module, window: int, stride: int) -> None:
    """Refuse a window that the model has no positions for, and a stride that would skip tokens."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", window)
    if not 1 < window <= limit or not 1 <= stride <= window:
        raise ValueError(
            f"window {window} and stride {stride} do not fit: the window is at least 2 and at most the "
            f"model's {limit} positions, the stride at least 1 and at most the window."
        )


def _logits(model: nn.Module, tokens: Tensor, cache: Cache | None, cached_step: int) -> Tensor:
    """Logits `[n, vocabulary]` after each of `tokens` `[n]`, read through `cache` if there is one."""
    if cache is None:
        return model(input_ids=tokens[None]).logits[0]
    steps = tokens[None].split(cached_step, dim=1)
    through = {"past_key_values": cache, "use_cache": True}
    return torch.cat([model(input_ids=step, **through).logits[0] for step in steps])
