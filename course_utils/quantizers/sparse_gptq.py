"""Pruned and quantized: a bit for every weight, and codes for those that stay.

Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv
2301.00774, section 3.5: the column loop of GPTQ and SparseGPT is one, so a single pass can remove weights and
round the others, and the columns behind make up for both errors. Beside that joint pass are the two orders in
which one thing comes after the other. Compared in `pruning/one_shot_pruning`. Left out: a kernel that
multiplies without decoding, so this saves bytes and no time.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from course_utils.compression.base import (
    Method,
    QuantizedWeight,
    check_settings,
    check_weight,
    dequantized_linear,
)
from course_utils.compression.hessian import Hessian
from course_utils.grids.uniform import (
    code_range,
    dequantize,
    group_width,
    scale_and_zero_point,
    stored_scale,
)
from course_utils.kernels import pack, unpack
from course_utils.pruning.masks import check_pattern, check_setting, mask_for
from course_utils.pruning.sparse import check_mask
from course_utils.pruning.sparsegpt import sparsegpt
from course_utils.pruning.wanda import wanda_scores
from course_utils.quantizers.gptq import gptq_codes

ORDERS = ("joint", "prune_first", "quantize_first")


@dataclass(frozen=True)
class SparseCodes(QuantizedWeight):
    """A bit for every weight, codes of `n_bits` of those that stay, a grid for each group of columns."""

    mask: Tensor  # uint8 [out, ceil(in / 8)], 1 where a weight stays, lowest bit first
    codes: Tensor  # uint8 [ceil(kept * n_bits / 8)], row after row
    scale: Tensor  # float16 or float32 [out, groups]
    zero_point: Tensor  # uint8 [out, bytes], packed like codes
    n_bits: int
    columns: int

    @classmethod
    def from_codes(
        cls, codes: Tensor, mask: Tensor, scale: Tensor, zero_point: Tensor, n_bits: int
    ) -> "SparseCodes":
        """Store of integer `codes` `[out, in]`, 0..2^n_bits - 1, those that `mask` (bool) keeps.

        `scale` (float16 or float32) and `zero_point` are `[out, groups]`. Raises ValueError for other shapes.
        """
        check_mask(codes, mask)
        out, columns = codes.shape
        fits = scale.ndim == 2 and len(scale) == out and columns % scale.shape[1] == 0
        if not fits or zero_point.shape != scale.shape:
            raise ValueError(
                f"scale {tuple(scale.shape)} and zero_point {tuple(zero_point.shape)} of codes "
                f"{tuple(codes.shape)}: both have to be [out, groups], with groups of equal width"
            )
        return cls(
            pack(mask.to(torch.uint8), 1),
            pack(codes[mask], n_bits),
            scale,
            pack(zero_point, n_bits),
            n_bits,
            columns,
        )

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.mask), self.columns

    def kept(self) -> Tensor:
        """The mask, bool `[out, in]`."""
        return unpack(self.mask, 1, self.columns).bool()

    def dequantize(self) -> Tensor:
        """The weight `[out, in]` in float32: S (q - Z) where it stays, exact zeros elsewhere."""
        kept = self.kept()
        groups = self.scale.shape[1]
        zero_point = unpack(self.zero_point, self.n_bits, groups)  # [out, groups]
        codes = zero_point.repeat_interleave(self.columns // groups, 1)  # [out, in]
        codes[kept] = unpack(self.codes, self.n_bits, int(kept.sum()))
        in_groups = codes.unflatten(1, (groups, -1))
        return dequantize(in_groups, self.scale[..., None], zero_point[..., None]).flatten(1)


@dataclass(frozen=True)
class SparseGPTQ(Method):
    """Remove a share of a layer's weights, or a pattern as "2:4", and round those that stay to codes.

    `order`: "joint" chooses by SparseGPT's scores and rounds in one pass, as the paper does. "prune_first" is
    all of SparseGPT, then a second pass that rounds what is left, with the mask held. "quantize_first" is
    GPTQ, then the codes of lowest Wanda score are removed from each row; nothing makes up for those, since a
    weight that moves would leave the grid.
    `group_size`: how many neighbouring columns of a row share a scale, or "row". All grids are taken from
    the weights before the rounding pass begins, over removed ones too, as in the authors' code.
    `damping` and `block_size` are SparseGPT's; `scale_dtype`: how scales are stored.
    """

    sparsity: float | str = 0.5
    n_bits: int = 4
    group_size: int | Literal["row"] = 128
    order: Literal["joint", "prune_first", "quantize_first"] = "joint"
    damping: float = 0.01
    block_size: int = 128
    scale_dtype: Literal["float16", "float32"] = "float16"
    name: ClassVar[str] = "sparse_gptq"
    weight_type: ClassVar[type] = SparseCodes

    def __post_init__(self):
        check_setting(self.sparsity)
        check_settings(self, wide_groups=("row",))
        if self.order not in ORDERS:
            raise ValueError(f"order {self.order!r}: choose one of {', '.join(ORDERS)}")
        if type(self.block_size) is not int or self.block_size < 1:
            raise ValueError(f"block_size {self.block_size!r}: choose a positive number")
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping {self.damping} must be 0 or positive; the paper's is 0.01")

    def check_shape(self, out: int, columns: int) -> None:
        """Refuse columns that a pattern or groups of this size do not divide."""
        group_width(self.group_size, columns)
        if isinstance(self.sparsity, str):
            check_pattern(self.sparsity, columns)

    @property
    def wants_statistics(self) -> bool:
        """Always: the Hessian."""
        return True

    def new_statistics(self, in_features: int, device: torch.device) -> Hessian:
        """The Hessian, still without inputs."""
        return Hessian(in_features, device)

    def quantize(self, weight: Tensor, statistics: Hessian | None = None) -> SparseCodes:
        """Mask and codes of `weight` `[out, in]`, computed in float64."""
        check_weight(weight)
        if statistics is None:
            raise ValueError(
                "SparseGPTQ needs the Hessian of the layer's inputs: give quantize_model some calibration"
            )
        H = statistics.matrix()
        loop = {"damping": self.damping, "block_size": self.block_size}
        if self.order == "quantize_first":
            return self._quantized_first(weight, H, **loop)
        choice = self.sparsity
        if self.order == "prune_first":
            weight, choice, _ = sparsegpt(weight, H, self.sparsity, **loop)
        size = group_width(self.group_size, weight.shape[1])
        low, high = code_range(self.n_bits)
        ends = weight.float().unflatten(1, (-1, size)).aminmax(dim=-1)
        scale, zero_point = scale_and_zero_point(*ends, low, high, symmetric=False)
        scale = stored_scale(scale, self.scale_dtype)  # [out, groups]
        S, Z = scale.to(H.dtype), zero_point.to(H.dtype)
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)

        def nearest(i: int, w: Tensor) -> Tensor:
            """Column i, `w` `[out, 1]`, on the grid of its group."""
            s, z = S[:, i // size, None], Z[:, i // size, None]
            q = (w / s).round().add(z).clamp(low, high)
            codes[:, i : i + 1] = q
            return (q - z) * s

        mask = sparsegpt(weight, H, choice, to_grid=nearest, **loop).mask
        return SparseCodes.from_codes(codes, mask, scale, zero_point, self.n_bits)

    def _quantized_first(self, weight: Tensor, H: Tensor, **loop: float) -> SparseCodes:
        """GPTQ's codes, less those of lowest |S (q - Z)| |X| in each row."""
        found = gptq_codes(
            weight,
            H,
            n_bits=self.n_bits,
            group_size=self.group_size,
            static_groups=True,
            scale_dtype=self.scale_dtype,
            **loop,
        )
        groups = found.codes.unflatten(1, (found.scale.shape[1], -1))
        values = dequantize(groups, found.scale[..., None], found.zero_point[..., None]).flatten(1)
        mask = mask_for(wanda_scores(values, H.diagonal().sqrt()), self.sparsity)
        return SparseCodes.from_codes(found.codes, mask, found.scale, found.zero_point, self.n_bits)

    def output_error(
        self, weight: Tensor, approximation: Tensor, statistics: Hessian
    ) -> float | None:
        """The Hessian tells it: no need to run the block again."""
        return statistics.relative_error(weight.float(), approximation)

    def linear(self, x: Tensor, weight: SparseCodes, bias: Tensor | None) -> Tensor:
        """`x @ W.T + bias`, for `x` `[tokens, in]`, with the decoded weight."""
        return dequantized_linear(x, weight, bias)
