"""Measured numbers: recorded by runs, accepted by a person, filled into the README, checked there.

A run calls `record`, which writes to `$COURSE_RUNS/results`. `course results accept` merges those
entries into the repository's `results/`, the only source of every measured number in the README;
`fill` writes them between the README's markers, and `check` finds every number that has no source.
"""

from course_utils.results.entries import accept, accepted, compare, list_runs, record, set_context
from course_utils.results.readme import check, fill

__all__ = ["accept", "accepted", "check", "compare", "fill", "list_runs", "record", "set_context"]
