"""The door by which `get_method("sparsegpt")` finds `pruning/sparsegpt`, which defines it."""

from course_utils.pruning.sparsegpt import SparseGPT

__all__ = ["SparseGPT"]
