"""How much a neuron, a head or a layer matters: five scores, the lowest of which go.

All return a score for each unit by the block's name, `[units]`, and `[1]` for kind "layers". What a
unit is says `structured.units_of`. Built step by step in `pruning/structured_pruning`.
"""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_utils.models.walk import LinearLayer, blocks, hidden_states, layer_input, linear_layers
from course_utils.pruning.structured import units_of
from course_utils.training.loop import next_token_loss

Scores = dict[str, Tensor]


def magnitude(model: nn.Module, kind: str) -> Scores:
    """The root of the summed squares of all weights that a unit owns, biases left out."""
    squares = _summed(model, kind, lambda weight: weight.float().square())
    return {name: of_block.sqrt() for name, of_block in squares.items()}


def random_scores(model: nn.Module, kind: str, seed: int) -> Scores:
    """The control, which looks at nothing: a uniform number for each unit."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(len(of_block), generator=draw)
        for name, of_block in magnitude(model, kind).items()
    }


@torch.no_grad()
def activation(model: nn.Module, kind: str, tokens: Tensor) -> Scores:
    """Minitron's score (arXiv 2407.14679): how large a unit's output is on `tokens` `[sequences, length]`.

    |a| is averaged over a sequence, and the squares summed over sequences; the root is the score. Of a
    head |a| is the length of its part of what the output projection gets. Minitron takes batches for
    sequences. Raises `ValueError` for kind "layers" and for empty tokens.
    """
    _check(tokens)
    sums: Scores = {}
    handles = []
    for name, block in blocks(model):
        *_, read = units_of(block, kind)

        def watch(_, args, kwargs, name=name, places=read.places):
            units = layer_input(args, kwargs)[0][:, places].float()  # [length, units, n]
            mean = units.norm(dim=-1).mean(0)  # [units]
            sums[name] = sums.get(name, 0) + mean.square().cpu()

        layer = block.get_submodule(read.layer)
        handles.append(layer.register_forward_pre_hook(watch, with_kwargs=True))
    _run(model, tokens, handles)
    return {name: of_block.sqrt() for name, of_block in sums.items()}


def taylor(model: nn.Module, kind: str, tokens: Tensor) -> Scores:
    """LLM-Pruner's first-order score (arXiv 2305.11627): the sum of |w dL/dw| over a unit's weights.

    L is the mean loss on `tokens` `[sequences, length]`, so |w dL/dw| is about what L changes by when w
    becomes 0. Biases are left out. The model is left as it was. Raises `ValueError` for empty tokens.
    """
    _check(tokens)
    probe = copy.deepcopy(model).float().requires_grad_(True)
    probe.zero_grad()
    device = next(probe.parameters()).device
    for sequence in tokens:
        (next_token_loss(probe, sequence[None].to(device)) / len(tokens)).backward()
    with torch.no_grad():
        for layer in linear_layers(probe):  # the products take the weights' place
            layer.module.weight.mul_(layer.module.weight.grad)
    return _summed(probe, kind, Tensor.abs)


@torch.no_grad()
def block_influence(model: nn.Module, tokens: Tensor) -> Scores:
    """ShortGPT's Block Influence (arXiv 2403.03853): 1 - the mean cosine of what goes in and out of a layer.

    Near 0 a layer hardly turns the hidden states of `tokens` `[sequences, length]`. Minitron ranks
    layers by the same number. Raises `ValueError` for empty tokens.
    """
    _check(tokens)
    sums: Scores = {}
    handles = []
    for name, block in blocks(model):

        def watch(_, args, kwargs, output, name=name):
            before, after = layer_input(args, kwargs).float(), hidden_states(output).float()
            turned = 1 - F.cosine_similarity(before, after, dim=-1).mean()
            sums[name] = sums.get(name, 0) + turned.cpu()[None]

        handles.append(block.register_forward_hook(watch, with_kwargs=True))
    _run(model, tokens, handles)
    return {name: total / len(tokens) for name, total in sums.items()}


def best_layers(scores: Mapping[str, Tensor], count: int) -> list[int]:
    """Numbers of the `count` layers with the highest scores, in order; of equal ones the first stay.

    Raises `ValueError` for a count below 1 or above what there is.
    """
    if not 1 <= count <= len(scores):
        raise ValueError(f"{count} layers of {len(scores)}: keep at least 1 and at most all")
    order = torch.cat(list(scores.values())).sort(descending=True, stable=True).indices
    return sorted(order[:count].tolist())


def _summed(model: nn.Module, kind: str, of_weight) -> Scores:
    """Sums over what each unit owns of `of_weight(weight)` `[out, in]`."""
    found = {}
    for name, block in blocks(model):
        if kind == "layers":
            layers = linear_layers(block)
            found[name] = sum(of_weight(layer.weight).sum() for layer in layers).cpu()[None]
            continue
        total = 0
        for share in units_of(block, kind):
            weight = LinearLayer(share.layer, block.get_submodule(share.layer)).weight
            lines = of_weight(weight).sum(1 - share.axis).cpu()  # [out] or [in]
            total = total + lines[share.places].sum(1)
        found[name] = total
    return found


def _run(model: nn.Module, tokens: Tensor, handles: list) -> None:
    """Run the model on all sequences, one after the other; the hooks go in any case."""
    device = next(model.parameters()).device
    try:
        for sequence in tokens:
            model(input_ids=sequence[None].to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def _check(tokens: Tensor) -> None:
    if tokens.ndim != 2 or len(tokens) < 1 or tokens.shape[1] < 2:
        raise ValueError(
            f"calibration {tuple(tokens.shape)}: give at least one sequence of at least two tokens, "
            "[sequences, length]"
        )
