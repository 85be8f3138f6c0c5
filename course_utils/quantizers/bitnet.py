"""BitNet b1.58: weights of -1, 0 and 1 with one scale, inputs of int8 with one scale a token.

Ma et al. 2024, "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits", arXiv 2402.17764,
section 2. The method is made for models trained with it (`finetuning.bitnet`): applied to weights trained
without it, it destroys them. Built step by step in `chronology/bitnet_demo`. Codes and scales are bit for
bit those of transformers' `integrations/bitnet.py`.
"""

import torch
from torch import Tensor

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
    """Absmax int8 codes of each token `x` `[..., in]`: float codes in -127..127, and 127 / absmax `[..., 1]`."""
    inverse = 127 / x.abs().amax(-1, keepdim=True).clamp(min=EPSILON)
    return (x * inverse).round_(), inverse
