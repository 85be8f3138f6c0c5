"""Quantization methods, through one interface.

Importing this package registers every method of its modules, and the format that `save_pretrained`
and `from_pretrained` store them in.
"""

import importlib
import pkgutil

from course_utils.quantizers.base import (
    METHODS,
    LayerReport,
    Method,
    QuantizedLinear,
    QuantizedWeight,
    Statistics,
    get_method,
    register,
)
from course_utils.quantizers.model import Report, quantize_model

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "METHODS",
    "LayerReport",
    "Method",
    "QuantizedLinear",
    "QuantizedWeight",
    "Report",
    "Statistics",
    "get_method",
    "quantize_model",
    "register",
]
