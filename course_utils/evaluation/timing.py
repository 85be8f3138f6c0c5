"""Time per generated token, with what a timing needs: warm-up, repetitions, median and spread."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache


@dataclass(frozen=True)
class Timing:
    """Milliseconds per repetition, and where they were taken."""

    milliseconds: tuple[float, ...]
    device: str
    threads: int

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile."""
        first, _, third = statistics.quantiles(self.milliseconds, n=4)
        return first, third

    def __str__(self) -> str:
        low, high = self.quartiles
        return (
            f"{self.median:.2f} ms (quartiles {low:.2f}-{high:.2f}, {len(self.milliseconds)} tokens, "
            f"{self.device}, {self.threads} threads)"
        )


@torch.no_grad()
def time_per_token(
    model: nn.Module,
    prompt: Tensor,
    *,
    new_tokens: int = 32,
    warmup: int = 4,
    cache: Callable[[], Cache] | None = None,
) -> Timing:
    """Time of greedy decoding, one token at a time with a key-value cache, after `prompt` `[n]`.

    The prompt's own pass and the first `warmup` tokens are not counted. `cache` makes the key-value
    cache; by default it is the model's own, in the model's precision.
    """
    device = next(model.parameters()).device
    kept = cache and cache()
    output = model(input_ids=prompt[None].to(device), past_key_values=kept, use_cache=True)
    times = []
    for _ in range(warmup + new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        _wait(device)
        start = time.perf_counter()
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        _wait(device)
        times.append((time.perf_counter() - start) * 1e3)
    return Timing(tuple(times[warmup:]), str(device), torch.get_num_threads())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
