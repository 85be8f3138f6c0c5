"""Tables of the notebooks: pandas frames that show what matters and no row numbers."""

from collections.abc import Mapping, Sequence


def table(rows: Sequence[Mapping], formats: Mapping[str, str] | None = None):
    """A pandas frame of `rows`, each a mapping from column to value, to end a cell with.

    `formats[column]` is how Python writes the column's numbers, as `+.3f`; a missing one (None) is left
    blank. Raises ValueError for no rows, and for a format of a column that there is not. pandas, of the
    extra `course`, is imported only here.
    """
    import pandas

    if not rows:
        raise ValueError("a table has rows, got none")
    frame = pandas.DataFrame(list(rows), index=[""] * len(rows), dtype=object)
    for column, spec in (formats or {}).items():
        if column not in frame.columns:
            raise ValueError(
                f"no column {column!r} to format; there are {', '.join(frame.columns)}"
            )
        frame[column] = ["" if pandas.isna(v) else format(v, spec) for v in frame[column]]
    return frame
