"""BitNet b1.58: weights of -1, 0 and 1 with one scale, inputs of int8 with one scale a token.

Ma et al. 2024, "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits", arXiv 2402.17764,
section 2. The method is made for models trained with it (`finetuning.bitnet`): applied to weights trained
without it, it destroys them. Built step by step in `chronology/bitnet_demo`. Codes and scales are bit for
bit those of transformers' `integrations/bitnet.py`.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from course_utils.compression.base import (
    Method,
    QuantizedWeight,
    check_weight,
    dequantized_linear,
)
from course_utils.kernels import (
    GroupedCodes,
    backend,
    base3_product,
    grouped_linear,
    int8_matmul,
    pack_trits,
    unpack_trits,
)
from course_utils.kernels.ternary import PACKINGS, Packing

EPSILON = 1e-5  # smallest mean or maximum that is divided by, as in the authors' code


def absmean(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The rounding of b1.58: gamma = mean|W|, codes = RoundClip(W / gamma, -1, 1).

    Returns the codes (float `[out, in]`, in {-1, 0, 1}) and gamma `[1, 1]`. A weight is 0 where
    |W| <= gamma / 2 (ties to even).
    """
    return _ternary(weight, weight.abs().mean().reshape(1, 1))


def row_absmean(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Control: gamma of each row instead of one for the matrix; gamma is `[out, 1]`."""
    return _ternary(weight, weight.abs().mean(1, keepdim=True))


def binary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Control: the first BitNet (Wang et al. 2023, arXiv 2310.11453): sign(W - mean W), beta = mean|W|.

    Codes are -1 and 1, with sign(0) = 1; beta is `[1, 1]`.
    """
    codes = torch.where(weight >= weight.mean(), 1.0, -1.0).to(weight.dtype)
    return codes, weight.abs().mean().clamp(min=EPSILON).reshape(1, 1)


def least_squares(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Control: the ternary codes and the scale `[1, 1]` with the smallest squared error there is.

    With the k largest magnitudes rounded to +-s, the error is least at s = their mean, and falls by
    (their sum)^2 / k: all k are tried.
    """
    magnitudes = weight.abs().flatten().sort(descending=True).values
    sums = magnitudes.double().cumsum(0)
    counts = torch.arange(1, len(sums) + 1, device=weight.device)
    best = (sums.square() / counts).argmax()
    scale = (sums[best] / counts[best]).to(weight.dtype)
    codes = torch.where(weight.abs() >= magnitudes[best], weight.sign(), 0.0)
    return codes, scale.clamp(min=EPSILON).reshape(1, 1)


ROUNDINGS = {f.__name__: f for f in (absmean, row_absmean, binary, least_squares)}


def _ternary(weight: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    inverse = 1 / gamma.clamp(min=EPSILON)  # multiplied with, as the authors' code does
    return (weight * inverse).round_().clamp_(-1, 1), 1 / inverse


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 codes of each token `x` `[..., in]`, as whole floats, and the tokens' 127 / absmax `[..., 1]`."""
    inverse = 127 / x.abs().amax(-1, keepdim=True).clamp(min=EPSILON)
    return (x * inverse).round_(), inverse


@dataclass(frozen=True)
class TernaryWeight(QuantizedWeight):
    """Packed trits, and the scale that they are multiplied by.

    transformers' `BitLinear` stores the inverse of the scale, its `AutoBitLinear` the scale.
    """

    packed: Tensor  # uint8 [out, bytes], each row packed
    scale: Tensor  # float32 [1, 1], or [out, 1]
    columns: int
    packing: Packing

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.packed), self.columns

    def trits(self) -> Tensor:
        """The codes, int8 `[out, in]` in {-1, 0, 1}. Raises ValueError for bytes that are no trits."""
        return unpack_trits(self.packed, self.packing, self.columns)

    def grouped(self) -> GroupedCodes | None:
        """The trits as 2-bit codes less 1; None for "base3", which has a product of its own."""
        if self.packing == "base3":
            return None
        scale, one = self.layout(_float_grid)
        return GroupedCodes(self.packed, scale, one, None, 2, self.columns)

    def dequantize(self) -> Tensor:
        """The weight `[out, in]` in float32: scale * trit."""
        return self.scale * self.trits()


def _float_grid(weight: TernaryWeight) -> tuple[Tensor, Tensor]:
    """Scale and code of 0 of each row, float32 `[out, 1]`; refuses bytes that are no trits."""
    weight.trits()
    scale = weight.scale.expand(len(weight.packed), 1).contiguous()
    return scale, torch.ones_like(scale)


@dataclass(frozen=True)
class BitNet(Method):
    """Ternary weights of one scale, int8 inputs of a scale for each token, integer sums.

    `rounding`: "absmean" is b1.58's; "row_absmean", "binary" and "least_squares" are controls (the
    functions of these names). `inputs`: "int8", or "float" for a control that leaves them.
    `packing`: "2bit", four codes in a byte, or "base3", five. A binary weight is packed like the others.
    """

    rounding: Literal["absmean", "row_absmean", "binary", "least_squares"] = "absmean"
    inputs: Literal["int8", "float"] = "int8"
    packing: Packing = "2bit"
    name: ClassVar[str] = "bitnet"
    weight_type: ClassVar[type] = TernaryWeight

    def __post_init__(self):
        for setting, choices in {
            "rounding": tuple(ROUNDINGS),
            "inputs": ("int8", "float"),
            "packing": PACKINGS,
        }.items():
            if getattr(self, setting) not in choices:
                raise ValueError(
                    f"{setting} {getattr(self, setting)!r}: choose one of {', '.join(choices)}"
                )

    def round(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (float `[out, in]`) and scale (`[1, 1]` or `[out, 1]`) of a float `weight` `[out, in]`."""
        return ROUNDINGS[self.rounding](weight)

    def quantize(self, weight: Tensor, statistics: None = None) -> TernaryWeight:
        """The packed codes and the scale of `weight` `[out, in]`, rounded in float32.

        A weight of zeros has codes 0 and the scale 1e-5 (`EPSILON`).
        """
        check_weight(weight)
        codes, scale = self.round(weight.float())
        packed = pack_trits(codes.to(torch.int8), self.packing)
        return TernaryWeight(packed, scale, weight.shape[1], self.packing)

    def linear(self, x: Tensor, weight: TernaryWeight, bias: Tensor | None) -> Tensor:
        """`x @ W.T + bias` for `x` `[tokens, in]`: int32 sums of int8 codes, signed by the trits.

        The scales of token and weight come after the sum. A token of zeros gives zeros (plus bias); a NaN or
        an infinity makes its row of the output NaN.
        """
        if self.inputs == "float":
            return dequantized_linear(x, weight, bias)
        finite = x.isfinite().all(1, keepdim=True)
        codes, inverse = quantize_tokens(x.float().where(finite, 0))
        y = self._sums(codes, weight) / inverse * weight.scale.T
        if bias is not None:
            y += bias
        return y.where(finite, torch.nan).to(x.dtype)

    def _sums(self, codes: Tensor, weight: TernaryWeight) -> Tensor:
        """`codes @ trits.T` of whole floats `[tokens, in]`; exact by whoever computes it."""
        grouped = weight.kernel_codes
        # Sums of 2 * 127 are whole in float32 up to 2^24.
        if grouped is not None and backend(grouped) == "compiled" and weight.columns <= 2**16:
            return grouped_linear(codes, replace(grouped, scale=grouped.zero), inputs="codes")
        codes = codes.to(torch.int8)
        if weight.packing == "base3":
            weight.layout(_float_grid)  # refuses bytes that are no trits
            return base3_product(codes, weight.packed)
        return int8_matmul(codes, weight.trits())
