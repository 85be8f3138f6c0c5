"""Whether scripts, committed notebooks, package and references agree. Runs nothing."""

import ast
import re
from statistics import median

from nbformat import NotebookNode

from course_utils import references
from course_utils.results import compare
from course_utils.tools.notebooks.build import PROFILE, WIDGETS, built_from, read
from course_utils.tools.notebooks.execute import recorded, shell_lines
from course_utils.tools.notebooks.exercises import exercise_problems, refused_by
from course_utils.tools.notebooks.fillings import filling_problems, unfilled
from course_utils.tools.notebooks.folding import folding_problems, is_folded
from course_utils.tools.notebooks.pairs import Notebook, from_script, tagged, tags
from course_utils.tools.notebooks.reader import readers_version
from course_utils.tools.notebooks.stamps import stamp
from course_utils.tools.notebooks.standard_cells import SETUP, first_line
from course_utils.tools.notebooks.students import leaks

MAX_LINES, MAX_LINES_EXERCISE, MAX_COLUMNS = 26, 40, 88  # lines that are not blank
MEDIAN_LINES = 8
MAX_BYTES = 1_000_000  # GitHub shows no larger notebook


def check(notebook: Notebook) -> list[str]:
    """What is wrong with a notebook, one sentence each with its remedy; empty if nothing is."""
    nb = from_script(notebook)
    problems = _standard_cell_problems(nb, notebook)
    problems += _code_problems(nb)
    problems += _exercise_problems(nb, notebook)
    problems += filling_problems(nb)
    problems += folding_problems(nb)
    problems += _citation_problems(nb, notebook)
    if not notebook.ipynb.exists():
        problems.append(f"it was never built: run `course build {notebook.name}`")
    else:
        problems += _built_problems(nb, notebook)
    return [f"{notebook.name}: {problem}" for problem in problems]


def warnings(notebook: Notebook) -> list[str]:
    """What a notebook's style lacks, one sentence each; to make one a problem, move it to `check`."""
    nb = from_script(notebook)
    found = []
    open_cells = [
        cell
        for cell in nb.cells
        if cell.cell_type == "code" and not is_folded(cell) and "exercise-tests" not in tags(cell)
    ]
    lines = median([len(_lines(cell)) for cell in open_cells] or [0])
    if lines > MEDIAN_LINES:
        found.append(
            f"half of its code cells have {lines:g} lines or more, at most {MEDIAN_LINES}: one idea a "
            "cell, and fold what does not teach"
        )
    texts = [cell.source for cell in nb.cells if cell.cell_type == "markdown"]
    if not any(re.search(r"^## What you saw$", text, re.M) for text in texts):
        found.append("it has no section `## What you saw`, which answers what its opening promises")
    silent = sum(_silent(cell) for cell in tagged(nb, "exercise-tests"))
    if silent:
        found.append(
            f"{silent} assertions of its exercises have no message: name the likely mistake"
        )
    return [f"{notebook.name}: {warning}" for warning in found]


def _silent(cell: NotebookNode) -> int:
    """How many assertions of a cell say nothing when they fail."""
    nodes = ast.walk(ast.parse(cell.source))
    return sum(isinstance(node, ast.Assert) and node.msg is None for node in nodes)


def _standard_cell_problems(nb: NotebookNode, notebook: Notebook) -> list[str]:
    remedy = f"run `course build {notebook.name}`"
    problems = []
    for tag in ("badge", "setup", "parameters"):
        if len(tagged(nb, tag)) != 1:
            problems.append(f"{len(tagged(nb, tag))} cells are tagged `{tag}`: there is to be one")
    if "badge" not in tags(nb.cells[0]):
        problems.append("the first cell is not the one tagged `badge`")
    for cell in tagged(nb, "badge"):
        exercises = any(tag.startswith("exercise") for cell in nb.cells for tag in tags(cell))
        if cell.source.splitlines()[:1] != [first_line(notebook.name, exercises)]:
            problems.append(f"the badge is not this notebook's: {remedy}")
        if not any(line.startswith("# ") for line in cell.source.splitlines()):
            problems.append("the cell tagged `badge` holds no title: write one below the badge")
    for cell in tagged(nb, "setup"):
        if cell.source != SETUP.rstrip("\n"):
            problems.append(f"the set-up cell is not the standard one: {remedy}")
    return problems


def _exercise_problems(nb: NotebookNode, notebook: Notebook) -> list[str]:
    """What is wrong with exercises; if nothing is, what their student version would give away."""
    problems = exercise_problems(nb)
    for module in {m for cell in tagged(nb, "exercise-statement") for m in refused_by(cell)}:
        path = notebook.root.joinpath(*module.split("."))
        if not (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()):
            problems.append(f"an exercise refuses {module}, which is no module of the course")
    return problems or leaks(nb)


def _code_problems(nb: NotebookNode) -> list[str]:
    problems = []
    for number, cell in enumerate(nb.cells, 1):
        lines = _lines(cell)
        if cell.cell_type != "code" or "setup" in tags(cell):
            continue
        exercise = any(tag.startswith("exercise") for tag in tags(cell))
        limit = MAX_LINES_EXERCISE if exercise else MAX_LINES
        if len(lines) > limit:
            problems.append(f"cell {number} has {len(lines)} lines, at most {limit}: split it")
        problems += [
            f"cell {number} has a line of {len(line)} columns, at most {MAX_COLUMNS}: {line.strip()}"
            for line in lines
            if len(line) > MAX_COLUMNS
        ]
    problems += [
        f"cell {number}: {line} passes when the command fails; use subprocess.run(check=True)"
        for number, line in shell_lines(nb)
    ]
    return problems


def _citation_problems(nb: NotebookNode, notebook: Notebook) -> list[str]:
    cited = [
        (number, key)
        for number, cell in enumerate(nb.cells, 1)
        for key in references.cited(cell.source)
    ]
    known = references.load(notebook.root) if cited else {}
    return [
        f"cell {number} cites @{key}, which docs/references.bib does not have"
        for number, key in cited
        if key not in known
    ]


def _built_problems(nb: NotebookNode, notebook: Notebook) -> list[str]:
    built = read(notebook)
    remedy = f"run `course build {notebook.name}`"
    problems = []
    then, now = built_from(built), stamp(notebook)
    if not then:
        problems.append(f"the notebook carries no stamp: {remedy}")
    else:
        problems += [
            f"the {source} changed after the build: {remedy}"
            for source in now
            if then.get(source) != now[source]
        ]
    if built.metadata.get("course", {}).get("profile") != PROFILE:
        problems.append(f"its outputs are not those of the profile {PROFILE}: {remedy}")
    problems += _cell_problems(built, nb, remedy)
    entries = [entry | {"profile": PROFILE} for entry in recorded(built)]
    problems += [
        f"{deviation}: run `course results accept`, or find out why the value moved"
        for deviation in (compare(notebook.root, entries) if entries else [])
    ]
    size = notebook.ipynb.stat().st_size
    if size >= MAX_BYTES:
        problems.append(f"the notebook has {size:,} bytes, at most {MAX_BYTES:,}: smaller figures")
    problems += _output_problems(built)
    return problems


def _cell_problems(built: NotebookNode, nb: NotebookNode, remedy: str) -> list[str]:
    """Whether cells are what `readers_version` makes of the script's and of the run's records."""
    entries = recorded(built)
    expected = readers_version(nb, entries).cells
    if [cell.id for cell in built.cells] != [cell.id for cell in expected]:
        return [f"its cells are not those of the script: edit the script, then {remedy}"]
    problems = unfilled(nb, entries)
    for number, (cell, wanted) in enumerate(zip(built.cells, expected, strict=True), 1):
        if any(cell[part] != wanted[part] for part in ("cell_type", "source", "metadata")):
            problems.append(
                f"cell {number} is not what the script and the run's records make it: "
                f"edit the script, then {remedy}"
            )
    return problems


def _output_problems(built: NotebookNode) -> list[str]:
    problems = []
    if "widgets" in built.metadata:
        problems.append("its metadata holds widgets, so GitHub will not show it: use tqdm.std")
    for number, cell in enumerate(built.cells, 1):
        if cell.cell_type != "code":
            continue
        if cell.source.strip() and cell.execution_count is None:
            problems.append(f"cell {number} was not run")
        for output in cell.outputs:
            if output.output_type == "error":
                problems.append(f"cell {number} ends in {output.ename}: {output.evalue}")
            if WIDGETS in output.get("data", {}):
                problems.append(f"cell {number} shows a widget, which only Jupyter can: print text")
    return problems


def _lines(cell: NotebookNode) -> list[str]:
    return [line for line in cell.source.splitlines() if line.strip()]
