"""Assignments from the notebooks' scripts, and what a grader needs to know of a submission.

A teacher's folder is laid out as nbgrader wants it: `source/NAME/NAME.ipynb` is the teacher's version with
solutions and hidden tests, `release/NAME/NAME.ipynb` what students get, and
`submitted/STUDENT/NAME/NAME.ipynb` what they hand in. All of it is derived anew by each call. Nothing here
imports nbgrader; `grading` does.
"""

import hashlib
import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from course_utils.tools import CourseError
from course_utils.tools.notebooks.pairs import Notebook, from_script, tagged
from course_utils.tools.notebooks.students import student_version

NOT_RUN = "it was not run"
SEED = re.compile(r"^(?P<head>\s*\w+ = )0(?P<tail>  # the teacher's seed)[ \t]*$", re.M)
CONFIG = '''\
"""Settings of nbgrader for this folder, written by `course assignments`."""

from course_utils.tools.notebooks.grading import configure

configure(get_config())  # noqa: F821, which nbgrader defines
'''


@dataclass(frozen=True)
class Outcome:
    """What became of one exercise in a run of its notebook; `reason` says why it has no points."""

    number: int
    title: str
    points: int
    most: int
    reason: str


def short(notebook: Notebook) -> str:
    """The name of a notebook's assignment."""
    return notebook.script.stem


def with_exercises(notebooks: list[Notebook]) -> list[Notebook]:
    """Those that have exercises."""
    return [notebook for notebook in notebooks if tagged(from_script(notebook), "exercise")]


def read_secret(file: Path, root: Path) -> str:
    """A teacher's secret, from a file outside the course at `root`.

    Raises `CourseError` where the file is inside, missing or too short to be a secret.
    """
    if root.resolve() in file.resolve().parents:
        raise CourseError(f"{file} is inside the course, where it would be published: move it out.")
    if not file.is_file():
        raise CourseError(f"there is no file {file}: write a line of your own into it.")
    secret = file.read_text(encoding="utf-8").strip()
    if len(secret) < 8:
        raise CourseError(f"{file} holds {len(secret)} characters: a secret has 8 or more.")
    return secret


def seed_of(secret: str, name: str, grade_id: str) -> int:
    """The seed that an exercise's hidden tests draw from: another one for each secret and exercise."""
    text = f"{secret}\n{name}\n{grade_id}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") // 2


def teacher_version(notebook: Notebook, secret: str | None = None) -> NotebookNode:
    """A notebook's student version with its solutions and hidden tests.

    With `secret`, lines `seed = 0  # the teacher's seed` of its tests get a seed that nobody can look up.
    """
    nb = student_version(from_script(notebook), notebook.name, solved=True)
    for cell in tagged(nb, "exercise-tests") if secret else []:
        seed = seed_of(secret, notebook.name, cell.metadata["nbgrader"]["grade_id"])
        cell.source = SEED.sub(rf"\g<head>{seed}\g<tail>", cell.source)
    return nb


def write_sources(notebooks: list[Notebook], folder: Path, secret: str | None) -> list[str]:
    """Write teachers' versions and nbgrader's settings into `folder`; returns the assignments' names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nbgrader_config.py").write_text(CONFIG, encoding="utf-8")
    for notebook in notebooks:
        out = folder / "source" / short(notebook) / f"{short(notebook)}.ipynb"
        out.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(teacher_version(notebook, secret), out)
    return [short(notebook) for notebook in notebooks]


def write_students(notebooks: list[Notebook], folder: Path) -> list[Path]:
    """Write student versions into `folder`, as they lie in the course; returns their files."""
    files = []
    for notebook in notebooks:
        out = folder / f"{notebook.name}.ipynb"
        out.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(student_version(from_script(notebook), notebook.name), out)
        files.append(out)
    return files


def find_submission(folder: Path, name: str) -> tuple[Path | None, str]:
    """The file in `folder` that answers the assignment `name`, and what is to be said of it.

    A file of another name is taken if it is the only notebook there. No file: the reason for zero points.
    """
    wanted = folder / f"{name}.ipynb"
    every = sorted(folder.glob("*.ipynb"))
    if not every:
        return None, "no notebook was handed in"
    names = ", ".join(file.name for file in every if file != wanted)
    if wanted not in every and len(every) > 1:
        return None, f"there are {len(every)} notebooks, and none is {wanted.name}: {names}"
    file = wanted if wanted in every else every[0]
    try:
        nb = nbformat.read(file, as_version=4)
    except Exception as error:  # whatever a broken file makes nbformat raise
        return None, f"{file.name} is no notebook that can be read: {_first_line(error)}"
    if not any(cell.source.strip() for cell in nb.cells):
        return None, f"{file.name} is empty"
    if file != wanted:
        return file, f"the file was handed in as {file.name}"
    return file, f"{names} beside it was not graded" if names else ""


def restore(submitted: NotebookNode, given: NotebookNode) -> tuple[NotebookNode, list[str]]:
    """A submission with the cells that students do not write as they were given, and what was mended.

    Cells are known by their grade id; where an editor dropped it, by their id, or an answer by the function
    that it defines. Answers keep their source and get the given metadata, so that no tag can make a cell
    of tests be skipped. What else students wrote stays where it is. A missing answer is not replaced.
    """
    wanted = {cell.metadata["nbgrader"]["grade_id"]: cell for cell in given.cells}
    place: dict[str, int] = {}
    for at, cell in enumerate(submitted.cells):
        known = _known_as(cell, wanted)
        if known:
            place[known] = at  # of two, the later one counts, as in nbgrader
    by_place = {at: known for known, at in place.items()}
    cells, mended = [], []
    for at, cell in enumerate(submitted.cells):
        if at in by_place:
            cells.append(_as_given(cell, wanted[by_place[at]]))
        else:
            cells.append(_of_their_own(cell))
    order = list(wanted)
    for number, grade_id in enumerate(order):
        if grade_id in place:
            continue
        if wanted[grade_id].metadata["nbgrader"]["solution"]:
            mended.append(f"the cell of {_told(grade_id)} is missing")
            continue
        before = next((g for g in reversed(order[:number]) if _index(cells, g) is not None), None)
        at = 0 if before is None else _index(cells, before) + 1
        cells.insert(at, deepcopy(wanted[grade_id]))
        mended.append(f"the cell {_told(grade_id)} was missing, and was put back")
    restored = NotebookNode(submitted | {"cells": cells})
    restored.metadata = deepcopy(given.metadata)
    return restored, mended


def outcomes(nb: NotebookNode) -> list[Outcome]:
    """What became of each exercise in an executed student version."""
    exercises = nb.metadata.get("course", {}).get("exercises", [])
    cells = {cell.metadata.get("nbgrader", {}).get("grade_id"): cell for cell in nb.cells}
    found = []
    for told in exercises:
        answer = cells.get(f"exercise-{told['number']}")
        tests = cells.get(f"exercise-tests-{told['number']}")
        reason = failure(tests) if tests else "its cell of tests is missing"
        broken = failure(answer) if answer else ""
        if reason and broken not in ("", NOT_RUN):
            reason = f"its own cell ends in {broken}"
        points = 0 if reason else told["points"]
        found.append(Outcome(told["number"], told["title"], points, told["points"], reason))
    return found


def failure(cell: NotebookNode) -> str:
    """Why an executed cell failed, in a line; nothing if it did not."""
    errors = [output for output in cell.get("outputs", []) if output.output_type == "error"]
    for output in errors[-1:]:  # after an interrupt, that it took too long
        told = output.evalue.strip().splitlines()
        if output.ename == "AssertionError":
            return told[0] if told else "an assertion failed that has no message"
        return f"{output.ename}: {told[0]}" if told else output.ename
    return "" if cell.execution_count is not None else NOT_RUN


def _known_as(cell: NotebookNode, wanted: dict[str, NotebookNode]) -> str | None:
    """The grade id of a submission's cell, among those that were given."""
    grade_id = cell.metadata.get("nbgrader", {}).get("grade_id")
    if grade_id in wanted:
        return grade_id
    for known, given in wanted.items():
        if cell.get("id") == given.id:
            return known
        head = re.search(r"^(def|class) \w+", given.source, re.M)
        is_answer = "exercise" in given.metadata.get("tags", [])
        if is_answer and head and re.search(rf"^{head[0]}\b", cell.source, re.M):
            return known
    return None


def _as_given(cell: NotebookNode, given: NotebookNode) -> NotebookNode:
    made = deepcopy(given)
    if given.metadata["nbgrader"]["solution"]:
        made.source = cell.source
    return made


def _of_their_own(cell: NotebookNode) -> NotebookNode:
    made = deepcopy(cell)
    made.metadata.pop("nbgrader", None)
    return made


def _index(cells: list[NotebookNode], grade_id: str) -> int | None:
    ids = [cell.metadata.get("nbgrader", {}).get("grade_id") for cell in cells]
    return ids.index(grade_id) if grade_id in ids else None


def _told(grade_id: str) -> str:
    """A grade id in words: `exercise-tests-2` is `tests 2`."""
    return grade_id.replace("exercise-tests-", "tests ").replace("-", " ")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
