"""Cells that do not teach are folded: readers see one line, and open the cell if they want to.

Tagged `setup` or `folded` (records, tolerances), a cell begins with a comment, which becomes that line.
Worked solutions are folded, too. JupyterLab reads `source_hidden`, Colab `cellView` and `#@title`.
"""

from nbformat import NotebookNode

from course_utils.tools.notebooks.pairs import tags

SOLUTION_TITLE = "Worked solution: try it first"


def fold(cell: NotebookNode) -> None:
    """Fold a cell, in place, if its tags ask for it."""
    kinds = tags(cell)
    if "exercise" in kinds:
        title, body = SOLUTION_TITLE, cell.source
    elif is_folded(cell):
        first, _, body = cell.source.partition("\n")
        title = first.lstrip("# ")
    else:
        return
    cell.source = f"#@title {title}\n{body}".rstrip("\n")
    cell.metadata["jupyter"] = {"source_hidden": True}
    cell.metadata["cellView"] = "form"


def is_folded(cell: NotebookNode) -> bool:
    """Whether readers see only a line of this cell of a script."""
    return bool({"setup", "folded", "exercise"} & set(tags(cell)))


def folding_problems(nb: NotebookNode) -> list[str]:
    """What is wrong with a script's cells tagged `folded`, one sentence each."""
    problems = []
    for number, cell in enumerate(nb.cells, 1):
        if "folded" not in tags(cell):
            continue
        if cell.cell_type != "code":
            problems.append(f"cell {number} is text: only code can be folded")
        elif not cell.source.startswith("# "):
            problems.append(
                f"cell {number} is folded: begin it with a comment that says what it does"
            )
    return problems
