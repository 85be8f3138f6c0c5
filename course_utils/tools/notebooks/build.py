"""Building the committed notebooks from their scripts."""

from typing import Literal

import nbformat
from nbformat import NotebookNode

from course_utils.files import replacing
from course_utils.tools.notebooks.execute import NotebookFailed, execute, recorded
from course_utils.tools.notebooks.fillings import unfilled
from course_utils.tools.notebooks.pairs import Notebook, from_script, tags
from course_utils.tools.notebooks.reader import readers_version
from course_utils.tools.notebooks.stamps import stamp, versions
from course_utils.tools.notebooks.standard_cells import write_standard_cells

PROFILE = "cpu"  # the profile whose outputs are committed
WIDGETS = "application/vnd.jupyter.widget-view+json"


def build(notebook: Notebook, *, force: bool = False) -> Literal["code", "text"] | None:
    """Write the standard cells into the script, then the executed notebook beside it.

    Returns what was built anew. A notebook whose stamp is that of today is left alone (None), and one whose
    text alone changed keeps the outputs of its code ("text"), unless `force`. Raises `NotebookFailed`, and
    then leaves the notebook as it was.
    """
    script = notebook.script.read_text(encoding="utf-8")
    standard = write_standard_cells(script, notebook.name)
    if standard != script:
        notebook.script.write_text(standard, encoding="utf-8", newline="\n")
    today = stamp(notebook)
    if not force and notebook.ipynb.exists():
        built = read(notebook)
        if built_from(built) == today:
            return None
        if built_from(built).get("package") == today["package"]:
            nb = _with_outputs_of(built, from_script(notebook), notebook.name)
            if nb is not None:
                nb.metadata["course"] = built.metadata["course"] | today
                write(nb, notebook)
                return "text"
    runs = notebook.root / "runs" / PROFILE
    out = runs / f"{notebook.name}.ipynb"
    nb = execute(from_script(notebook), notebook.name, out, profile=PROFILE, runs=runs)
    entries = recorded(nb)
    if problems := unfilled(nb, entries):
        raise NotebookFailed(f"{notebook.name}, {'; '.join(problems)}. See {out}.")
    nb = readers_version(canonical(nb), entries)
    nb.metadata["course"] = {
        "profile": PROFILE, **today, "versions": versions(), "recorded": entries
    }  # fmt: skip
    write(nb, notebook)
    return "code"


def _with_outputs_of(built: NotebookNode, nb: NotebookNode, name: str) -> NotebookNode | None:
    """`nb` as readers get it, with the outputs of `built`; None if its code is other code."""
    entries = built.metadata["course"]["recorded"]
    problems = unfilled(nb, entries)
    nb = readers_version(canonical(nb), entries)
    cells, executed = (
        [cell for cell in of.cells if cell.cell_type == "code"] for of in (nb, built)
    )
    if [cell.source for cell in cells] != [cell.source for cell in executed]:
        return None
    if problems:
        raise NotebookFailed(f"{name}, {'; '.join(problems)}. It was recorded by no run.")
    for cell, before in zip(cells, executed, strict=True):
        cell.outputs, cell.execution_count = before.outputs, before.execution_count
    return nb


def write(nb: NotebookNode, notebook: Notebook) -> None:
    """Make `nb` the committed notebook."""
    nbformat.validate(nb)
    with replacing(notebook.ipynb) as partial:
        partial.write_text(nbformat.writes(nb) + "\n", encoding="utf-8", newline="\n")


def read(notebook: Notebook) -> NotebookNode:
    """The committed notebook."""
    return nbformat.read(notebook.ipynb, as_version=4)


def built_from(nb: NotebookNode) -> dict[str, str]:
    """The stamp that a built notebook carries; empty if it was not built by `build`."""
    course = nb.metadata.get("course", {})
    return {key: course[key] for key in ("script", "package") if key in course}


def canonical(nb: NotebookNode) -> NotebookNode:
    """An executed notebook without what differs from run to run though the outputs do not.

    Leaves out papermill's and Jupyter's times, and the state of widgets, over which GitHub refuses
    to show a notebook. Cells are numbered by order.
    """
    nb.metadata = nbformat.from_dict({"kernelspec": nb.metadata["kernelspec"]})
    nb.metadata["language_info"] = {"name": "python"}
    count = 0
    for cell in nb.cells:
        found = tags(cell)
        cell.metadata = nbformat.from_dict({"tags": found} if found else {})
        if cell.cell_type != "code":
            continue
        if cell.execution_count is not None:
            count += 1
            cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            output.get("data", {}).pop(WIDGETS, None)
    return nb
