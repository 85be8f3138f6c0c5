"""SparseGPT: column by column, what a removed weight did is made up for by the columns behind it.

Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
arXiv 2301.00774, algorithm 1: GPTQ's column loop, in which a weight becomes zero or stays, instead of
becoming a code. What the paper leaves open follows the authors' code (github.com/IST-DASLab/sparsegpt),
but for the count: their comparison with a threshold removes a weight more than asked from each block, and
one at sparsity 0. Here `n_zeros` of the layer's weights go, exactly. Built step by step in
`pruning/one_shot_pruning`. The paper's joint mode, which rounds the weights that stay in the same pass, is
`to_grid` here and the method `quantizers/sparse_gptq`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from course_utils.compression.base import check_weight
from course_utils.compression.compensation import compensate
from course_utils.compression.hessian import Hessian, check_hessian, inverse_factor
from course_utils.pruning.base import PruningMethod
from course_utils.pruning.masks import (
    check_pattern,
    check_setting,
    n_m,
    n_m_mask,
    n_zeros,
    without_lowest,
)
from course_utils.pruning.sparse import BitmaskWeight, TwoFourWeight, check_mask

# (column, its weights [out, 1]) -> what they become where they stay, [out, 1]
ToGrid = Callable[[int, Tensor], Tensor]


class Pruned(NamedTuple):
    """What `sparsegpt` finds."""

    weight: Tensor  # [out, in] in the Hessian's dtype, zero where the mask is False
    mask: Tensor  # bool [out, in], True where a weight stays
    losses: Tensor  # [out, in]: what each removal, or rounding, adds to the objective


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float | str | Tensor,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    to_grid: ToGrid | None = None,
) -> Pruned:
    """Prune `weight` `[out, in]` under `hessian` `[in, in]` of its inputs. Algorithm 1.

    A share of the weights goes block by block: at the first column of each `block_size` the lowest
    w^2 / U_jj^2 of the block, over all rows. So rows may lose more or fewer. For a pattern "n:m" the same
    is decided at every m-th column, in each row, by the weights as they are at that moment. A `sparsity`
    that is a mask (bool `[out, in]`, True where a weight stays) was decided before: only errors move.
    `to_grid` rounds the weights of a column that stay, and the columns behind make up for that as well. All
    is computed in the dtype of `hessian`; the authors take float32, `SparseGPT` float64.

    An input feature that was always zero loses its weights, as in the authors' code, and has 1 on the
    Hessian's diagonal. The losses, ((w - q) / U_kk)^2 / 2 of each w that becomes q, sum up to half the trace
    of dW H dW^T, H damped and dW = W - Q, where W is 0 for dead features.

    Raises ValueError for a Hessian of another shape, with NaN or infinity, or not positive definite when
    damped; for a sparsity that is none, or a mask of another shape; for an m that does not divide columns.
    """
    check_weight(weight)
    given = isinstance(sparsity, Tensor)
    if given:
        check_mask(weight, sparsity)
    else:
        check_setting(sparsity)
    out, columns = weight.shape
    check_hessian(hessian, columns)
    H = hessian.clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    # [out, in] as in the paper, each column in one piece of memory
    W = weight.T.to(H.dtype, copy=True, memory_format=torch.contiguous_format).T
    W[:, dead] = 0
    U = inverse_factor(H, damping)
    Q = torch.empty_like(W)
    mask = sparsity.clone() if given else torch.empty_like(W, dtype=torch.bool)

    def scores(i: int, stop: int, pending: Tensor) -> Tensor:
        """w^2 / U_jj^2 of the columns from i on, as the columns before have left them."""
        now = W[:, i:stop] - pending @ U[i - pending.shape[1] : i, i:stop]
        return (now / U.diagonal()[i:stop]).square()

    if isinstance(sparsity, str):
        check_pattern(sparsity, columns)
        _, step = n_m(sparsity)
    else:
        step = block_size

    def choose(i: int, pending: Tensor) -> Tensor:
        """The mask of the step's columns from i on."""
        stop = min(i + step, columns)
        if isinstance(sparsity, str):
            return n_m_mask(scores(i, stop, pending), sparsity)
        zeros = n_zeros(out * stop, sparsity) - n_zeros(out * i, sparsity)  # exact over all blocks
        found = scores(i, stop, pending)
        return without_lowest(found.flatten(), zeros).view(found.shape)

    def keep_or_zero(i: int, w: Tensor, pending: Tensor) -> Tensor:
        """Column i, `w` `[out, 1]`, with zeros where its step's mask has them."""
        if i % step == 0 and not given:
            mask[:, i : i + step] = choose(i, pending)
        kept = w if to_grid is None else to_grid(i, w)
        q = kept.where(mask[:, i : i + 1], 0)
        Q[:, i : i + 1] = q
        return q

    errors = compensate(W, U, keep_or_zero, block_size=block_size)
    return Pruned(Q.contiguous(), mask.contiguous(), errors.square().div(2).contiguous())


@dataclass(frozen=True)
class SparseGPT(PruningMethod):
    """Remove a share of a layer's weights, or a pattern as "2:4", and let those that stay make up for it.

    `damping`: share of the Hessian's mean diagonal that is added to it. `block_size`: columns of which a
    share is chosen together, and after which the errors move on; with a pattern it changes nothing but
    time.
    """

    damping: float = 0.01
    block_size: int = 128
    name: ClassVar[str] = "sparsegpt"

    def __post_init__(self):
        super().__post_init__()
        if type(self.block_size) is not int or self.block_size < 1:
            raise ValueError(f"block_size {self.block_size!r}: choose a positive number")
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping {self.damping} must be 0 or positive; the paper's is 0.01")

    @property
    def wants_statistics(self) -> bool:
        """Always: the Hessian."""
        return True

    def new_statistics(self, in_features: int, device: torch.device) -> Hessian:
        """The Hessian, still without inputs."""
        return Hessian(in_features, device)

    def quantize(
        self, weight: Tensor, statistics: Hessian | None = None
    ) -> BitmaskWeight | TwoFourWeight:
        """What is left of `weight` `[out, in]`, computed in float64."""
        check_weight(weight)
        if statistics is None:
            raise ValueError(
                "SparseGPT needs the Hessian of the layer's inputs: give quantize_model some calibration"
            )
        found = sparsegpt(
            weight,
            statistics.matrix(),
            self.sparsity,
            damping=self.damping,
            block_size=self.block_size,
        )
        return self.stored(found.weight, found.mask)

    def output_error(
        self, weight: Tensor, approximation: Tensor, statistics: Hessian
    ) -> float | None:
        """The Hessian tells it: no need to run the block again."""
        return statistics.relative_error(weight.float(), approximation)
