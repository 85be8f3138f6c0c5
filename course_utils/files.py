"""Files that appear whole, or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The place of a file to write, beside `path`; it takes the place of `path` when the block ends.

    So a reader never sees half of it. An error or an interruption leaves what was there, and nothing
    beside it. Folders that are missing are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as scratch:
        partial = Path(scratch) / path.name
        yield partial
        os.replace(partial, path)
