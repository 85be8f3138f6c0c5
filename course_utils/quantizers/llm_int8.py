"""LLM.int8(): vector-wise int8 with the outlier features kept in float.

Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv
2208.07339, sections 3.1 and 3.2. Built step by step in `chronology/llm_int8_demo`. The codes and the
row statistics are bit for bit those of bitsandbytes.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from course_utils.compression.base import Method, check_weight
from course_utils.compression.embedding import Int8Rows
from course_utils.grids.vectorwise import vectorwise_quantize
from course_utils.kernels import int8_matmul


@dataclass(frozen=True)
class Int8Weight(Int8Rows):
    """Row-wise int8 codes; with them what LLM.int8() and SmoothQuant may store besides."""

    original: Tensor | None = None  # float16 [out, in]: LLM.int8() in the paper's form
    input_absmax: Tensor | None = None  # float32 []: SmoothQuant's one scale for all inputs


def int8_linear(codes: Tensor, absmax: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """The integer product of inputs and weight, times both scales, plus bias; float32 `[tokens, out]`.

    The inputs are `codes` (int8 `[tokens, in]`) with the `absmax` (float32 `[tokens]`) of each token.
    """
    product = int8_matmul(codes, weight.codes)  # int32 [tokens, out]
    # One scale after the other: their product alone may be too large or too small for float32.
    y = product * (absmax * (1 / 127))[:, None] * (weight.absmax * (1 / 127))
    return y if bias is None else y + bias


@dataclass(frozen=True)
class LLMInt8(Method):
    """LLM.int8() and, with `threshold=0`, plain vector-wise int8.

    `threshold`: inputs of this magnitude and more make their feature an outlier; 6.0 in the paper.
    `outlier_weights`: what the outlier features are multiplied with. "dequantized" takes the int8
    columns, as bitsandbytes does: 1 byte a weight is stored. "original" takes the float16 columns of the
    unquantized weight, as the paper's equation 8 says. Which columns will be needed depends on the
    input, so all of them are kept beside the codes: 3 bytes a weight, more than float16 itself.
    """

    threshold: float = 6.0
    outlier_weights: Literal["dequantized", "original"] = "dequantized"
    name: ClassVar[str] = "llm_int8"
    weight_type: ClassVar[type] = Int8Weight

    def __post_init__(self):
        if not 0 <= self.threshold < float("inf"):
            raise ValueError(
                f"threshold {self.threshold} must be 0 (no decomposition) or positive; the paper's is 6.0"
            )
        if self.outlier_weights not in ("dequantized", "original"):
            raise ValueError(
                f"outlier_weights {self.outlier_weights!r}: choose 'dequantized' or 'original'"
            )

    def quantize(self, weight: Tensor, statistics: None = None) -> Int8Weight:
        """Codes and absmax of each row of `weight` `[out, in]`, that is of each output."""
        check_weight(weight)
        codes, absmax, _ = vectorwise_quantize(weight)
        original = weight.half() if self.outlier_weights == "original" else None
        if original is not None and not original.isfinite().all():
            raise ValueError(
                f"weights up to {absmax.max():.6g} do not fit into float16 (65504): "
                "use outlier_weights='dequantized'."
            )
        return Int8Weight(codes, absmax, original)

    def linear(self, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        """Equation 8 of the paper: int8 product of the regular features, float product of the outliers.

        `x` `[tokens, in]` float. A NaN or an infinity in `x` makes its row of the output NaN or
        infinite, as in a float layer.
        """
        codes, absmax, outliers = vectorwise_quantize(x, self.threshold)
        y = int8_linear(codes, absmax, weight, bias)
        if len(outliers):
            if weight.original is None:
                columns = weight.dequantize(outliers)
            else:
                columns = weight.original[:, outliers].float()
            y += x[:, outliers].float() @ columns.T
        return y.to(x.dtype)
