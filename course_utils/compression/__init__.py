"""What all methods share: their one shape, the walk through a model, saving and loading.

Importing this registers with `transformers` the format that `save_pretrained` and `from_pretrained`
store quantized models in. It imports no method: `get_method` does, when a method is asked for.
"""

from course_utils.compression.base import (
    LayerReport,
    Method,
    QuantizedLinear,
    QuantizedWeight,
    Statistics,
)
from course_utils.compression.driver import prepare_model
from course_utils.compression.methods import get_method, method_names
from course_utils.compression.model import Report, quantize_model

__all__ = [
    "LayerReport",
    "Method",
    "QuantizedLinear",
    "QuantizedWeight",
    "Report",
    "Statistics",
    "get_method",
    "method_names",
    "prepare_model",
    "quantize_model",
]
