"""GPTQ: column by column, each rounding error made up for by the columns that are still float.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323, algorithm 1 and section 4. What the paper leaves open follows the
authors' code (github.com/IST-DASLab/gptq). Built step by step in `chronology/gptq_demo`. Given the
same Hessian and float32 scales, codes and scales are those of GPTQModel, and with static groups those
of llm-compressor. Two grids differ: GPTQModel's symmetric one of a group without a negative weight (see
`GPTQ`), and llm-compressor's of a group of zeros.
"""

import warnings
from dataclasses import asdict, dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from course_utils.quantizers.affine import AffineWeight
from course_utils.quantizers.base import (
    Method,
    all_finite,
    check_switches,
    check_weight,
    dequantized_linear,
    register,
)
from course_utils.quantizers.grid import (
    check_settings,
    code_range,
    dequantize,
    group_width,
    scale_and_zero_point,
    stored_scale,
)

STRIP = 192  # rows of the Hessian that are added to at once: small ones leave out more of its upper half


class Hessian:
    """H = 2/n sum x x^T over all n tokens x of a layer's inputs: of |W x - Q x|^2, in any row of W.

    Summed up in float64, the half below the diagonal only, since H is symmetric. The factor 2/n
    changes no code (unless some features are dead: the diagonal of those becomes 1, whatever the
    others are, as in the authors' code).
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu"):
        self.tokens = self.batches = self._complete = 0
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        """Take in a batch of inputs `x` `[tokens, in]`; ValueError if some are NaN or infinite."""
        self.batches += 1
        if not all_finite(x):
            raise ValueError(
                f"calibration batch {self.batches}: {int((~x.isfinite()).sum())} of {x.numel()} "
                f"inputs are NaN or infinite in {x.dtype}. Repair the checkpoint, or load the model "
                "in a wider dtype."
            )
        x = x.double()
        for start in range(0, x.shape[1], STRIP):
            stop = start + STRIP
            self._sum[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])
        self.tokens += len(x)

    def matrix(self) -> Tensor:
        """The Hessian (float64 `[in, in]`).

        Raises ValueError if there were no inputs, or none but zeros. Warns of fewer tokens than
        features: H is singular then, and what the calibration does not show, damping alone decides.
        """
        features = len(self._sum)
        if not self.tokens:
            raise ValueError(
                "the Hessian has seen no inputs: the calibration is empty, or the layer never ran. Give more "
                "calibration, or leave the layer out"
            )
        if not self._sum.diagonal().any():
            raise ValueError(
                f"all {self.tokens} calibration inputs are zero: nothing tells which weights "
                "matter. Look for what blocks the layer's inputs, or leave the layer out"
            )
        if self.tokens < features:
            warnings.warn(
                f"the Hessian of {features} features comes from {self.tokens} calibration tokens "
                "only, so it is singular and rests on its damping: give at least "
                f"{features} tokens, better 10 times as many",
                stacklevel=2,
            )
        return self._symmetric_sum() * (2 / self.tokens)

    def relative_error(self, weight: Tensor, approximation: Tensor) -> float:
        """|x W^T - x Q^T|^2 / |x W^T|^2 over all tokens seen: tr(dW H dW^T) / tr(W H W^T).

        Multiplied in float32: this is for reports.
        """
        H = self._symmetric_sum().float()
        error, power = (((m @ H) * m).sum().item() for m in (weight - approximation, weight))
        return error / power if power else 0.0

    def _symmetric_sum(self) -> Tensor:
        """The sum, with its upper half filled in if batches came since that was done."""
        if self._complete != self.tokens:
            self._sum.tril_().add_(self._sum.tril(-1).T)
            self._complete = self.tokens
        return self._sum


class GPTQCodes(NamedTuple):
    """What `gptq_codes` finds, in the order of the weight's own columns."""

    codes: Tensor  # uint8 [out, in]
    scale: Tensor  # float16 or float32 [out, groups]
    zero_point: Tensor  # int32 [out, groups]
    group_index: Tensor  # int32 [in]: the group of each column
    losses: Tensor  # [out, in], in the Hessian's dtype: what each rounding adds to the objective


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor U of the damped Hessian's inverse: H^-1 = U^T U, `[in, in]`.

    Damping adds `damping` times the mean of the diagonal to the diagonal (0.01 in the paper). Row k
    of U holds all that column k needs: U[k, k]^2 and U[k, k:] U[k, k] are the head and the first row
    of the inverse of H[k:, k:], the Hessian of the columns that are still float.

    The authors invert H, and factorize the inverse. The same U is the inverse of the upper R with
    H = R R^T: one Cholesky factorization, from the last column to the first, instead of two.

    Raises ValueError if the damped Hessian is not positive definite in its dtype.
    """
    damped = hessian.flip(0, 1)
    damped.diagonal().add_(damping * hessian.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)  # R with its rows and columns turned round
    del damped
    if not failed:
        eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        U = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1)
    if failed or not U.isfinite().all():
        raise ValueError(
            f"the Hessian {tuple(hessian.shape)} with damping {damping} is not positive definite in "
            f"{hessian.dtype}: raise the damping (the paper's is 0.01), or give more calibration tokens"
        )
    return U


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
    _check_hessian(hessian, columns)
    size = group_width(group_size, columns)
    low, high = code_range(n_bits)

    def grids(groups: Tensor) -> tuple[Tensor, Tensor]:
        return _grids(groups, low, high, symmetric, scale_dtype)

    # Columns of the weight are rows of W here, so that each lies in one piece of memory.
    W = weight.T.to(hessian.dtype, copy=True, memory_format=torch.contiguous_format)
    H = hessian.clone()
    groups = W.unflatten(0, (-1, size))  # a view [groups, size, out]
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    dynamic = not (static_groups or group_size == "row")
    if group_size == "row":
        scale, zero_point = grids(groups)  # with the weights of dead features, as the authors do
    W[dead] = 0
    if static_groups and group_size != "row":
        scale, zero_point = grids(groups)
    if dynamic:  # the loop finds them
        scale = W.new_empty(len(groups), W.shape[1], dtype=getattr(torch, scale_dtype))
        zero_point = torch.empty_like(scale, dtype=torch.int32)

    order = torch.arange(columns, device=W.device)
    group_at = order // size
    if act_order:
        order = H.diagonal().argsort(descending=True, stable=True)
        W, H = W[order], H[order][:, order]
        if not dynamic:
            group_at = order // size
    U = inverse_factor(H, damping)

    codes = torch.empty_like(W, dtype=torch.uint8)
    losses = torch.empty_like(W)
    of_column, pivots = group_at.tolist(), U.diagonal().tolist()
    S, Z = scale.to(W.dtype), zero_point.to(W.dtype)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block = W[start:stop].clone()  # follows every column; W itself waits for the block's end
        errors = torch.zeros_like(block)
        for i, column in enumerate(range(start, stop)):
            g = of_column[column]
            if dynamic and column % size == 0:
                group = W[column : column + size]
                if current_groups:
                    group = group - U[start:column, column : column + size].T @ errors[:i]
                scale[g], zero_point[g] = grids(group)
                S[g], Z[g] = scale[g], zero_point[g]
            q = ((block[i] / S[g]).round_().add_(Z[g])).clamp_(low, high)
            codes[column] = q
            torch.sub(block[i], q.sub_(Z[g]).mul_(S[g]), out=errors[i]).div_(pivots[column])
            block[i + 1 :].addr_(U[column, column + 1 : stop], errors[i], alpha=-1)
        losses[start:stop] = errors.square() / 2
        W[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)

    back = order.argsort()
    return GPTQCodes(
        codes[back].T.contiguous(),
        scale.T.contiguous(),
        zero_point.T.contiguous(),
        group_at[back].int(),
        losses[back].T,
    )


@dataclass(frozen=True)
class GPTQWeight(AffineWeight):
    """Codes with a grid for each group; `group_index` where a group's columns are not neighbours."""

    group_index: Tensor | None = None  # int32 [in]: the group of each column

    def dequantize(self) -> Tensor:
        """The weight `[out, in]` in float32: S (q - Z)."""
        if self.group_index is None:
            return super().dequantize()
        scale, zero_point = self.scale[:, self.group_index], self.zero_points()[:, self.group_index]
        return dequantize(self.integer_codes(), scale, zero_point)


@register
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
        check_switches(self)
        check_settings(self.n_bits, self.group_size, self.scale_dtype, wide_groups=("row",))
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
    """Scale, as it is stored, and zero point of each of `groups` `[..., weights, out]`, both `[..., out]`.

    A group of zeros gets the range -1..1, as in the authors' code.
    """
    minimum, maximum = groups.aminmax(dim=-2)
    empty = (minimum == 0) & (maximum == 0)
    minimum, maximum = minimum.where(~empty, -1), maximum.where(~empty, 1)
    scale, zero_point = scale_and_zero_point(minimum, maximum, low, high, symmetric=symmetric)
    return stored_scale(scale, scale_dtype), zero_point


def _check_hessian(hessian: Tensor, columns: int) -> None:
    if hessian.shape != (columns, columns) or not hessian.is_floating_point():
        raise ValueError(
            f"the Hessian of a weight with {columns} columns is float [{columns}, {columns}], "
            f"got {hessian.dtype} {tuple(hessian.shape)}"
        )
    if not hessian.isfinite().all():
        raise ValueError(
            f"{int((~hessian.isfinite()).sum())} of {hessian.numel()} entries of the Hessian are NaN "
            "or infinite: look for such values in the calibration's activations"
        )
