"""Magnitude pruning: the smallest weights of a layer go, and inputs are not looked at.

Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", arXiv 1506.02626,
without its training afterwards. The baseline of SparseGPT and Wanda.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from course_utils.compression.base import Method, check_weight, dequantized_linear
from course_utils.pruning.masks import check_pattern, check_setting, layer_mask, mask_for
from course_utils.pruning.sparse import BitmaskWeight, TwoFourWeight, store, weight_class


@dataclass(frozen=True)
class Magnitude(Method):
    """Remove the weights of smallest magnitude: a share of them, or a pattern as "2:4".

    `within`: a share is taken from the whole layer, as in the papers' baseline, or from each row. A pattern
    compares m neighbours in any case. `value_dtype`: how those that stay are stored; float32 keeps them
    bit for bit. For a share of all layers together, give each the share that `global_masks` finds for it.
    """

    sparsity: float | str = 0.5
    within: Literal["layer", "row"] = "layer"
    value_dtype: Literal["float16", "float32"] = "float16"
    name: ClassVar[str] = "magnitude"

    def __post_init__(self):
        check_setting(self.sparsity)
        check_dtype(self.value_dtype)
        if self.within not in ("layer", "row"):
            raise ValueError(f"within {self.within!r}: choose 'layer' or 'row'")

    @property
    def weight_type(self) -> type:
        """2:4 has a class of its own."""
        return weight_class(self.sparsity)

    def check_shape(self, out: int, columns: int) -> None:
        """Refuse columns that a pattern does not divide."""
        if isinstance(self.sparsity, str):
            check_pattern(self.sparsity, columns)

    def quantize(self, weight: Tensor, statistics: None = None) -> BitmaskWeight | TwoFourWeight:
        """What is left of `weight` `[out, in]`."""
        check_weight(weight)
        by_layer = self.within == "layer" and not isinstance(self.sparsity, str)
        mask = (layer_mask if by_layer else mask_for)(weight.abs(), self.sparsity)
        return store(weight, mask, self.sparsity, self.value_dtype)

    def linear(self, x: Tensor, weight: BitmaskWeight | TwoFourWeight, bias: Tensor | None):
        """`x @ W.T + bias`, for `x` `[tokens, in]`, with the decoded weight."""
        return dequantized_linear(x, weight, bias)


def check_dtype(value_dtype: str) -> None:
    """Refuse a dtype in which no values are stored."""
    if value_dtype not in ("float16", "float32"):
        raise ValueError(f"value_dtype {value_dtype!r}: choose one of float16, float32")
