"""Exercises in notebooks: the format of their cells.

An exercise is a markdown cell tagged `exercise-statement`, a code cell tagged `exercise` that holds
the worked solution between markers, and a code cell tagged `exercise-tests`, which may hold tests
that students do not see. The markers are nbgrader's. Modules that hold the answer stand in tags of the
statement, as `refuses:course_utils.quantizers.gptq`; `students` derives what students get.
"""

import re
from dataclasses import asdict, dataclass

from nbformat import NotebookNode

from course_utils.tools import CourseError
from course_utils.tools.notebooks.pairs import tagged, tags

STATEMENT = re.compile(
    r"### Exercise (?P<number>\d+): (?P<title>\S.*)\n+"
    r"\*Difficulty (?P<difficulty>[1-5])/5 · (?P<minutes>\d+) minutes · (?P<points>\d+) points? · "
    r"(no GPU|needs a GPU)\*(\n|$)"
)
REFUSES = "refuses:"
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


@dataclass(frozen=True)
class Exercise:
    """One exercise as its statement's head says it; `refuses` are the modules that hold its answer."""

    number: int
    title: str
    difficulty: int
    minutes: int
    points: int
    refuses: tuple[str, ...]

    def as_dict(self) -> dict:
        """What a notebook's metadata keep of it."""
        return asdict(self) | {"refuses": list(self.refuses)}


def exercises_of(nb: NotebookNode) -> list[Exercise]:
    """The exercises of a notebook, in order. Raises `CourseError` where one is not in the format."""
    problems = exercise_problems(nb)
    if problems:
        raise CourseError(f"its exercises are not in the format: {problems[0]}.")
    found = []
    for cell in tagged(nb, KINDS[0]):
        head = STATEMENT.match(cell.source)
        numbers = {key: int(head[key]) for key in ("number", "difficulty", "minutes", "points")}
        found.append(Exercise(title=head["title"], refuses=refused_by(cell), **numbers))
    return found


def refused_by(cell: NotebookNode) -> tuple[str, ...]:
    """The modules that the statement of an exercise refuses."""
    return tuple(tag.removeprefix(REFUSES) for tag in tags(cell) if tag.startswith(REFUSES))


def stub(cell: NotebookNode, message: str = "") -> str:
    """The source of an exercise's cell with `raise NotImplementedError()` in place of its solution."""
    told = f'"{message}"' if message else ""
    return cut(cell.source, SOLUTION, f"raise NotImplementedError({told})")


def without_hidden_tests(cell: NotebookNode) -> str:
    """The source of a cell of tests as students see it."""
    return cut(cell.source, HIDDEN)


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


def cut(source: str, markers: tuple[str, str], stub: str | None = None) -> str:
    """`source` without what stands between two markers, or with the line `stub` in its place."""
    begin, end = markers
    replacement = "" if stub is None else rf"\g<indent>{stub}\n"
    region = rf"^(?P<indent>[ \t]*){begin}[ \t]*\n.*?^[ \t]*{end}[ \t]*(\n|\Z)"
    return re.sub(region, replacement, source, flags=re.M | re.S).rstrip("\n")
