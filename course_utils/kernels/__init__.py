"""Arithmetic on packed integers. Nothing here knows of a quantization method."""

from course_utils.kernels.fixed_point import quantize_multiplier, requantize
from course_utils.kernels.int8 import int8_matmul, int8_matmul_zero_points
from course_utils.kernels.packing import pack, unpack

__all__ = [
    "int8_matmul",
    "int8_matmul_zero_points",
    "pack",
    "quantize_multiplier",
    "requantize",
    "unpack",
]
