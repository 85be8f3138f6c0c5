"""Which layers a model can spare bits in, and which get them if bytes are limited."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from course_utils.compression.base import Method
from course_utils.compression.checks import check_replaceable
from course_utils.compression.driver import naming, quantize_layer
from course_utils.evaluation import perplexity
from course_utils.models.walk import blocks, linear_layers, replace_module


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    method: Method,
    tokens: Tensor,
    *,
    window: int,
    parts: Literal["layers", "blocks"] = "layers",
) -> dict[str, float]:
    """How many nats a token the model loses when `method` quantizes one part of it, all else float.

    The increase of the negative log-likelihood on the stream `tokens` `[n]`, in windows of `window`
    (`evaluation.perplexity`), by the name of the part: every linear layer, or every decoder block. It
    may be negative: on a few tokens, rounding can help by chance. The model is left as it was. `method` must
    be one that needs no calibration.
    """
    if method.needs_calibration:
        raise ValueError(f"{method} needs calibration: sensitivity takes methods that need none.")
    if model.training:
        raise ValueError(
            "the model is in training mode, whose dropout would drown the increase: call model.eval()."
        )
    layers = linear_layers(model)
    for layer in layers:
        with naming(f"layer {layer.name}"):
            check_replaceable(layer)
    if parts == "layers":
        members = {layer.name: [layer] for layer in layers}
    elif parts == "blocks":
        members = {
            name: [layer for layer in layers if layer.name.startswith(f"{name}.")]
            for name, _ in blocks(model)
        }
    else:
        raise ValueError(f"parts {parts!r}: choose 'layers' or 'blocks'")
    before = perplexity(model, tokens, window=window).nats
    increase = {}
    for name, own in members.items():
        try:
            for layer in own:
                replace_module(model, layer.name, quantize_layer(layer, method)[0])
            increase[name] = perplexity(model, tokens, window=window).nats - before
        finally:
            for layer in own:
                replace_module(model, layer.name, layer.module)
    return increase


@dataclass(frozen=True)
class Choice:
    """A way to store one layer: its bytes, and the loss that is estimated for it."""

    method: Method
    nbytes: int
    loss: float  # in any unit, the same for all layers; nats per token from `sensitivity`


def allocate(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Method]:
    """A method for each layer, so that the losses add up to little and the bytes to at most `budget`.

    Greedy: all layers start from their smallest choice; again and again, the step to a larger one that
    lowers the loss most per byte is taken, among those that still fit. This is optimal where each
    layer's losses are convex in its bytes and all steps cost the same; else a large step may be left
    out because small ones were taken first. So the result is compared with the uniform ones, the same
    method in all layers, and the best is returned. That losses add up is an assumption.
    Raises `ValueError` if the budget is below the smallest choices, or a loss is NaN or infinite.
    """
    if not choices:
        raise ValueError("there are no layers to allocate bytes to")
    for name, options in choices.items():
        if not options or not all(math.isfinite(option.loss) for option in options):
            raise ValueError(f"layer {name} needs choices with finite losses, got {list(options)}")
    chosen = {
        name: min(options, key=lambda c: (c.nbytes, c.loss)) for name, options in choices.items()
    }
    if budget < _nbytes(chosen):
        raise ValueError(
            f"a budget of {budget:,} bytes is below the {_nbytes(chosen):,} of the smallest choices: "
            "raise it, or offer choices with fewer bits."
        )
    while step := _best_step(choices, chosen, budget - _nbytes(chosen)):
        name, choice = step
        chosen[name] = choice
    best = min([chosen, *_uniform(choices, budget)], key=_loss)
    return {name: choice.method for name, choice in best.items()}


def _best_step(
    choices: Mapping[str, Sequence[Choice]], chosen: Mapping[str, Choice], room: int
) -> tuple[str, Choice] | None:
    """The layer and its larger choice that lower the loss most per byte, within `room` bytes."""
    best, best_gain = None, 0.0
    for name, options in choices.items():
        now = chosen[name]
        for option in options:
            extra = option.nbytes - now.nbytes
            if 0 < extra <= room and (gain := (now.loss - option.loss) / extra) > best_gain:
                best, best_gain = (name, option), gain
    return best


def _uniform(choices: Mapping[str, Sequence[Choice]], budget: int) -> list[dict[str, Choice]]:
    """The allocations within the budget that give all layers the same method."""
    by_method = [{option.method: option for option in options} for options in choices.values()]
    shared = [m for m in by_method[0] if all(m in options for options in by_method)]
    found = [
        {name: options[method] for name, options in zip(choices, by_method, strict=True)}
        for method in shared
    ]
    return [allocation for allocation in found if _nbytes(allocation) <= budget]


def _nbytes(chosen: Mapping[str, Choice]) -> int:
    return sum(choice.nbytes for choice in chosen.values())


def _loss(chosen: Mapping[str, Choice]) -> float:
    return sum(choice.loss for choice in chosen.values())
