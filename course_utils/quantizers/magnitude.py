"""The door by which `get_method("magnitude")` finds `pruning/magnitude`, which defines it."""

from course_utils.pruning.magnitude import Magnitude

__all__ = ["Magnitude"]
