"""Measuring a model: quality, bytes, time."""

from course_utils.evaluation.compare import Comparison, compare, compare_all, difference
from course_utils.evaluation.continuations import Continuations, continuations, prompt_of
from course_utils.evaluation.estimate import Estimate, format_difference, over_cuts
from course_utils.evaluation.footprint import file_bytes, process_bytes, tensor_bytes
from course_utils.evaluation.perplexity import Perplexity, perplexity
from course_utils.evaluation.protocol import Protocol, Text
from course_utils.evaluation.timing import Timing, time_per_token

__all__ = [
    "Comparison",
    "Continuations",
    "Estimate",
    "Perplexity",
    "Protocol",
    "Text",
    "Timing",
    "compare",
    "compare_all",
    "continuations",
    "difference",
    "file_bytes",
    "format_difference",
    "over_cuts",
    "perplexity",
    "process_bytes",
    "prompt_of",
    "tensor_bytes",
    "time_per_token",
]
