"""Settings of every pytest run, also of one that is given a notebook: hence at the top.

`course test` calls pytest twice: with `--alone`, and with workers side by side, by pytest-xdist. A worker
takes all tests of a file, which share fixtures or, in a notebook, a kernel. What executes whole notebooks
comes first, test by test: then no worker is left with it at the end, while the others wait.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

OUTPUT_TIMEOUT = 120  # seconds
TEST_BY_TEST = "tests/test_notebooks.py"  # too long for one worker, and without shared fixtures


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--alone", action="store_true", help="Only the tests that are marked alone.")


def pytest_configure(config: pytest.Config) -> None:
    """Notebooks run in the quick profile, whatever the caller's shell says, and record into runs/."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    os.environ["COURSE_PROFILE"] = "quick"
    if config.option.markexpr != "gpu":  # before any library imports Triton
        os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ["COURSE_RUNS"] = str(Path(config.rootpath) / "runs" / "tests" / worker)
    if config.getoption("numprocesses", None):
        os.environ["OMP_NUM_THREADS"] = "1"  # of the workers, which start later, and their kernels


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if hasattr(item, "output_timeout"):  # a cell, of nbval
            # nbval waits five seconds for outputs and offers no option: too few on a busy machine.
            item.output_timeout = OUTPUT_TIMEOUT
            item.add_marker("notebook")
    items.sort(key=lambda item: not marked(item, "notebook"))
    if config.option.alone:
        keep(config, items, lambda item: marked(item, "alone"))
    elif hasattr(config, "workerinput"):  # this is a worker, and others run beside it
        keep(config, items, lambda item: not marked(item, "alone"))


@pytest.hookimpl(optionalhook=True)  # there is none without pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return nodeid if file == TEST_BY_TEST else file

    return Scheduling(config, log)


def marked(item: pytest.Item, marker: str) -> bool:
    return item.get_closest_marker(marker) is not None


def keep(
    config: pytest.Config, items: list[pytest.Item], wanted: Callable[[pytest.Item], bool]
) -> None:
    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]
