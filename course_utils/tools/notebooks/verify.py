"""Renewing a stamp by a run in `quick`, where a change of the package leaves the results as they are.

A change of a file that all notebooks use makes all of them stale, and building them takes a while. This
takes a look instead: where the profile `quick` still gives what is known of it, the committed outputs
stay, and the stamp says that the package was verified in `quick` alone. A build takes that mark away.
"""

import tempfile
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from course_utils.results import compare, list_runs
from course_utils.tools.notebooks.build import built_from, canonical, read, write
from course_utils.tools.notebooks.execute import execute
from course_utils.tools.notebooks.pairs import Notebook, from_script, tagged
from course_utils.tools.notebooks.stamps import stamp

PROFILE = "quick"
MARK = "package_verified_in"
CHECKED = "nbval-check-output"  # the tag of cells that print the same in every profile


def verify(notebook: Notebook) -> list[str] | None:
    """Renew a stamp whose package part alone is stale, if a run in `quick` gives what it gave.

    Returns what speaks against it, a sentence each, with the notebook left as it is; nothing if the stamp
    was renewed; None if it was right. Raises `NotebookFailed` where the run fails.
    """
    remedy = f"run `course build {notebook.name}`"
    if not notebook.ipynb.exists():
        return [f"{notebook.name}: it was never built: {remedy}"]
    built, today = read(notebook), stamp(notebook)
    if built_from(built) == today:
        return None
    if built_from(built).get("script") != today["script"]:
        return [f"{notebook.name}: its script changed, which only a build can follow: {remedy}"]
    with tempfile.TemporaryDirectory(prefix="course-") as folder:
        runs = Path(folder)
        out = notebook.root / "runs" / PROFILE / f"{notebook.name}.ipynb"
        nb = execute(from_script(notebook), notebook.name, out, profile=PROFILE, runs=runs)
        recorded = list_runs(runs)
    if not recorded and not tagged(nb, CHECKED):
        problems = [f"it records nothing and has no cell tagged `{CHECKED}`: {remedy}"]
    else:
        problems = _output_problems(built, canonical(nb)) + compare(notebook.root, recorded)
    if not problems:
        built.metadata["course"] |= {**today, MARK: PROFILE}
        write(built, notebook)
    return [f"{notebook.name}: {problem}" for problem in problems]


def _output_problems(built: NotebookNode, nb: NotebookNode) -> list[str]:
    """The tagged cells that print in a run what they do not in the built notebook."""
    before = {cell.id: _printed(cell) for cell in tagged(built, CHECKED)}
    return [
        f"the cell that begins `{cell.source.splitlines()[0]}` prints something else than in the notebook"
        for cell in tagged(nb, CHECKED)
        if _printed(cell) != before.get(cell.id)
    ]


def _printed(cell: NotebookNode) -> list[NotebookNode]:
    """A cell's outputs without their numbers, which count cells."""
    kept = [{k: v for k, v in output.items() if k != "execution_count"} for output in cell.outputs]
    return [nbformat.from_dict(output) for output in kept]
