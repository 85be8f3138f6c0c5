"""The door by which `get_method("wanda")` finds `pruning/wanda`, which defines it."""

from course_utils.pruning.wanda import Wanda

__all__ = ["Wanda"]
