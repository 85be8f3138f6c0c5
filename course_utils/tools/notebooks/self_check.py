"""A reader's own student notebook, run with the tests that it holds: points and hints, without a teacher.

It needs no clone of the course and no nbgrader, only the file. What it runs is the file itself, in a
kernel and an empty folder of its own; the file is left as it is.
"""

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError

from course_utils.tools import CourseError
from course_utils.tools.notebooks.classroom import Outcome, outcomes
from course_utils.tools.notebooks.execute import kernel_of_its_own, set_environment


def self_check(file: Path, seconds: int = 120) -> list[Outcome]:
    """What the visible tests say of each exercise in a student version, with `seconds` for a cell.

    Raises `CourseError` where the file is missing, cannot be read, or is no student version.
    """
    if not file.is_file():
        raise CourseError(f"there is no file {file}.")
    try:
        nb = nbformat.read(file, as_version=4)
    except Exception as error:  # whatever a broken file makes nbformat raise
        raise CourseError(f"{file} is no notebook that can be read: {error}") from error
    if "exercises" not in nb.metadata.get("course", {}):
        raise CourseError(
            f"{file} is no student version: `course student NAME --out FILE` writes one."
        )
    for cell in nb.cells:  # what was run before does not count
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    with TemporaryDirectory(prefix="course-") as folder:
        here = {"metadata": {"path": folder}}
        client = NotebookClient(
            nb, timeout=seconds, interrupt_on_timeout=True, allow_errors=True, resources=here
        )
        client.error_on_timeout = {
            "ename": "Timeout", "evalue": f"more than {seconds} s", "traceback": [],
        }  # fmt: skip
        variables = kernel_of_its_own(Path(folder)) | {"COURSE_PROFILE": "quick"}
        with set_environment(variables), suppress(CellControlSignal, DeadKernelError):
            client.execute()  # cells that were not run tell so
    return outcomes(nb)
