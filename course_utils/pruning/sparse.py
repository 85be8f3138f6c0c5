"""Masked weights as they are stored: what is left, and where it was.

A matrix that is multiplied by its mask is as large as before: zeros cost what other numbers cost. Three
ways to store less, with b bits a value: a bitmask takes 1 bit for every weight and b for each that stays;
2:4 takes b for half of them and 2 bits each for their places; compressed sparse rows (CSR) take b and a
column index for each that stays, and a pointer for each row.

Left out: kernels of our own that multiply without decoding. The methods decode the whole weight first, so
bitmask and 2:4 save memory and no time; CSR is multiplied by `torch`, which has a kernel for it. NVIDIA's
sparse tensor cores read 2:4 (Mishra et al. 2021, arXiv 2104.08378), with the places in an order of their
own. Drawn and measured in `pruning/pruning_demo`.
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from course_utils.compression.base import QuantizedWeight
from course_utils.kernels import pack, unpack

ValueDtype = Literal["float16", "float32"]


@dataclass(frozen=True)
class BitmaskWeight(QuantizedWeight):
    """A bit for every weight, and the weights that stay, row after row."""

    mask: Tensor  # uint8 [out, ceil(in / 8)], 1 where a weight stays, lowest bit first
    values: Tensor  # float16 or float32 [kept]
    columns: int

    @classmethod
    def from_mask(cls, weight: Tensor, mask: Tensor, dtype: ValueDtype) -> "BitmaskWeight":
        """Store of `weight` `[out, in]` what `mask` (bool, the same shape) keeps."""
        check_mask(weight, mask)
        values = stored_values(weight[mask], dtype)
        return cls(pack(mask.to(torch.uint8), 1), values, weight.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.mask), self.columns

    def kept(self) -> Tensor:
        """The mask, bool `[out, in]`."""
        return unpack(self.mask, 1, self.columns).bool()

    def dequantize(self) -> Tensor:
        """The weight `[out, in]` in float32, zeros and all."""
        weight = torch.zeros(self.shape, device=self.values.device)
        weight[self.kept()] = self.values.float()
        return weight


@dataclass(frozen=True)
class TwoFourWeight(QuantizedWeight):
    """Two values of every four neighbours, and the place of each in its four."""

    values: Tensor  # float16 or float32 [out, in / 2]
    places: Tensor  # uint8 [out, ceil(in / 8)]: 2 bits for each value, lowest first, ascending in a four

    @classmethod
    def from_mask(cls, weight: Tensor, mask: Tensor, dtype: ValueDtype) -> "TwoFourWeight":
        """Store of `weight` `[out, in]` what `mask` (bool, the same shape) keeps: 2 of each 4.

        Raises ValueError for a mask that keeps more or fewer of some four neighbours.
        """
        check_mask(weight, mask)
        out, columns = weight.shape
        if columns % 4:
            raise ValueError(
                f"2:4 takes columns in fours, and {columns} are not: use BitmaskWeight"
            )
        fours = mask.unflatten(1, (-1, 4))  # [out, in / 4, 4]
        off = fours.sum(-1) != 2
        if off.any():
            row, four = off.nonzero()[0].tolist()
            raise ValueError(
                f"{int(off.sum())} of {off.numel()} groups of 4 do not keep 2 weights, the first keeps "
                f"{int(fours[row, four].sum())} in row {row} from column {4 * four}: make the mask by "
                "n_m_mask(scores, '2:4'), or use BitmaskWeight"
            )
        places = fours.nonzero()[:, 2].view(out, columns // 2)
        return cls(stored_values(weight[mask], dtype).view(out, -1), pack(places, 2))

    @property
    def shape(self) -> tuple[int, int]:
        out, half = self.values.shape
        return out, 2 * half

    def kept(self) -> Tensor:
        """The mask, bool `[out, in]`."""
        return self._scatter(torch.ones_like(self.values, dtype=torch.bool))

    def dequantize(self) -> Tensor:
        """The weight `[out, in]` in float32, zeros and all."""
        return self._scatter(self.values.float())

    def _scatter(self, values: Tensor) -> Tensor:
        out, half = values.shape
        places = unpack(self.places, 2, half).long().view(out, half // 2, 2)
        fours = values.new_zeros(out, half // 2, 4)
        return fours.scatter_(2, places, values.view(out, -1, 2)).flatten(1)


@dataclass(frozen=True)
class CsrWeight(QuantizedWeight):
    """Compressed sparse rows: of each weight that stays the value and its column, row after row."""

    starts: Tensor  # int32 [out + 1]: values starts[i] to starts[i + 1] - 1 are those of row i
    indices: Tensor  # int16 or int32 [kept]: the column of each value, ascending in a row
    values: Tensor  # float16 or float32 [kept]
    columns: int

    @classmethod
    def from_mask(cls, weight: Tensor, mask: Tensor, dtype: ValueDtype) -> "CsrWeight":
        """Store of `weight` `[out, in]` what `mask` (bool, the same shape) keeps.

        Indices are int16 where the columns can be counted so (at most 32,768 of them), else int32.
        """
        check_mask(weight, mask)
        starts = torch.zeros(len(mask) + 1, dtype=torch.int32, device=mask.device)
        starts[1:] = mask.sum(1).cumsum(0)
        index_dtype = torch.int16 if mask.shape[1] <= 2**15 else torch.int32
        indices = mask.nonzero()[:, 1].to(index_dtype)
        return cls(starts, indices, stored_values(weight[mask], dtype), weight.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.starts) - 1, self.columns

    def kept(self) -> Tensor:
        """The mask, bool `[out, in]`."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.values.device)
        mask[self._rows(), self.indices.int()] = True
        return mask

    def dequantize(self) -> Tensor:
        """The weight `[out, in]` in float32, zeros and all."""
        weight = torch.zeros(self.shape, device=self.values.device)
        weight[self._rows(), self.indices.int()] = self.values.float()
        return weight

    def as_torch(self) -> Tensor:
        """The same as torch's sparse CSR tensor in float32, which multiplies: `as_torch() @ x`."""
        parts = self.starts, self.indices.int(), self.values.float()
        with warnings.catch_warnings():  # torch calls the format a beta, once a process
            warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
            return torch.sparse_csr_tensor(*parts, size=self.shape, check_invariants=True)

    def _rows(self) -> Tensor:
        rows = torch.arange(len(self.starts) - 1, device=self.values.device)
        return rows.repeat_interleave(self.starts.diff())


def weight_class(sparsity: float | str) -> type[BitmaskWeight] | type[TwoFourWeight]:
    """What a weight of this share or pattern is stored as: 2:4 has its own, all else gets a bitmask."""
    return TwoFourWeight if sparsity == "2:4" else BitmaskWeight


def stored_values(values: Tensor, dtype: ValueDtype) -> Tensor:
    """`values` as they are stored; ValueError if one of them is too large for float16."""
    stored = values.to(getattr(torch, dtype))
    lost = ~stored.isfinite() & values.isfinite()
    if lost.any():
        raise ValueError(
            f"{int(lost.sum())} of {lost.numel()} weights do not fit into {dtype}, the first is "
            f"{values[lost][0].item():.3g}: use value_dtype='float32'"
        )
    return stored


def bitmask_bytes(rows: int, columns: int, kept: int, value_bytes: int = 2) -> int:
    """Bytes of a `BitmaskWeight`: `kept` values, and a bit for every weight, each row in whole bytes."""
    return rows * -(-columns // 8) + kept * value_bytes


def csr_bytes(rows: int, kept: int, value_bytes: int = 2, index_bytes: int = 4) -> int:
    """Bytes of compressed sparse rows: `kept` values with their column indices, `rows` + 1 pointers.

    Indices and pointers of `index_bytes` each; `torch` takes 8, or 4 if it is given int32.
    """
    return kept * (value_bytes + index_bytes) + (rows + 1) * index_bytes


def check_mask(weight: Tensor, mask: Tensor) -> None:
    """Refuse a mask that is not bool, or not in the shape of `weight`."""
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(
            f"the mask of a weight {tuple(weight.shape)} is bool in the same shape, got {mask.dtype} "
            f"{tuple(mask.shape)}: compare scores to make one, as pruning.masks does"
        )
