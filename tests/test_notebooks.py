"""The course's notebooks, run in the quick profile; and nbval, shown to see what it must see.

A notebook is executed three times in all that CI runs, each time for other reasons:

- here papermill runs its script, without a network: that parameters arrive, that nothing passes
  silently, that nothing asks for a network, and that recorded values are the accepted ones;
- nbval, which options in pyproject.toml switch on, runs the committed notebook: that its outputs are
  still those of the cells tagged `nbval-check-output`;
- `course test-colab --t4` runs it as on Colab's card: by the set-up cell, in float16, without Triton.

The student version, which is short, is executed once.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from offline import Offline, own_setting

from course_utils.results import compare, list_runs
from course_utils.tools import CourseError
from course_utils.tools.notebooks.execute import execute
from course_utils.tools.notebooks.pairs import (
    FOLDERS,
    Notebook,
    find_notebooks,
    from_script,
    tagged,
)
from course_utils.tools.notebooks.students import student_version
from course_utils.tools.notebooks.trace import tracing, untracked

ROOT = Path(__file__).parent.parent
HAS_NOTEBOOKS = any(list((ROOT / folder).glob("*.py")) for folder in FOLDERS)
NOTEBOOKS = find_notebooks(ROOT) if HAS_NOTEBOOKS else []


def each_notebook(test):
    """A test that executes a notebook, one of each."""
    names = [notebook.name for notebook in NOTEBOOKS]
    return pytest.mark.notebook(pytest.mark.parametrize("notebook", NOTEBOOKS, ids=names)(test))


@each_notebook
def test_notebook_runs_offline_in_the_quick_profile(
    notebook: Notebook, offline: Offline, tmp_path, monkeypatch
):
    """With parameters, without a network; it records the accepted values, and runs no uncounted file."""
    runs, trace = tmp_path / "runs", tmp_path / "trace"
    for variable in filter(own_setting, list(os.environ)):
        monkeypatch.delenv(variable)
    executed = execute(
        from_script(notebook),
        notebook.name,
        runs / "executed.ipynb",
        profile="quick",
        runs=runs,
        parameters={"PROFILE": "quick"},
        variables=offline.variables | tracing(trace, offline.variables),
    )
    assert tagged(executed, "injected-parameters")
    assert untracked(trace, notebook) == []
    assert offline.connections() == []
    monkeypatch.setenv("COURSE_RUNS", str(runs))
    assert compare(ROOT, list_runs()) == []


@each_notebook
def test_student_version_stands_alone(notebook: Notebook, tmp_path):
    if not tagged(from_script(notebook), "exercise"):
        with pytest.raises(CourseError, match="no exercises"):
            student_version(from_script(notebook), notebook.name)
        return
    solved = student_version(from_script(notebook), notebook.name, solved=True)
    out = tmp_path / "solved.ipynb"
    executed = execute(solved, notebook.name, out, profile="quick", runs=tmp_path)
    tests = tagged(executed, "exercise-tests")
    assert tests and all(cell.execution_count for cell in tests)


def test_every_script_has_its_notebook_and_the_other_way_round():
    built = {str(p.relative_to(ROOT)) for f in FOLDERS for p in (ROOT / f).glob("*.ipynb")}
    assert built == {f"{notebook.name}.ipynb" for notebook in NOTEBOOKS}


# What nbval sees, in a folder of its own with this course's settings of pytest


def nbval(folder: Path, *sources: str, change: str | None = None) -> subprocess.CompletedProcess:
    """Run nbval on cells that were executed once; `change` is then put in the place of `[1, 2]`."""
    for file in ("conftest.py", "pyproject.toml", "tests/nbval_sanitize.cfg"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    checked = {"metadata": {"tags": ["nbval-check-output"]}}
    cells = [nbformat.v4.new_code_cell(source, **checked) for source in sources]
    cells.append(nbformat.v4.new_code_cell("[1, 2]", **checked))
    result = nbformat.v4.new_output(
        "execute_result", {"text/plain": change or "[1, 2]"}, execution_count=1
    )
    for cell in cells:
        cell.execution_count = 1
    cells[-1].outputs = [result]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "planted.ipynb")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "planted.ipynb"]
    return subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True)


def test_nbval_passes_outputs_that_are_the_same_and_slow_ones(tmp_path):
    # The kernel calls this hook between its answer and the message that ends a cell's outputs.
    slow = "import time\nget_ipython().kernel.post_handler_hook = lambda: time.sleep(6)"
    done = nbval(tmp_path, slow)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_nbval_fails_for_an_altered_output(tmp_path):
    done = nbval(tmp_path, change="[1, 3]")
    assert done.returncode == 1
    assert "1 failed" in done.stdout and "Cell outputs differ" in done.stdout


def test_nbval_runs_in_the_quick_profile(tmp_path):
    done = nbval(tmp_path, "import os\nassert os.environ['COURSE_PROFILE'] == 'quick'")
    assert done.returncode == 0, done.stdout
