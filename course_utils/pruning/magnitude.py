"""Magnitude pruning: the smallest weights of a layer go, and inputs are not looked at.

Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", arXiv 1506.02626,
without its training afterwards (`gradual` has training). The baseline of SparseGPT and Wanda. Built in
`pruning/pruning_demo`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from course_utils.compression.base import check_weight
from course_utils.models.walk import linear_layers
from course_utils.pruning.base import PruningMethod
from course_utils.pruning.masks import global_masks, layer_mask, mask_for
from course_utils.pruning.sparse import BitmaskWeight, TwoFourWeight


@dataclass(frozen=True)
class Magnitude(PruningMethod):
    """Remove the weights of smallest magnitude: a share of them, or a pattern as "2:4".

    `within`: a share is taken from the whole layer, as in the papers' baseline, or from each row. A pattern
    compares m neighbours in any case. For a share of all layers together, give each the share that
    `magnitude_masks` finds for it.
    """

    within: Literal["layer", "row"] = "layer"
    name: ClassVar[str] = "magnitude"

    def __post_init__(self):
        super().__post_init__()
        if self.within not in ("layer", "row"):
            raise ValueError(f"within {self.within!r}: choose 'layer' or 'row'")

    def quantize(self, weight: Tensor, statistics: None = None) -> BitmaskWeight | TwoFourWeight:
        """What is left of `weight` `[out, in]`."""
        check_weight(weight)
        by_layer = self.within == "layer" and not isinstance(self.sparsity, str)
        mask = (layer_mask if by_layer else mask_for)(weight.abs(), self.sparsity)
        return self.stored(weight, mask)


def magnitude_masks(
    model: nn.Module, sparsity: float, *, across: Literal["layer", "model"] = "layer"
) -> dict[str, Tensor]:
    """Masks (bool `[out, in]`) of all linear layers of `model`, by their names; low |W| goes.

    `across`: of each layer goes the same share, or the smallest of all layers together. Raises
    `ValueError` for another word, a share outside [0, 1), and a model without float linear layers.
    """
    scores = {layer.name: layer.weight.abs() for layer in linear_layers(model)}
    if not scores:
        raise ValueError("the model has no float linear layer left: is it quantized already?")
    if across == "model":
        return global_masks(scores, sparsity)
    if across != "layer":
        raise ValueError(f"across {across!r}: choose 'layer' or 'model'")
    return {name: layer_mask(of_layer, sparsity) for name, of_layer in scores.items()}
