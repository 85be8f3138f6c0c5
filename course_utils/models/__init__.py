"""Language models of the course: one way to load each, one way to walk their linear layers."""

from course_utils.models.registry import LoadedModel, ModelUnavailable, load_model
from course_utils.models.walk import (
    BlockInputs,
    Call,
    LinearLayer,
    blocks,
    linear_layers,
    replace_module,
)

__all__ = [
    "BlockInputs",
    "Call",
    "LinearLayer",
    "LoadedModel",
    "ModelUnavailable",
    "blocks",
    "linear_layers",
    "load_model",
    "replace_module",
]
