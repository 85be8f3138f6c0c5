"""What readers see beyond the script: numbers in the text, stubs of exercises, folded cells."""

from copy import deepcopy

from nbformat import NotebookNode

from course_utils.tools.notebooks.exercises import stub
from course_utils.tools.notebooks.fillings import fill
from course_utils.tools.notebooks.folding import fold
from course_utils.tools.notebooks.pairs import tags

TRY_FIRST = """\


**Try it first.** Complete this function in a new cell between the next one and the tests. The next cell
holds a worked solution, folded.

```python
{stub}
```"""


def readers_version(nb: NotebookNode, recorded: list[dict]) -> NotebookNode:
    """A script's notebook, executed or not, as readers get it.

    `recorded`: entries of the run that its text tells of; each has a key, model and value.
    """
    nb = deepcopy(nb)
    for place, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown":
            cell.source = fill(cell.source, recorded)
        if "exercise-statement" in tags(cell):
            following = nb.cells[place + 1 : place + 2]
            cell.source += "".join(
                TRY_FIRST.format(stub=stub(next_cell)) for next_cell in following
            )
        fold(cell)
    return nb
