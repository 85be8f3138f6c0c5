"""The course's figures, in one style."""

from course_utils.plotting.figures import (
    codes_against_outlier,
    error_against_threshold,
    feature_maxima,
    relative_bars,
)
from course_utils.plotting.style import COLOURS, new_figure

__all__ = [
    "COLOURS",
    "codes_against_outlier",
    "error_against_threshold",
    "feature_maxima",
    "new_figure",
    "relative_bars",
]
