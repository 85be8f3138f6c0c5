"""Methods that round several columns at once, with or without making up for the errors.

What vector codebooks, the E8 lattice and the trellis share: a scale for each row, so that the rows look like
draws of one distribution, and the column loop in steps as wide as a code.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from course_utils.compression.base import Method, QuantizedWeight, dequantized_linear
from course_utils.compression.compensation import compensate
from course_utils.compression.hessian import Hessian, inverse_factor
from course_utils.grids.uniform import stored_scale

BLOCK = 128  # columns after which errors move on to the columns behind; it changes no code

# (first column, those columns [out, width] in float32, metric [width, width]) -> what they become, likewise.
# |(w - q) metric|^2 is what the step adds to the objective.
Choice = Callable[[int, Tensor, Tensor], Tensor]


def row_scale(weight: Tensor, scale_dtype: Literal["float16", "float32"]) -> Tensor:
    """The root mean square of each row of `weight` `[out, in]`, as it is stored: `[out]`; 0 for zeros."""
    return stored_scale(weight.float().square().mean(1).sqrt(), scale_dtype)


def divisor(scale: Tensor) -> Tensor:
    """`scale` `[out]` as float32 `[out, 1]` to divide rows by: 1 where it is 0."""
    scale = scale.float()
    return scale.where(scale > 0, 1.0)[:, None]


@torch.no_grad()
def compensated(
    weight: Tensor, statistics: Hessian, choose: Choice, *, width: int, damping: float
) -> None:
    """Let `choose` round the columns of `weight` `[out, in]`, `width` at a time, by the column loop.

    A step sees its columns as the steps before have moved them to make up for their errors. Computed in
    float64. Columns of inputs that were always 0 become 0 first.
    """
    H = statistics.matrix()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    # [out, in], each column in one piece of memory
    W = weight.T.to(H.dtype, copy=True, memory_format=torch.contiguous_format).T
    W[:, dead] = 0
    U = inverse_factor(H, damping)
    eye = torch.eye(width, dtype=U.dtype, device=U.device)

    def rounding(i: int, w: Tensor, pending: Tensor) -> Tensor:
        metric = torch.linalg.solve_triangular(U[i : i + width, i : i + width], eye, upper=True)
        return choose(i, w.float(), metric.float()).to(w)

    compensate(W, U, rounding, width=width, block_size=width * max(1, BLOCK // width))


class HessianMethod(Method):
    """A method that looks at inputs through their Hessian, where its settings ask for that."""

    @property
    def uses_hessian(self) -> bool:
        """Whether the settings ask for calibration."""
        raise NotImplementedError

    @property
    def wants_statistics(self) -> bool:
        """Where the settings ask for it: the Hessian."""
        return self.uses_hessian

    def new_statistics(self, in_features: int, device: torch.device) -> Hessian:
        """The Hessian, still without inputs."""
        return Hessian(in_features, device)

    def check_statistics(self, statistics: Hessian | None) -> None:
        """Refuse to quantize without the Hessian that the settings ask for."""
        if self.uses_hessian and statistics is None:
            raise ValueError(
                f"{self} needs the Hessian of the layer's inputs: give quantize_model some calibration"
            )

    def output_error(
        self, weight: Tensor, approximation: Tensor, statistics: Hessian
    ) -> float | None:
        """The Hessian tells it: no need to run the block again."""
        return statistics.relative_error(weight.float(), approximation)

    def linear(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        """`x @ W.T + bias`, for `x` `[tokens, in]`, with the decoded weight."""
        return dequantized_linear(x, weight, bias)
