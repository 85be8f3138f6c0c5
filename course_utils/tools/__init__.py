"""What makes the course: its notebooks, benchmarks, golden vectors and pages. No notebook imports it."""


class CourseError(RuntimeError):
    """Something is wrong with the course or with a command; the message names the remedy."""
