"""Structures removed for real: MLP neurons, attention heads and whole layers of GPT-2 and Llama models.

A **unit** is what can go alone: a neuron, or a head. It owns rows of the layers that write it, and
columns of the layer that reads it. Removing it cuts both, so the matrices get smaller. Heads that share
keys and values (grouped-query attention) are one unit: without its keys none of them can work.

All layers keep the same number of units, since a plain `transformers` config has one number for all.
LLM-Pruner (arXiv 2305.11627) finds such units by tracing dependencies; here they are written down for
two families. Built step by step in `pruning/structured_pruning`.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from course_utils.models.walk import LinearLayer, blocks

KINDS = ("neurons", "heads")
Keep = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Share:
    """What the units of a block own of one of its linear layers.

    `places` `[units, n]` are row numbers of the weight `[out, in]` where `axis` is 0, and column numbers
    where it is 1.
    """

    layer: str  # name within the block
    axis: int
    places: Tensor


def units_of(block: nn.Module, kind: str) -> list[Share]:
    """The units of a decoder block: what each owns of each linear layer; the layer that reads them is last.

    `kind` is "neurons" or "heads". Raises `ValueError` for other kinds, and for blocks of other models
    than GPT-2 and Llama.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: choose of {', '.join(KINDS)}; layers go by keep_layers")
    family = type(block).__name__
    if family == "GPT2Block":
        if kind == "neurons":
            return _neurons(block, ("mlp.c_fc",), "mlp.c_proj")
        attention = block.attn
        heads = attention.split_size // attention.head_dim
        of_head = torch.arange(attention.split_size).view(heads, attention.head_dim)
        # One layer computes queries, keys and values, one after the other.
        fused = torch.cat([of_head + part * attention.split_size for part in range(3)], 1)
        return [Share("attn.c_attn", 0, fused), Share("attn.c_proj", 1, of_head)]
    if family == "LlamaDecoderLayer":
        if kind == "neurons":
            return _neurons(block, ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
        attention = block.self_attn
        of_group = torch.arange(attention.k_proj.out_features).view(-1, attention.head_dim)
        of_heads = torch.arange(attention.q_proj.out_features).view(len(of_group), -1)
        return [
            Share("self_attn.q_proj", 0, of_heads),
            Share("self_attn.k_proj", 0, of_group),
            Share("self_attn.v_proj", 0, of_group),
            Share("self_attn.o_proj", 1, of_heads),
        ]
    raise ValueError(
        f"a block of class {family} is not known: which rows and columns belong to a {kind[:-1]} is "
        "written down for GPT2Block and LlamaDecoderLayer"
    )


def best_units(scores: Mapping[str, Tensor], count: int) -> dict[str, list[int]]:
    """Of each block the `count` units with the highest scores `[units]`, by number, in order.

    Of equal ones the first stay. Raises `ValueError` for a count below 1 or above what a block has.
    """
    kept = {}
    for name, of_block in scores.items():
        if not 1 <= count <= len(of_block):
            raise ValueError(
                f"{count} units of {name}, which has {len(of_block)}: keep at least 1 and at most all"
            )
        order = of_block.sort(descending=True, stable=True).indices
        kept[name] = sorted(order[:count].tolist())
    return kept


def keep_units(model: PreTrainedModel, kind: str, keep: Keep) -> PreTrainedModel:
    """A smaller copy of `model` with only the units `keep[block name]` of every block.

    The config says the new number where it can; `check_plain` tells whether it could. Raises
    `ValueError` for a block that is not there or not named, for none kept of a block, numbers that it
    does not have or that come twice, and numbers of units that differ from block to block.
    """
    names = [name for name, _ in blocks(model)]
    if unknown := sorted(set(keep) - set(names)):
        raise ValueError(f"no block {unknown[0]!r}: the model has {names[0]} to {names[-1]}")
    if missing := [name for name in names if name not in keep]:
        raise ValueError(f"nothing said about {missing[0]}: name the units to keep of every block")
    counts = {name: len(keep[name]) for name in names}
    if empty := [name for name, count in counts.items() if not count]:
        raise ValueError(
            f"all {kind} of {empty[0]} would go: keep at least one, or remove the layer (keep_layers)"
        )
    if len(set(counts.values())) > 1:
        other = next(name for name in names if counts[name] != counts[names[0]])
        raise ValueError(
            f"{counts[names[0]]} {kind} of {names[0]} and {counts[other]} of {other}: a plain config has one "
            "number for all layers, keep equally many of each"
        )
    smaller = copy.deepcopy(model)
    for name, block in blocks(smaller):
        shares = units_of(block, kind)
        _check_numbers(keep[name], len(shares[0].places), kind, name)
        for share in shares:
            places = share.places[sorted(keep[name])].flatten().sort().values
            _cut(block.get_submodule(share.layer), share.axis, places)
    _say(smaller, kind, counts[names[0]])
    return smaller


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A copy of `model` with only the blocks of these numbers, in their old order.

    Raises `ValueError` for no layers, a layer twice, and one that the model lacks.
    """
    names = [name for name, _ in blocks(model)]
    if not layers:
        raise ValueError("all layers would go: keep at least one")
    _check_numbers(layers, len(names), "layers", "the model")
    smaller = copy.deepcopy(model)
    parent = smaller.get_submodule(names[0].rpartition(".")[0])
    kept = [parent[number] for number in sorted(layers)]
    del parent[:]
    parent.extend(kept)
    for place, block in enumerate(kept):
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # the key-value cache is numbered by it
                module.layer_idx = place
    smaller.config.num_hidden_layers = len(kept)
    return smaller


def check_plain(model: PreTrainedModel) -> None:
    """Refuse a model whose tensors are not of the shapes that its own config makes.

    GPT-2's config has no number of heads apart from its width, so that fewer heads have no place in it.
    """
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config)).state_dict()
    found = model.state_dict()
    for name in plain | found:
        shapes = [list(state[name].shape) if name in state else None for state in (found, plain)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name} is {shapes[0]}, and {type(model.config).__name__} makes it {shapes[1]}: the "
                "smaller model has no plain config. Remove neurons or layers, for which it has one"
            )


def save_plain(model: PreTrainedModel, folder: Path) -> None:
    """Write `model` to `folder`, for `AutoModelForCausalLM.from_pretrained`; see `check_plain`."""
    check_plain(model)
    model.save_pretrained(folder)


def _neurons(block: nn.Module, writers: tuple[str, ...], reader: str) -> list[Share]:
    count = LinearLayer(reader, block.get_submodule(reader)).weight.shape[1]
    places = torch.arange(count)[:, None]  # [units, 1]
    return [*(Share(name, 0, places) for name in writers), Share(reader, 1, places)]


def _cut(module: nn.Module, axis: int, places: Tensor) -> None:
    """Keep only these rows (axis 0) or columns (axis 1) of a layer's weight `[out, in]`, and of its bias."""
    weight = LinearLayer("", module).weight
    places = places.to(weight.device)
    weight = weight.index_select(axis, places)
    stored = weight.T if isinstance(module, Conv1D) else weight
    module.weight = nn.Parameter(stored.contiguous(), requires_grad=module.weight.requires_grad)
    if axis == 0 and module.bias is not None:
        module.bias = nn.Parameter(module.bias.detach()[places], module.bias.requires_grad)
    if isinstance(module, Conv1D):
        module.nx, module.nf = weight.shape[1], weight.shape[0]
    else:
        module.out_features, module.in_features = weight.shape


def _say(model: PreTrainedModel, kind: str, count: int) -> None:
    """Tell the config, and the modules that hold numbers of their own, how many units there are now."""
    config = model.config
    for _, block in blocks(model):
        if type(block).__name__ == "GPT2Block":
            if kind == "neurons":
                config.n_inner = count
            else:
                block.attn.num_heads = count
                block.attn.split_size = count * block.attn.head_dim
        elif kind == "neurons":
            config.intermediate_size = block.mlp.intermediate_size = count
        else:
            config.num_key_value_heads = count
            config.num_attention_heads = count * block.self_attn.num_key_value_groups


def _check_numbers(numbers: Sequence[int], count: int, what: str, where: str) -> None:
    if len(set(numbers)) != len(numbers) or not set(numbers) <= set(range(count)):
        raise ValueError(
            f"{what} {list(numbers)[:8]} of {where}, which has {count}: name different ones from 0 to "
            f"{count - 1}"
        )
