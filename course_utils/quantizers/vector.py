"""Vector codebooks: one code for 2, 4 or 8 neighbouring weights, by k-means, in one stage or several.

The codebook is fitted to the very weight it stores (to 32,768 of its vectors, where there are more), row by
row scaled to a mean square of 1, and is stored with it. With several codebooks a vector is a sum of entries,
one of each: a residual codebook fits what the ones before have left; `sweeps` then fit each anew to what all
others leave, which is what makes AQLM's additive codebooks (Egiazarian et al. 2024, arXiv 2401.06118) more
than residual ones. Left out of AQLM: its beam search, and the training of codebooks on a block's output.
Built step by step in `chronology/tpoti_two_bit_ladder`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from course_utils.compression.base import QuantizedWeight, check_weight
from course_utils.compression.hessian import Hessian
from course_utils.compression.stepwise import HessianMethod, compensated, divisor, row_scale
from course_utils.grids.vectors import kmeans, nearest_vectors
from course_utils.kernels import pack, unpack

USES = ("none", "diagonal", "full")
# Vectors, drawn at random, that a codebook is fitted to: 128 for each of 256 entries.
FITTED = 2**15


@dataclass(frozen=True)
class VectorWeight(QuantizedWeight):
    """A code for each vector of neighbouring columns and each codebook, the codebooks, and a scale a row."""

    codes: Tensor  # uint8 [codebooks, out, bytes], each row packed
    codebook: Tensor  # float16 [codebooks, 2^n_bits, length]
    scale: Tensor  # float16 or float32 [out]
    n_bits: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[1], self.columns

    def integer_codes(self) -> Tensor:
        """The codes (uint8 `[codebooks, out, vectors]`), unpacked."""
        return unpack(self.codes, self.n_bits, self.columns // self.codebook.shape[2])

    def dequantize(self) -> Tensor:
        """The weight `[out, in]` in float32: the scale times the sum of the entries."""
        pairs = zip(self.codebook.float(), self.integer_codes().int(), strict=True)
        values = sum(book[codes] for book, codes in pairs)  # [out, vectors, length]
        return values.flatten(1) * self.scale.float()[:, None]


@dataclass(frozen=True)
class Vector(HessianMethod):
    """`codebooks` codes of `n_bits` for each vector of `length` weights; inputs stay float.

    That is codebooks * n_bits / length bits a weight, and the codebooks: 16 bits for each of their numbers,
    which a small layer feels. `sweeps`: how often all codebooks are fitted anew, one after the other.
    `hessian`: "none" takes all errors as equal; "diagonal" weighs an error by the mean square of the
    column's inputs (the Hessian's diagonal, damped); "full" does so, and then chooses codes by the column
    loop of GPTQ, `length` columns a step, so that later columns make up for errors.
    `seed` draws the vectors that k-means starts from. `scale_dtype`: how the rows' scales are stored.
    """

    length: int = 4
    n_bits: int = 8
    codebooks: int = 1
    sweeps: int = 0
    hessian: Literal["none", "diagonal", "full"] = "none"
    damping: float = 0.01
    seed: int = 0
    scale_dtype: Literal["float16", "float32"] = "float16"
    name: ClassVar[str] = "vector"
    weight_type: ClassVar[type] = VectorWeight

    def __post_init__(self):
        for setting, least, most in (
            ("length", 1, 64),
            ("n_bits", 1, 8),
            ("codebooks", 1, 8),
            ("sweeps", 0, 100),
        ):
            value = getattr(self, setting)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{setting} {value!r}: choose {least} to {most}")
        if self.hessian not in USES:
            raise ValueError(f"hessian {self.hessian!r}: choose one of {', '.join(USES)}")
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping {self.damping} must be 0 or positive; GPTQ's is 0.01")
        if self.scale_dtype not in ("float16", "float32"):
            raise ValueError(f"scale_dtype {self.scale_dtype!r}: choose one of float16, float32")

    @property
    def uses_hessian(self) -> bool:
        """With `hessian` "diagonal" or "full"."""
        return self.hessian != "none"

    def check_shape(self, out: int, columns: int) -> None:
        """Refuse columns that the length does not divide, and fewer vectors than a codebook has entries."""
        check_length(self.length, columns)
        vectors, entries = out * columns // self.length, 2**self.n_bits
        if vectors < entries:
            raise ValueError(
                f"a weight [{out}, {columns}] holds {vectors} vectors of {self.length}, and a codebook of "
                f"{self.n_bits} bits {entries} entries: take fewer bits, or shorter vectors"
            )

    def quantize(self, weight: Tensor, statistics: Hessian | None = None) -> VectorWeight:
        """Codes and codebooks of `weight` `[out, in]`."""
        check_weight(weight)
        self.check_shape(*weight.shape)
        self.check_statistics(statistics)
        scale = row_scale(weight, self.scale_dtype)
        by = divisor(scale)  # [out, 1]
        rows = weight.float() / by
        importance = self._importance(by, statistics, rows.shape[1])  # [out, in]
        x, w = (t.reshape(-1, self.length) for t in (rows, importance))  # [vectors, length]
        books, codes = self._fit(x, w)
        codes = codes.view(self.codebooks, len(weight), -1)  # [codebooks, out, vectors of a row]
        if self.hessian == "full":
            codes = self._compensated(weight, statistics, by, books)
        packed = pack(codes.to(torch.uint8), self.n_bits)
        return VectorWeight(packed, books.half(), scale, self.n_bits, weight.shape[1])

    def _importance(self, by: Tensor, statistics: Hessian | None, columns: int) -> Tensor:
        """How much the squared error of each scaled weight counts, `[out, in]`, 1 on average."""
        diagonal = by.new_ones(columns)
        if statistics is not None and self.uses_hessian:
            diagonal = statistics.matrix().diagonal()
            diagonal = (diagonal + self.damping * diagonal.mean()).float()
        importance = by.square() * diagonal
        return importance / importance.mean()

    def _fit(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Codebooks, as they are stored, in float32, and codes `[codebooks, vectors]` for vectors `x`."""
        entries = 2**self.n_bits
        books = x.new_zeros(self.codebooks, entries, self.length)
        codes = torch.zeros(self.codebooks, len(x), dtype=torch.long, device=x.device)
        left = x.clone()

        def refit(stage: int, book: Tensor) -> None:
            books[stage] = book.half().float()
            codes[stage] = nearest_vectors(left, books[stage], w)
            left.sub_(books[stage][codes[stage]])

        draw = torch.Generator().manual_seed(self.seed)
        some = torch.randperm(len(x), generator=draw)[:FITTED].to(x.device)
        for stage in range(self.codebooks):
            refit(stage, kmeans(left[some], entries, w[some], seed=self.seed))
        for _ in range(self.sweeps):
            for stage in range(self.codebooks):
                left += books[stage][codes[stage]]
                start = books[stage]
                refit(stage, kmeans(left[some], entries, w[some], start=start, iterations=2))
        return books, codes

    def _compensated(
        self, weight: Tensor, statistics: Hessian, by: Tensor, books: Tensor
    ) -> Tensor:
        """Codes `[codebooks, out, vectors]` by the column loop, each stage the nearest in the metric."""
        vectors = weight.shape[1] // self.length
        codes = torch.empty(
            len(books), len(weight), vectors, dtype=torch.long, device=weight.device
        )

        def choose(i: int, w: Tensor, metric: Tensor) -> Tensor:
            left = w / by  # [out, length]
            for book, of_book in zip(books, codes, strict=True):
                found = nearest_vectors(left @ metric, book @ metric)
                of_book[:, i // self.length] = found
                left = left - book[found]
            return w - left * by

        compensated(weight, statistics, choose, width=self.length, damping=self.damping)
        return codes


def check_length(length: int, columns: int) -> None:
    """Refuse columns that vectors of this length do not divide."""
    if columns % length:
        fitting = [n for n in range(min(length, columns), 0, -1) if columns % n == 0][:3]
        raise ValueError(
            f"vectors of {length} do not divide the {columns} columns of this layer: use "
            f"{', '.join(map(str, fitting))}"
        )
