"""What the pruning methods share: their settings, what they store, and how they multiply."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from course_utils.compression.base import Method, dequantized_linear
from course_utils.pruning.masks import check_pattern, check_setting
from course_utils.pruning.sparse import BitmaskWeight, TwoFourWeight, weight_class


@dataclass(frozen=True)
class PruningMethod(Method):
    """A method that removes a share of a layer's weights, or a pattern as "2:4".

    `value_dtype`: how the weights that stay are stored; float32 keeps them bit for bit.
    """

    sparsity: float | str = 0.5
    value_dtype: Literal["float16", "float32"] = "float16"

    def __post_init__(self):
        check_setting(self.sparsity)
        if self.value_dtype not in ("float16", "float32"):
            raise ValueError(f"value_dtype {self.value_dtype!r}: choose one of float16, float32")

    @property
    def weight_type(self) -> type:
        """2:4 has a class of its own."""
        return weight_class(self.sparsity)

    def check_shape(self, out: int, columns: int) -> None:
        """Refuse columns that a pattern does not divide."""
        if isinstance(self.sparsity, str):
            check_pattern(self.sparsity, columns)

    def stored(self, weight: Tensor, mask: Tensor) -> BitmaskWeight | TwoFourWeight:
        """`weight` `[out, in]` under `mask`, in the class that fits the setting."""
        return self.weight_type.from_mask(weight, mask, self.value_dtype)

    def linear(self, x: Tensor, weight: BitmaskWeight | TwoFourWeight, bias: Tensor | None):
        """`x @ W.T + bias`, for `x` `[tokens, in]`, with the decoded weight."""
        return dequantized_linear(x, weight, bias)
