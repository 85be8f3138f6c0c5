"""Student versions: a small notebook of its own, with the set-up and the exercises of a course notebook.

Nothing in it is written by hand. Of the opening it keeps what the exercises use, so that no import hands
over an answer. In place of solutions stand stubs that raise; the cells of tests are tagged
`raises-exception`, with which JupyterLab's Run All goes on to the next exercise. A cell of its own refuses
the modules that the exercises name, with the reason.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterable
from copy import deepcopy

import nbformat
from nbformat import NotebookNode

from course_utils import REPOSITORY, REVISION
from course_utils.tools import CourseError
from course_utils.tools.notebooks.exercises import (
    KINDS,
    Exercise,
    exercises_of,
    stub,
    without_hidden_tests,
)
from course_utils.tools.notebooks.folding import fold
from course_utils.tools.notebooks.pairs import KERNEL, tagged, tags
from course_utils.tools.notebooks.standard_cells import ASSIGNMENTS, badge

COLUMNS = 88
# What stands in the place of a module that an exercise refuses. Names that begin with __ are asked for by
# Python itself, for tracebacks and imports, and are simply not there.
GUARD = """\
# Refuses the modules that hold the answers of these exercises.
import importlib
import sys
import types

REFUSED = {refused}


class Refused(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        told = f"{{self.__name__}} is refused here: {{REFUSED[self.__name__]}}"
        raise ImportError(f"{{told}} asks you to write it yourself.")


for name in REFUSED:
    parent, _, last = name.rpartition(".")
    sys.modules[name] = Refused(name)
    setattr(importlib.import_module(parent), last, sys.modules[name])"""

ABOUT = """\
**This is the student version**: {count} exercises, {points} points, about {minutes} minutes. It goes with \
the notebook [{name}]({page}); read that first, up to its exercises.

- Replace each `raise NotImplementedError(...)` by your code; run the cell, then the tests below it.
- A test that fails says what is likely wrong. Run All goes on past it where the editor follows the tag \
`raises-exception`, as JupyterLab does; elsewhere run the cells one by one.
- The cell of tests is worth the exercise's points, all or none. When it is graded, further tests are added \
that you do not see: they try other inputs.
- Keep the file's name and its cells; cells of your own may stand between them. What is graded is a new run \
of this file, from its first cell to its last.
- `python -m course_utils self-check FILE` runs the tests that you see, and tells your points.{refused}

| Exercise | Difficulty | Minutes | Points |
| --- | --- | --- | --- |
{rows}"""


def student_version(nb: NotebookNode, name: str, *, solved: bool = False) -> NotebookNode:
    """The notebook that students get, from the script's notebook `nb`, `<folder>/<name>`.

    `solved` keeps solutions and hidden tests: the teacher's version. Each cell has nbgrader's metadata.
    Raises `CourseError` if the notebook has no exercises.
    """
    if not tagged(nb, "exercise"):
        raise CourseError(f"{name} has no exercises: there is no student version of it.")
    exercises = exercises_of(nb)
    refused = _refused(exercises)
    cells = [_head(nb, name, exercises), *_opening(nb)]
    if refused:
        cells.append(_new_cell("code", GUARD.format(refused=_literal(refused)), ["setup"]))
    for place, cell in enumerate(cells):
        _finish(cell, f"opening-{place}")
    number = 0
    for cell in (deepcopy(cell) for cell in nb.cells if _kind(cell)):
        number += _kind(cell) == KINDS[0]
        exercise = exercises[number - 1]
        if not solved:
            cell.source = stub_of(cell, exercise)
        _finish(cell, f"{_kind(cell)}-{number}", exercise.points)
        cells.append(cell)
    student = NotebookNode(cells=cells, nbformat=4, nbformat_minor=5)
    told = {"assignment": name, "exercises": [exercise.as_dict() for exercise in exercises]}
    student.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": {"name": "python"}, "course": told}
    )
    return student


def stub_of(cell: NotebookNode, exercise: Exercise) -> str:
    """A cell of an exercise as students get it: its stub names the exercise."""
    if "exercise" in tags(cell):
        title = exercise.title.replace('"', "'").replace("\\", "/")
        return stub(cell, f"Exercise {exercise.number}, {title}: put your code here")
    return without_hidden_tests(cell) if "exercise-tests" in tags(cell) else cell.source


def leaks(nb: NotebookNode) -> list[str]:
    """What a student version's opening hands over, one sentence each; empty if nothing is."""
    exercises = exercises_of(nb)
    refused = _refused(exercises)
    written = {defined for cell in tagged(nb, "exercise") for defined in _defined(cell.source)}
    problems = []
    for module, imported, bound in _imports(_opening(nb)):
        for answer in refused:
            whole = f"{module}.{imported}" if imported else module
            if f"{whole}.".startswith(f"{answer}."):
                problems.append(
                    f"the exercises use {bound} of {answer}, which an exercise refuses: "
                    "take it from another exercise, or write out what it does"
                )
        if bound in written or imported in written:
            problems.append(
                f"the opening imports {imported or bound}, and an exercise asks for it: rename one"
            )
    return problems


def _head(nb: NotebookNode, name: str, exercises: list[Exercise]) -> NotebookNode:
    """The first cell: the student version's own badge, the notebook's title, and what this is."""
    head = next(iter(tagged(nb, "badge")), None)
    titles = re.findall(r"^# .*$", head.source, re.M) if head else []
    page = f"https://github.com/{REPOSITORY}/blob/{REVISION}/{name}.ipynb"
    rows = [
        f"| {e.number}. {e.title} | {e.difficulty}/5 | {e.minutes} | {e.points} |"
        for e in exercises
    ]
    refused = _refused(exercises)
    about = ABOUT.format(
        count=len(exercises),
        points=sum(e.points for e in exercises),
        minutes=sum(e.minutes for e in exercises),
        name=name,
        page=page,
        rows="\n".join(rows),
        refused="\n- Importing "
        + ", ".join(f"`{m}`" for m in refused)
        + " is refused: it holds answers."
        if refused
        else "",
    )
    title = titles[0] if titles else f"# {name}"
    return _new_cell("markdown", f"{badge(name, ASSIGNMENTS)}\n\n{title}\n\n{about}", ["badge"])


def _opening(nb: NotebookNode) -> list[NotebookNode]:
    """The code before the first section after the parameters, without imports that no exercise uses."""
    cells, past_parameters = [], False
    for cell in nb.cells:
        heading = cell.cell_type == "markdown" and re.search(r"^#{1,3} ", cell.source, re.M)
        if _kind(cell) or (past_parameters and heading):
            break
        if cell.cell_type == "code":
            cells.append(deepcopy(cell))
        past_parameters |= "parameters" in tags(cell)
    exercises = [c.source for c in nb.cells if _kind(c) in ("exercise", "exercise-tests")]
    others = [_without_imports(cell.source) for cell in cells if "setup" not in tags(cell)]
    used = {name for source in [*exercises, *others] for name in _names(source)}
    for cell in cells:
        if "setup" not in tags(cell):
            cell.source = _prune(cell.source, used)
    return [cell for cell in cells if cell.source.strip()]


def _prune(source: str, used: set[str]) -> str:
    """`source` with only those imports that bind a name in `used`; all else as it is."""
    lines = source.split("\n")
    for node in reversed(ast.parse(source).body):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        kept = [alias for alias in node.names if _bound(alias) in used]
        if len(kept) < len(node.names):
            node.names = kept
            lines[node.lineno - 1 : node.end_lineno] = _written(node) if kept else []
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def _written(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The lines of an import, one name a line where it is too long for one line."""
    line = ast.unparse(node)
    if len(line) <= COLUMNS:
        return [line]
    head, _, names = line.partition(" import ")
    return [f"{head} import (", *(f"    {name}," for name in names.split(", ")), ")"]


def _bound(alias: ast.alias) -> str:
    return alias.asname or alias.name.split(".")[0]


def _imports(cells: Iterable[NotebookNode]) -> list[tuple[str, str, str]]:
    """(module, name in it or nothing, name that it is bound to) of what cells import."""
    found = []
    for cell in cells:
        if "setup" in tags(cell):
            continue
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom):
                found += [(node.module or "", a.name, _bound(a)) for a in node.names]
            elif isinstance(node, ast.Import):
                found += [(a.name, "", _bound(a)) for a in node.names]
    return found


def _without_imports(source: str) -> str:
    body = [n for n in ast.parse(source).body if not isinstance(n, ast.Import | ast.ImportFrom)]
    return ast.unparse(ast.Module(body, type_ignores=[]))


def _names(source: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


def _defined(source: str) -> set[str]:
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name for node in ast.parse(source).body if isinstance(node, kinds)}


def _refused(exercises: list[Exercise]) -> dict[str, str]:
    """The modules that a notebook's exercises refuse, each with the exercises that do."""
    by_module: dict[str, list[int]] = {}
    for exercise in exercises:
        for module in exercise.refuses:
            by_module.setdefault(module, []).append(exercise.number)
    return {
        module: "exercise " + " and ".join(map(str, numbers))
        for module, numbers in by_module.items()
    }


def _literal(refused: dict[str, str]) -> str:
    entries = "".join(f"    {json.dumps(k)}: {json.dumps(v)},\n" for k, v in refused.items())
    return f"{{\n{entries}}}"


def _kind(cell: NotebookNode) -> str | None:
    return next((tag for tag in tags(cell) if tag in KINDS), None)


def _finish(cell: NotebookNode, grade_id: str, points: int = 0) -> None:
    """Add nbgrader's metadata to a cell, in place: what is locked, what is an answer, what gives points."""
    kind = _kind(cell)
    found = {"grade": False, "solution": False, "locked": True, "task": False}
    if kind == "exercise":
        found |= {"solution": True, "locked": False}
    elif kind == "exercise-tests":
        found |= {"grade": True, "points": points}
        cell.metadata["tags"] = [*tags(cell), "raises-exception"]
    found |= {"grade_id": grade_id, "schema_version": 3}
    cell.metadata["nbgrader"] = nbformat.from_dict(found)
    if cell.cell_type == "code":
        cell.outputs, cell.execution_count = [], None
    if kind != "exercise":  # theirs to write, so open
        fold(cell)


def _new_cell(kind: str, source: str, tags: list[str]) -> NotebookNode:
    make = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}[kind]
    digest = hashlib.sha256(f"student\n{source}".encode()).hexdigest()[:12]
    return make(source, id=digest, metadata={"tags": tags})
