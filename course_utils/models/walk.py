"""Walking the linear layers of a language model, whatever class holds them.

GPT-2 keeps its weights in `Conv1D` modules as `[in, out]`; everywhere else it is `[out, in]`. This
module is the one place of the course that knows.
"""

from dataclasses import dataclass

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
    """Linear layers of `model` in its own order, without the LM head.

    The head is left out as in the papers of all the methods here; embeddings are no linear layers.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        LinearLayer(name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of `model`'s submodule `name` (dotted path)."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
