"""The notebooks of a course: where they are, and how a script becomes a notebook."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from course_utils.tools import CourseError

FOLDERS = ("foundations", "chronology", "distillation", "pruning")
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


@dataclass(frozen=True)
class Notebook:
    """One notebook of the course at `root`; `name` is `<folder>/<name>`."""

    root: Path
    name: str

    @property
    def script(self) -> Path:
        return self.root / f"{self.name}.py"

    @property
    def ipynb(self) -> Path:
        return self.root / f"{self.name}.ipynb"


def course_root(start: Path | None = None) -> Path:
    """The course's folder: `start` (default: the current folder) or the nearest one above it.

    Raises `CourseError` outside a clone of the course.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "pyproject.toml").is_file() and (folder / "course_utils").is_dir():
            return folder
    raise CourseError(f"{start} is not inside the course: change into your clone of it first.")


def find_notebooks(root: Path, names: list[str] | None = None) -> list[Notebook]:
    """The notebooks whose scripts lie in the course's folders; those in `names` if any are given.

    A name is `llm_int8_demo`, `chronology/llm_int8_demo`, or that with `.py` or `.ipynb`. Raises
    `CourseError` for a name that does not exist, and if there is no notebook at all.
    """
    every = [
        Notebook(root, f"{folder}/{script.stem}")
        for folder in FOLDERS
        for script in sorted((root / folder).glob("*.py"))
    ]
    if not every:
        raise CourseError(f"there is no notebook in {root}: none of {', '.join(FOLDERS)} has one.")
    if not names:
        return every
    asked = {Path(name).with_suffix("").as_posix(): name for name in names}
    for short, name in asked.items():
        if not any(short in (n.name, Path(n.name).name) for n in every):
            known = ", ".join(n.name for n in every)
            raise CourseError(f"there is no notebook {name!r}. There are: {known}.")
    return [n for n in every if n.name in asked or Path(n.name).name in asked]


def from_script(notebook: Notebook) -> NotebookNode:
    """The notebook that the script describes, without outputs.

    A cell's id comes from what is in it: moving or adding cells leaves the other ids as they are.
    """
    nb = jupytext.reads(notebook.script.read_text(encoding="utf-8"), fmt="py:percent")
    seen: Counter[str] = Counter()
    for cell in nb.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        seen[digest] += 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        cell.metadata = NotebookNode({"tags": cell.metadata["tags"]} if tags(cell) else {})
    nb.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    nb.nbformat, nb.nbformat_minor = 4, 5
    return nb


def tags(cell: NotebookNode) -> list[str]:
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


def tagged(nb: NotebookNode, tag: str) -> list[NotebookNode]:
    """The cells of a notebook that carry a tag."""
    return [cell for cell in nb.cells if tag in tags(cell)]
