"""Arithmetic on packed integers. Nothing here knows of a quantization method."""

from course_utils.kernels.fixed_point import quantize_multiplier, requantize
from course_utils.kernels.grouped import GroupedCodes, backend, grouped_linear
from course_utils.kernels.hadamard import hadamard
from course_utils.kernels.int8 import int8_matmul, int8_matmul_zero_points
from course_utils.kernels.packing import pack, unpack
from course_utils.kernels.slices import pack_slices, unpack_slices
from course_utils.kernels.ternary import add_subtract, base3_product, pack_trits, unpack_trits

__all__ = [
    "GroupedCodes",
    "add_subtract",
    "backend",
    "base3_product",
    "grouped_linear",
    "hadamard",
    "int8_matmul",
    "int8_matmul_zero_points",
    "pack",
    "pack_slices",
    "pack_trits",
    "quantize_multiplier",
    "requantize",
    "unpack",
    "unpack_slices",
    "unpack_trits",
]
