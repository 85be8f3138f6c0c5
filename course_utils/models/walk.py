"""Walking a language model: its linear layers, its decoder blocks, and what goes from block to block.

GPT-2 keeps its weights in `Conv1D` modules as `[in, out]`; everywhere else it is `[out, in]`. This
module is the one place of the course that knows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer of a model: `y = x @ weight.T + bias`."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """The weight `[out, in]`: a view of the module's parameter, whichever way it is stored."""
        weight = self.module.weight.detach()
        return weight.T if isinstance(self.module, Conv1D) else weight

    @property
    def bias(self) -> Tensor | None:
        """The bias `[out]`, or None."""
        return None if self.module.bias is None else self.module.bias.detach()


def linear_layers(model: nn.Module) -> list[LinearLayer]:
    """Linear layers of `model`, or of one block of it, in its own order, without the LM head.

    The head is left out as in the papers of all the methods here; embeddings are no linear layers, and no
    more are classes that compute otherwise, though they derive from one (Llama 4's router).
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        LinearLayer(name, module)
        for name, module in model.named_modules()
        if _is_linear(module) and module is not head
    ]


def _is_linear(module: nn.Module) -> bool:
    """Whether it computes `x @ weight.T + bias`; Falcon's class does so in a forward of its own."""
    plain = type(module).forward in (nn.Linear.forward, Conv1D.forward)
    return plain or type(module).__name__ == "FalconLinear"


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of `model`'s submodule `name` (dotted path)."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder blocks of `model` with their names, first to last.

    They are the model's one `nn.ModuleList` that lies in no other. Raises `ValueError` where there is
    none or more than one, or where the blocks are not all called alike (sliding windows in some).
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside:
            lists[name] = module
    if len(lists) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(lists)} lists of modules ({', '.join(lists)}): the decoder "
            "blocks are looked for in the only one there is."
        )
    kinds = set(getattr(getattr(model, "config", None), "layer_types", None) or ())
    if len(kinds) > 1:
        raise ValueError(
            f"the blocks of {type(model).__name__} are of several kinds ({', '.join(sorted(kinds))}): "
            "only models whose blocks all get the same masks are walked block by block."
        )
    [(name, modules)] = lists.items()
    return [(f"{name}.{i}", block) for i, block in enumerate(modules)]


class Call(NamedTuple):
    """One call of a module: what it got, by position and by name, and what it returned."""

    args: tuple
    kwargs: dict
    output: object


class BlockInputs:
    """What a decoder block is called with, on every calibration sequence.

    `hidden` `[sequences, length, width]` are the hidden states. All sequences are of one length, and
    none is padded, so what else a block gets (masks, positions, rotary embeddings) is the same for all
    of them, and for all blocks. `sequence` counts those that a block is running on, from 1.
    """

    def __init__(self, hidden: Tensor, args: tuple, kwargs: dict):
        self.hidden, self.args, self.kwargs = hidden, args, kwargs
        self.sequence = 0

    @classmethod
    @torch.no_grad()
    def of_first_block(cls, model: nn.Module, tokens: Tensor) -> "BlockInputs":
        """Inputs of the first block of `model` on `tokens` `[sequences, length]`; nothing else is run."""
        _, first = blocks(model)[0]
        hidden, others = None, ()
        sequences = iter(range(len(tokens)))

        def keep(_, args: tuple, kwargs: dict):
            nonlocal hidden, others
            if (
                hidden is None
            ):  # at once as large as it gets: joining parts would need twice the memory
                hidden = args[0].new_empty(len(tokens), *args[0].shape[1:])
            hidden[next(sequences)] = args[0][0]
            others = (args[1:], kwargs)
            raise _FirstBlockReached

        device = next(model.parameters()).device
        handle = first.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            for sequence in tokens:
                try:
                    # A cache would grow with every call of a block.
                    model(input_ids=sequence[None].to(device), use_cache=False)
                except _FirstBlockReached:
                    continue
        finally:
            handle.remove()
        return cls(hidden, *others)

    def outputs(self, block: nn.Module) -> Iterator[Tensor]:
        """Hidden states `[1, length, width]` that leave `block`, one sequence after the other."""
        for number, hidden in enumerate(self.hidden.split(1), 1):
            self.sequence = number
            yield hidden_states(block(hidden, *self.args, **self.kwargs))

    def calls(self, block: nn.Module, name: str) -> Iterator[Call]:
        """The calls of `block`'s submodule `name` (dotted path), one sequence after the other.

        No more than one sequence's are held. What a call got and returned are the very tensors, so
        `block.get_submodule(name)(*call.args, **call.kwargs)` repeats it.
        """
        outputs = self.outputs(block)
        while True:
            seen: list[Call] = []
            # Watched while the block runs, and no longer: who gets the calls may call the module too.
            handle = block.get_submodule(name).register_forward_hook(
                lambda _, args, kwargs, output, seen=seen: seen.append(Call(args, kwargs, output)),
                with_kwargs=True,
            )
            try:
                ended = next(outputs, None) is None
            finally:
                handle.remove()
            if ended:
                return
            yield from seen

    def advance(self, block: nn.Module) -> None:
        """Become the inputs of the block after `block`, in the same memory."""
        for hidden, output in zip(self.hidden.split(1), self.outputs(block), strict=True):
            hidden.copy_(output)


def layer_input(args: tuple, kwargs: dict) -> Tensor:
    """What a linear layer is called with, by position or by keyword."""
    return args[0] if args else next(iter(kwargs.values()))


def hidden_states(output: object) -> Tensor:
    """Of what a block returns, the hidden states: the tensor, or the first of a tuple or list."""
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"a block returned a {type(output).__name__}: hidden states are a tensor, or a tuple's first."
        )
    return hidden


class _FirstBlockReached(Exception):
    """Ends a forward pass at its first block."""
