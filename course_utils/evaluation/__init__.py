"""Measuring a model: quality, bytes, time."""

from course_utils.evaluation.footprint import file_bytes, process_bytes, tensor_bytes
from course_utils.evaluation.perplexity import Perplexity, perplexity
from course_utils.evaluation.timing import Timing, time_per_token

__all__ = [
    "Perplexity",
    "Timing",
    "file_bytes",
    "perplexity",
    "process_bytes",
    "tensor_bytes",
    "time_per_token",
]
