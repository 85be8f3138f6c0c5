"""Settings of every pytest run, also of one that is given a notebook: hence at the top."""

import os
from pathlib import Path

import pytest

OUTPUT_TIMEOUT = 120  # seconds


def pytest_configure(config: pytest.Config) -> None:
    """Notebooks run in the quick profile, whatever the caller's shell says, and record into runs/."""
    os.environ["COURSE_PROFILE"] = "quick"
    os.environ["COURSE_RUNS"] = str(Path(config.rootpath) / "runs" / "tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """nbval waits five seconds for a cell's outputs and offers no option: too few on a busy machine."""
    for item in items:
        if hasattr(item, "output_timeout"):
            item.output_timeout = OUTPUT_TIMEOUT
