"""The course's figures, in one style, and its tables; diagrams of mechanisms are in `diagrams`."""

from course_utils.plotting.channels import loss_against_ratio, sorted_sizes
from course_utils.plotting.codebooks import against_block_size, code_usage
from course_utils.plotting.grids import (
    error_against_bits,
    rounding_distances,
    staircase,
    values_on_grid,
)
from course_utils.plotting.losses import nats_against_bits
from course_utils.plotting.outliers import (
    codes_against_outlier,
    error_against_threshold,
    feature_maxima,
    relative_bars,
)
from course_utils.plotting.ranges import (
    clips_on_histogram,
    error_against_clip,
    loss_against_alpha,
    predicted_against_measured,
    sensitivity_bars,
)
from course_utils.plotting.style import COLOURS, new_figure, series_styles
from course_utils.plotting.tables import table
from course_utils.plotting.training import step_gradient, training_curves

__all__ = [
    "COLOURS",
    "against_block_size",
    "clips_on_histogram",
    "code_usage",
    "codes_against_outlier",
    "error_against_bits",
    "error_against_clip",
    "error_against_threshold",
    "feature_maxima",
    "loss_against_alpha",
    "loss_against_ratio",
    "nats_against_bits",
    "new_figure",
    "predicted_against_measured",
    "relative_bars",
    "rounding_distances",
    "sensitivity_bars",
    "series_styles",
    "sorted_sizes",
    "staircase",
    "step_gradient",
    "table",
    "training_curves",
    "values_on_grid",
]
