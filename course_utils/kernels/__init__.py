"""Arithmetic on packed integers. Nothing here knows of a quantization method."""

from course_utils.kernels.int8 import int8_matmul

__all__ = ["int8_matmul"]
