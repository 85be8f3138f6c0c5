"""Wanda: a weight counts by its magnitude times the norm of the input feature that it multiplies.

Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695,
section 3. Scores are compared within a row, and the weights that stay are not changed. Two points differ
from the authors' code (github.com/locuslab/wanda): squares are summed up in float64 over all tokens, where
they average float32 sums over sequences; a share that gives no whole number of a row's weights is rounded,
where they cut it off. Left out: their variant with a threshold of its own for each row.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from course_utils.compression.base import all_finite, check_weight
from course_utils.pruning.base import PruningMethod
from course_utils.pruning.masks import mask_for
from course_utils.pruning.sparse import BitmaskWeight, TwoFourWeight


class InputNorms:
    """|X_j|, the L2 norm of each input feature j over all tokens seen. Squares are summed up in float64."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu"):
        self.tokens = self.batches = 0
        self._squares = torch.zeros(in_features, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        """Take in a batch of inputs `x` `[tokens, in]`; ValueError if some are NaN or infinite."""
        self.batches += 1
        if not all_finite(x):
            raise ValueError(
                f"calibration batch {self.batches}: {int((~x.isfinite()).sum())} of {x.numel()} "
                f"inputs are NaN or infinite in {x.dtype}. Repair the checkpoint, or load the model "
                "in a wider dtype."
            )
        self._squares += x.double().square().sum(0)
        self.tokens += len(x)

    def norms(self) -> Tensor:
        """Float64 `[in]`; ValueError if there were no inputs, or none but zeros."""
        if not self.tokens:
            raise ValueError(
                "the norms have seen no inputs: the calibration is empty, or the layer never ran. Give more "
                "calibration, or leave the layer out"
            )
        if not self._squares.any():
            raise ValueError(
                f"all {self.tokens} calibration inputs are zero: nothing tells which weights matter. Look "
                "for what blocks the layer's inputs, or leave the layer out"
            )
        return self._squares.sqrt()


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """|W_ij| |X_j| `[out, in]`, in the dtype of `norms` `[in]`: equation 1.

    It is how far the output moves, over all tokens, if this weight alone goes. ValueError for norms of
    another width.
    """
    if norms.shape != weight.shape[1:]:
        raise ValueError(
            f"a weight with {weight.shape[1]} columns takes norms [{weight.shape[1]}], got "
            f"{list(norms.shape)}: gather them from this layer's inputs"
        )
    return weight.abs().to(norms.dtype) * norms


@dataclass(frozen=True)
class Wanda(PruningMethod):
    """Remove of each row the weights of lowest score: a share of them, or a pattern as "2:4"."""

    name: ClassVar[str] = "wanda"

    @property
    def wants_statistics(self) -> bool:
        """Always: the norms of the inputs."""
        return True

    def new_statistics(self, in_features: int, device: torch.device) -> InputNorms:
        """The norms, still without inputs."""
        return InputNorms(in_features, device)

    def quantize(
        self, weight: Tensor, statistics: InputNorms | None = None
    ) -> BitmaskWeight | TwoFourWeight:
        """What is left of `weight` `[out, in]`."""
        check_weight(weight)
        if statistics is None:
            raise ValueError(
                "Wanda needs the norms of the layer's inputs: give quantize_model some calibration"
            )
        mask = mask_for(wanda_scores(weight, statistics.norms()), self.sparsity)
        return self.stored(weight, mask)
