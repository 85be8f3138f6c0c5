"""How the tests themselves are run: which side by side, which alone; and how often a notebook is executed."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nbformat
import pytest

from course_utils.tools import cli
from course_utils.tools.cli import quality as commands
from course_utils.tools.notebooks.pairs import FOLDERS, find_notebooks

ROOT = Path(__file__).parent.parent
PLANTED = """
import os
import pytest

WHERE = os.environ.get("PYTEST_XDIST_WORKER", "no worker")

@pytest.mark.alone
def test_alone():
    assert WHERE == "no worker"

@pytest.mark.parametrize("number", range(4))
def test_beside(number):
    print("THREADS", os.environ.get("OMP_NUM_THREADS"), "RUNS", os.environ["COURSE_RUNS"])
    assert WHERE.startswith("gw") and os.environ["COURSE_RUNS"].endswith(WHERE)
    assert os.environ["OMP_NUM_THREADS"] == "1"
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with this course's settings of pytest, two files of tests and a notebook of two cells."""
    for file in ("conftest.py", "pyproject.toml", "tests/nbval_sanitize.cfg"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    for name in ("test_one.py", "test_two.py"):
        (tmp_path / "tests" / name).write_text(PLANTED)
    cells = [nbformat.v4.new_code_cell(source) for source in ("x = 1", "assert x == 1")]
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / FOLDERS[0] / "planted.ipynb")
    return tmp_path


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "OMP_"))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True)


def test_workers_take_all_but_what_is_alone_and_cells_stay_together(folder):
    done = pytest_in(folder, "-n2", "--no-loadscope-reorder", "-v")
    assert done.returncode == 0, done.stdout
    assert "10 passed" in done.stdout.splitlines()[-1]
    passed = [line.split() for line in done.stdout.splitlines() if " PASSED " in line]
    of_cells = [words[0] for words in passed if "planted::ipynb::Cell" in words[-2]]
    assert len(of_cells) == 2 and len(set(of_cells)) == 1, done.stdout


def test_alone_takes_what_the_workers_leave(folder):
    done = pytest_in(folder, "--alone", "-v")
    assert done.returncode == 0, done.stdout
    assert "2 passed, 10 deselected" in done.stdout.splitlines()[-1]


def test_notebooks_come_first(folder):
    done = pytest_in(folder, "--collect-only", "-q")
    assert done.stdout.splitlines()[0].startswith(f"{FOLDERS[0]}/planted.ipynb::")


@pytest.mark.parametrize(
    ("alone", "beside", "status"),
    [(0, 0, 0), (5, 0, 0), (0, 5, 0), (5, 5, 5), (1, 0, 1), (0, 1, 1), (5, 1, 1)],
)
def test_course_test_fails_if_either_call_does_or_neither_finds_a_test(
    monkeypatch, alone, beside, status
):
    """pytest's statuses are planted: 5 says that there was no test, as when one file is asked for."""
    asked = []

    def run(command: list[str]) -> subprocess.CompletedProcess:
        asked.append(command[3:])
        return subprocess.CompletedProcess(command, alone if "--alone" in command else beside)

    monkeypatch.setattr(commands, "lint", lambda: None)
    monkeypatch.setattr(commands, "check", lambda: None)
    monkeypatch.setattr(cli.shared.subprocess, "run", run)
    found = 0
    try:
        commands.test(["tests/test_x.py", "-k", "y"])
    except SystemExit as error:
        found = error.code
    assert found == status
    assert all(command[-3:] == ["tests/test_x.py", "-k", "y"] for command in asked)
    assert asked[0][0] == "--alone" and all(command[0].startswith("-n") for command in asked[1:])


def test_a_notebook_is_executed_three_times_and_its_student_version_once():
    """Here by papermill and by nbval; and once by `.ci/run`, on Colab's packages."""
    collected = pytest_in(
        ROOT, "--collect-only", "-q", "-m", "notebook", "tests/test_notebooks.py", *FOLDERS
    ).stdout
    found = Counter()
    for test in {line.split("::Cell")[0] for line in collected.splitlines() if "::" in line}:
        for notebook in find_notebooks(ROOT):
            if notebook.name in test:
                found[notebook.name, "student" in test] += 1
    continuous = (ROOT / ".ci" / "run").read_text(encoding="utf-8").count(" test-colab ")
    for notebook in find_notebooks(ROOT):
        assert found[notebook.name, False] + continuous == 3
        assert found[notebook.name, True] == 1
