"""GPTQ: column by column, each rounding error made up for by the columns that are still float.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323, algorithm 1 and section 4. What the paper leaves open follows the
authors' code (github.com/IST-DASLab/gptq). Built step by step in `chronology/gptq_demo`. Given the
same Hessian and float32 scales, codes and scales are those of GPTQModel, and with static groups those
of llm-compressor. Two grids differ: GPTQModel's symmetric one of a group without a negative weight (see
`GPTQ`), and llm-compressor's of a group of zeros.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from course_utils.compression.base import (
    Method,
    check_settings,
    check_weight,
    dequantized_linear,
)
from course_utils.compression.compensation import compensate
from course_utils.compression.hessian import Hessian, check_hessian, inverse_factor
from course_utils.grids.uniform import (
    code_range,
    dequantize,
    group_width,
    scale_and_zero_point,
    stored_scale,
)
from course_utils.kernels import GroupedCodes
from course_utils.quantizers.affine import AffineWeight


class GPTQCodes(NamedTuple):
    """What `gptq_codes` finds, in the order of the weight's own columns."""

    codes: Tensor  # uint8 [out, in]
    scale: Tensor  # float16 or float32 [out, groups]
    zero_point: Tensor  # int32 [out, groups]
    group_index: Tensor  # int32 [in]: the group of each column
    losses: Tensor  # [out, in], in the Hessian's dtype: what each rounding adds to the objective


@torch.no_grad()
def gptq_codes(
    weight: Tensor,
    hessian: Tensor,
    *,
    n_bits: int = 4,
    group_size: int | Literal["row"] = 128,
    symmetric: bool = False,
    act_order: bool = False,
    static_groups: bool = False,
    current_groups: bool = False,
    damping: float = 0.01,
    block_size: int = 128,
    scale_dtype: Literal["float16", "float32"] = "float16",
) -> GPTQCodes:
    """Codes of `weight` `[out, in]` under `hessian` `[in, in]` of its inputs. Algorithm 1.

    The settings are those of `GPTQ`. All is computed in the dtype of `hessian`: float32 repeats the
    authors' code, float64 is what `GPTQ` uses. A code is clamp(round(w / S) + Z), ties to even.

    An input feature that was always zero (0 on the Hessian's diagonal) gets a weight of 0, as in the
    authors' code, and 1 on the diagonal. The losses, ((w - q) / U_kk)^2 / 2 each, sum up to half the
    trace of dW H dW^T, the objective, with H damped and dW = W - Q, where W is 0 for dead features.

    Raises ValueError for a Hessian of another shape, with NaN or infinity, or not positive definite
    when damped; for groups that do not divide the columns; for scales that do not fit into float16.
    """
    check_weight(weight)
    columns = weight.shape[1]
    check_hessian(hessian, columns)
    size = group_width(group_size, columns)
    low, high = code_range(n_bits)
    find = partial(_grids, low=low, high=high, symmetric=symmetric, scale_dtype=scale_dtype)

    H = hessian.clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    # [out, in] as in the paper, each column in one piece of memory
    W = weight.T.to(H.dtype, copy=True, memory_format=torch.contiguous_format).T
    first_columns = ()  # those at which the loop finds a grid
    known = (
        find(W[:, None]) if group_size == "row" else None
    )  # with dead weights, as the authors do
    W[:, dead] = 0
    if static_groups and known is None:
        known = find(W.unflatten(1, (-1, size)))

    order = torch.arange(columns, device=W.device)
    group_of = order // size  # [in]: the group of each column in the loop
    if act_order:
        order = H.diagonal().argsort(descending=True, stable=True)
        W, H = W.T[order].T, H[order][:, order]
        group_of = group_of if known is None else order // size
    U = inverse_factor(H, damping)

    if known is None:
        empty = W.new_empty(len(W), columns // size, dtype=getattr(torch, scale_dtype))
        known = empty, torch.empty_like(empty, dtype=torch.int32)
        first_columns = range(0, columns, size)
    scale, zero_point = known  # [out, groups]
    # [groups, out, 1]: the grid of each group in one piece of memory
    S, Z = (grid.T.to(W.dtype).contiguous()[..., None] for grid in known)
    codes, groups = torch.empty_like(W, dtype=torch.uint8), group_of.tolist()

    def nearest(i: int, w: Tensor, pending: Tensor) -> Tensor:
        """Column i, `w` `[out, 1]`, on the grid of its group, which the group's first column may find."""
        g = groups[i]
        if i in first_columns:
            group = W[:, i : i + size]
            if current_groups:
                group = group - pending @ U[i - pending.shape[1] : i, i : i + size]
            scale[:, g], zero_point[:, g] = find(group)
            S[g, :, 0], Z[g, :, 0] = scale[:, g], zero_point[:, g]
        s, z = S[g], Z[g]  # [out, 1]
        q = (w / s).round_().add_(z).clamp_(low, high)
        codes[:, i : i + 1] = q
        return q.sub_(z).mul_(s)

    errors = compensate(W, U, nearest, block_size=block_size)

    back = order.argsort()
    return GPTQCodes(
        codes.T[back].T.contiguous(),
        scale,
        zero_point,
        group_of[back].int(),
        errors.T[back].T.square_().mul_(0.5),
    )


@dataclass(frozen=True)
class GPTQWeight(AffineWeight):
    """Codes with a grid for each group; `group_index` where a group's columns are not neighbours."""

    group_index: Tensor | None = None  # int32 [in]: the group of each column

    def grouped(self) -> GroupedCodes | None:
        """As `AffineWeight`'s; None where a group's columns are scattered, which no kernel reads."""
        return super().grouped() if self.group_index is None else None

    def dequantize(self) -> Tensor:
        """The weight `[out, in]` in float32: S (q - Z)."""
        if self.group_index is None:
            return super().dequantize()
        scale, zero_point = self.scale[:, self.group_index], self.zero_points()[:, self.group_index]
        return dequantize(self.integer_codes(), scale, zero_point)


@dataclass(frozen=True)
class GPTQ(Method):
    """GPTQ on the Hessian of each layer's inputs, which come from the quantized blocks before.

    `n_bits`: 2 to 8. `group_size`: how many columns of a row share a scale, or "row": all of them.
    `symmetric`: the zero point is the middle code, and none is stored; S = 2 max|w| / (2^n_bits - 1).
    (For a group without a negative weight the authors' code has half of that, and clips.)
    `act_order`: columns with large inputs first, by the Hessian's diagonal. Groups are made of
    columns in that order, and the group of each column is stored, unless `static_groups`.
    `static_groups`: all grids are found on the float weight, before any error is made up for.
    Otherwise a group's grid is found when its first column is reached. The authors' code looks at the
    weights as the last full block left them then, so groups that begin inside a block get a grid that
    is out of date, and the block size matters; so it is here, and in GPTQModel. `current_groups`
    takes the weights as they are at that moment.
    `damping`: share of the Hessian's mean diagonal that is added to it. `block_size`: columns after
    which the errors move on to the columns behind; without groups it changes no code.
    `scale_dtype`: how scales are stored; codes are computed with the scale as stored.
    """

    n_bits: int = 4
    group_size: int | Literal["row"] = 128
    symmetric: bool = False
    act_order: bool = False
    static_groups: bool = False
    current_groups: bool = False
    damping: float = 0.01
    block_size: int = 128
    scale_dtype: Literal["float16", "float32"] = "float16"
    name: ClassVar[str] = "gptq"
    weight_type: ClassVar[type] = GPTQWeight

    def __post_init__(self):
        check_settings(self, wide_groups=("row",))
        if type(self.block_size) is not int or self.block_size < 1:
            raise ValueError(f"block_size {self.block_size!r}: choose a positive number")
        if self.static_groups and self.current_groups:
            raise ValueError(
                "static_groups takes the grids from the float weight, current_groups from the weights "
                "of the moment: choose one of them"
            )
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping {self.damping} must be 0 or positive; the paper's is 0.01")

    def check_shape(self, out: int, columns: int) -> None:
        """Refuse columns that groups of this size do not divide."""
        group_width(self.group_size, columns)

    @property
    def wants_statistics(self) -> bool:
        """Always: the Hessian."""
        return True

    def new_statistics(self, in_features: int, device: torch.device) -> Hessian:
        """The Hessian, still without inputs."""
        return Hessian(in_features, device)

    def quantize(self, weight: Tensor, statistics: Hessian | None = None) -> GPTQWeight:
        """Codes of `weight` `[out, in]`, computed in float64."""
        check_weight(weight)
        if statistics is None:
            raise ValueError(
                "GPTQ needs the Hessian of the layer's inputs: give quantize_model some calibration"
            )
        found = gptq_codes(weight, statistics.matrix(), **asdict(self))
        zero_point = None if self.symmetric else found.zero_point
        stored = GPTQWeight.from_codes(found.codes, found.scale, zero_point, self.n_bits)
        scattered = self.act_order and not self.static_groups and found.scale.shape[1] > 1
        return replace(stored, group_index=found.group_index if scattered else None)

    def output_error(
        self, weight: Tensor, approximation: Tensor, statistics: Hessian
    ) -> float | None:
        """The Hessian tells it: no need to run the block again."""
        return statistics.relative_error(weight.float(), approximation)

    def linear(self, x: Tensor, weight: GPTQWeight, bias: Tensor | None) -> Tensor:
        """`x @ W.T + bias`, for `x` `[tokens, in]`, with the dequantized weight."""
        return dequantized_linear(x, weight, bias)


def _grids(
    groups: Tensor, low: int, high: int, symmetric: bool, scale_dtype: str
) -> tuple[Tensor, Tensor]:
    """Scale, as it is stored, and zero point of each of `groups` `[out, ..., weights]`, both `[out, ...]`.

    A group of zeros gets the range -1..1, as in the authors' code.
    """
    minimum, maximum = groups.aminmax(dim=-1)
    empty = (minimum == 0) & (maximum == 0)
    minimum, maximum = minimum.where(~empty, -1), maximum.where(~empty, 1)
    scale, zero_point = scale_and_zero_point(minimum, maximum, low, high, symmetric=symmetric)
    return stored_scale(scale, scale_dtype), zero_point
