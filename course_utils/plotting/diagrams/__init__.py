"""Diagrams of mechanisms, drawn from real values: matrices, grids, bits, flows, walks.

Each fits a notebook's width and refuses what would be too much to read.
"""

from course_utils.plotting.diagrams.codebooks import (
    block_on_levels,
    nibbles_in_bytes,
    quantile_levels,
)
from course_utils.plotting.diagrams.flows import fake_quantization_paths, integer_data_flow
from course_utils.plotting.diagrams.matrices import activation_heatmap, four_matrices, gptq_steps
from course_utils.plotting.diagrams.pruning import masked_matrix, row_in_formats
from course_utils.plotting.diagrams.slices import slices_in_words
from course_utils.plotting.diagrams.storage import bits_in_bytes, grids_on_a_line
from course_utils.plotting.diagrams.walks import block_walk

__all__ = [
    "activation_heatmap",
    "bits_in_bytes",
    "block_on_levels",
    "block_walk",
    "fake_quantization_paths",
    "four_matrices",
    "gptq_steps",
    "grids_on_a_line",
    "integer_data_flow",
    "masked_matrix",
    "nibbles_in_bytes",
    "quantile_levels",
    "row_in_formats",
    "slices_in_words",
]
