"""Exercises in notebooks: the format of their cells, and the student version derived from them.

An exercise is a markdown cell tagged `exercise-statement`, a code cell tagged `exercise` that holds
the worked solution between markers, and a code cell tagged `exercise-tests`, which may hold tests
that students do not see. The markers are nbgrader's.
"""

import re
from copy import deepcopy

from nbformat import NotebookNode

from course_utils.tools import CourseError
from course_utils.tools.notebooks.folding import fold
from course_utils.tools.notebooks.pairs import tags

STATEMENT = re.compile(
    r"### Exercise (?P<number>\d+): \S.*\n+"
    r"\*Difficulty [1-5]/5 · \d+ minutes · \d+ points? · (no GPU|needs a GPU)\*(\n|$)"
)
SOLUTION = ("### BEGIN SOLUTION", "### END SOLUTION")
HIDDEN = ("### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS")
KINDS = ("exercise-statement", "exercise", "exercise-tests")


def exercise_problems(nb: NotebookNode) -> list[str]:
    """What is wrong with the exercises of a notebook, one sentence each; empty if nothing is."""
    problems = []
    expected, number = KINDS[0], 0
    for place, cell in enumerate(nb.cells, 1):
        kind = next((tag for tag in tags(cell) if tag in KINDS), None)
        problems += [f"cell {place}: {problem}" for problem in _marker_problems(cell, kind)]
        if kind is None:
            continue
        if kind != expected:
            problems.append(f"cell {place}: tagged `{kind}` where `{expected}` should come next")
        expected = KINDS[(KINDS.index(kind) + 1) % len(KINDS)]
        if kind == "exercise-statement":
            number += 1
            found = STATEMENT.match(cell.source)
            if found is None or int(found["number"]) != number:
                problems.append(
                    f"cell {place}: a statement begins `### Exercise {number}: title`, then "
                    "`*Difficulty 2/5 · 10 minutes · 2 points · no GPU*` (or `needs a GPU`)"
                )
    if expected != KINDS[0]:
        problems.append(f"the last exercise has no cell tagged `{expected}`")
    return problems


def student_version(nb: NotebookNode, *, solved: bool = False) -> NotebookNode:
    """The notebook that students get: its opening (up to the first section after the parameters)
    and its exercises, with `raise NotImplementedError()` in place of each solution, without hidden
    tests and outputs. `solved` keeps solutions and hidden tests, to check that it stands alone.

    Raises `CourseError` if the notebook has no exercises.
    """
    kept = [*_opening(nb), *(cell for cell in nb.cells if set(tags(cell)) & set(KINDS))]
    if not any("exercise" in tags(cell) for cell in kept):
        raise CourseError("the notebook has no exercises: there is no student version of it.")
    student = NotebookNode(nb | {"cells": [deepcopy(cell) for cell in kept]})
    for cell in student.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if not solved:
            cell.source = _cut(stub(cell), HIDDEN)
        if "exercise" not in tags(cell):  # theirs to write, so open
            fold(cell)
    return student


def stub(cell: NotebookNode) -> str:
    """The source of an exercise's cell with `raise NotImplementedError()` in place of its solution."""
    return _cut(cell.source, SOLUTION, "raise NotImplementedError()")


def _opening(nb: NotebookNode) -> list[NotebookNode]:
    cells, past_parameters = [], False
    for cell in nb.cells:
        heading = cell.cell_type == "markdown" and re.match(r"#{1,3} ", cell.source)
        if set(tags(cell)) & set(KINDS) or (past_parameters and heading):
            break
        cells.append(cell)
        past_parameters |= "parameters" in tags(cell)
    return cells


def _marker_problems(cell: NotebookNode, kind: str | None) -> list[str]:
    problems = []
    for (begin, end), home in ((SOLUTION, "exercise"), (HIDDEN, "exercise-tests")):
        lines = [line.strip() for line in cell.source.splitlines()]
        found = [line for line in lines if line in (begin, end)]
        if found and kind != home:
            problems.append(f"`{found[0]}` outside a cell tagged `{home}`")
        elif found not in ([], [begin, end]):
            problems.append(f"`{begin}` and `{end}` come once each and in this order")
        elif kind == home == "exercise" and not found:
            problems.append(f"an exercise has its solution between `{begin}` and `{end}`")
    return problems


def _cut(source: str, markers: tuple[str, str], stub: str | None = None) -> str:
    begin, end = markers
    replacement = "" if stub is None else rf"\g<indent>{stub}\n"
    region = rf"^(?P<indent>[ \t]*){begin}[ \t]*\n.*?^[ \t]*{end}[ \t]*(\n|\Z)"
    return re.sub(region, replacement, source, flags=re.M | re.S).rstrip("\n")
