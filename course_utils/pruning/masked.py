"""Masks that hold while a model is trained.

An optimizer moves all weights, removed ones too: momentum and a gradient at zero suffice. So a layer computes
with W * mask as long as its mask is held (`torch.nn.utils.parametrize`, as `torch.nn.utils.prune` did by
hooks of its own): removed weights are zero after every step, and get no gradient.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from course_utils.models.walk import LinearLayer, linear_layers


class Masked(nn.Module):
    """W * mask, for a weight and a mask (bool) of the same shape; the mask is a buffer."""

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with zeros where the mask has them."""
        return weight * self.mask


@torch.no_grad()
def hold_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zero what `masks` (bool `[out, in]`, by the names of `linear_layers`) remove, and keep it at zero.

    A mask that is held already gives way to the new one: a weight that comes back starts at zero. Names in
    the state dict change (`parametrizations.weight.original`, and the mask beside it) until
    `release_masks`, so release before `save_pretrained` and `quantize_model`.

    Raises `ValueError` for no masks, a name that is no float linear layer of the model, a mask of another
    shape or dtype, and a weight that another layer has as well; the model is whole then.
    """
    if not masks:
        raise ValueError("the mapping of layers to masks is empty: name at least one layer")
    layers = {layer.name: layer for layer in linear_layers(model)}
    for name, mask in masks.items():
        if name not in layers:
            raise ValueError(
                f"the model has no float linear layer {name!r}: linear_layers(model) lists all"
            )
        _check(layers[name], mask)
        _check_untied(model, name)
    for name, mask in masks.items():
        module = layers[name].module
        stored = (mask.T if isinstance(module, Conv1D) else mask).to(module.weight.device)
        if held := _held(module):
            held.mask = stored
        else:
            parametrize.register_parametrization(module, "weight", Masked(stored))
        module.parametrizations.weight.original.mul_(stored)


def release_masks(model: nn.Module) -> None:
    """Make plain parameters of all weights whose masks are held, with zeros where these have them."""
    for module in list(model.modules()):
        if _held(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The mask (bool `[out, in]`) of every linear layer: False where its weight is exactly zero.

    So a model that was pruned and loaded again is given its masks back:
    `hold_masks(model, masks_of(model))`. A weight that stays and happens to be zero counts as removed.
    """
    return {layer.name: layer.weight != 0 for layer in linear_layers(model)}


def _held(module: nn.Module) -> Masked | None:
    """The mask held by a module's weight, if there is one."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    first = module.parametrizations.weight[0]
    return first if isinstance(first, Masked) else None


def _check(layer: LinearLayer, mask: Tensor) -> None:
    if parametrize.is_parametrized(layer.module, "weight") and not _held(layer.module):
        raise ValueError(
            f"layer {layer.name}: its weight is computed from another already: remove that "
            "parametrization first"
        )
    if mask.shape != layer.weight.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"layer {layer.name}: its mask is bool {list(layer.weight.shape)}, got {mask.dtype} "
            f"{list(mask.shape)}"
        )


def _check_untied(model: nn.Module, name: str) -> None:
    """Refuse a weight that stands in two places: one would lose weights, and the other keep them."""
    weight = model.get_submodule(name)._parameters.get(
        "weight"
    )  # None where a mask is held already
    parameters = model.named_parameters(remove_duplicate=False)
    others = [at for at, p in parameters if p is weight and at != f"{name}.weight"]
    if others:
        raise ValueError(
            f"layer {name}: its weight is {', '.join(others)} as well, which would not be pruned with it: "
            "give each a copy of its own, or leave the layer out"
        )
