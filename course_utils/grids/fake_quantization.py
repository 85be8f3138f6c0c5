"""Fake quantization: float values on a grid, with a gradient, so that they can be trained.

Rounding is constant between its jumps: its gradient is zero wherever there is one. The straight-through
estimator (Bengio et al. 2013, arXiv 1308.3432) takes that of the identity in its place. Learned step size
quantization (LSQ: Esser et al. 2020, arXiv 1902.08153) extends it to the step of the grid. Built step
by step in `foundations/ptq_vs_qat`.
"""

import math

import torch
from torch import Tensor

from course_utils.grids.uniform import dequantize, quantize


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, surrogate: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value`, bit for bit, with the gradient of `surrogate`, a tensor of the same shape and dtype."""
    if value.shape != surrogate.shape or value.dtype != surrogate.dtype:
        raise ValueError(
            f"value is {value.dtype} {tuple(value.shape)}, surrogate {surrogate.dtype} "
            f"{tuple(surrogate.shape)}: a gradient needs the same shape and dtype"
        )
    return _StraightThrough.apply(value.detach(), surrogate)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """`x` (float32) on the grid low..high of S and Z, with a gradient to `x` alone.

    Values and gradient are those of `torch.fake_quantize_per_tensor_affine` and `_per_channel_affine`: 1
    where round(x / S) + Z lies in low..high, that is up to half a step beyond the ends of the grid, and
    0 where x is clipped. `scale` and `zero_point` broadcast. Errors are those of `grid.quantize`.
    """
    codes = quantize(x, scale, zero_point, low - 1, high + 1)  # one code further: what is clipped
    inside = (low <= codes) & (codes <= high)
    value = dequantize(codes.clamp(low, high), scale, zero_point)
    return straight_through(value, torch.where(inside, x, x.detach()))


def learned_step(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """`x` (float32) on the grid low..high of the steps `scale`, with gradients to both (LSQ).

    The value is S clamp(round(x / S), low, high), with low < 0 < high. With g the gradient of the value,
    that of `x` is g inside the grid, low < x / S < high, and 0 outside; that of S is the sum of
    g (round(x / S) - x / S) inside, and of g low or g high outside (equation 3), over the n entries of
    `x` that share the step, times 1 / sqrt(n high) (section 2.2, which has one step a layer). `scale`
    broadcasts: `[out, groups, 1]` for `x` `[out, groups, size]`.

    Raises ValueError for a grid without a positive code, and what `grid.quantize` does: for NaN or
    infinity in `x`, and for steps that are not positive and finite; also for a `scale` that does not
    broadcast to the shape of `x`.
    """
    if not low < 0 < high:
        raise ValueError(
            f"codes {low}..{high}: LSQ of weights needs signed codes, with 1 at least above 0"
        )
    codes = quantize(x, scale, torch.zeros((), dtype=torch.int32), low, high)
    if codes.shape != x.shape:
        raise ValueError(
            f"scale {tuple(scale.shape)} does not broadcast to x {tuple(x.shape)}: give it the same "
            "number of dimensions, 1 where a step is shared"
        )
    sharing = x.numel() // scale.numel()
    scale = straight_through(scale, scale / math.sqrt(sharing * high))
    ratio = x.detach() / scale.detach()
    inside = (low < ratio) & (ratio < high)
    # x is masked before the division: a masked quotient of a tiny step would give 0 * infinity
    return straight_through(codes.float(), torch.where(inside, x, 0.0) / scale) * scale
