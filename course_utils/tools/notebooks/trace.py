"""Whether a notebook's files are all that it runs: the proof by trial of what `sources` reads.

A run under the variables of `tracing` notes each file of the package that runs a function, in the
kernel and in every Python that it starts. `untracked` tells which of them a notebook's stamp leaves out:

    variables = tracing(folder)
    execute(nb, name, out, profile="quick", runs=runs, variables=variables)
    assert untracked(folder, notebook) == []
"""

import os
from collections.abc import Mapping
from pathlib import Path

from course_utils.tools import CourseError
from course_utils.tools.notebooks import tracer
from course_utils.tools.notebooks.pairs import Notebook
from course_utils.tools.notebooks.sources import sources_used

START = "import runpy\n\nrunpy.run_path({tracer!r})['start']({log!r}, {folder!r})\n"
LOG = "trace.tsv"


def tracing(folder: Path, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables with which every Python process notes into `folder` which files run a function.

    They are to be set over `environment`, whose `PYTHONPATH` stays behind `folder`: a `sitecustomize.py`
    on it still runs.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    start = START.format(tracer=tracer.__file__, log=str(folder / LOG), folder=str(folder))
    (folder / "sitecustomize.py").write_text(start, encoding="utf-8")
    paths = [str(folder), environment.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def files_run(folder: Path) -> dict[str, str]:
    """The files below `course_utils` that ran a function, with the first of their functions.

    Raises `CourseError` if no trace was taken into `folder`.
    """
    log = folder / LOG
    if not log.is_file():
        raise CourseError(
            f"no trace in {folder}: run the notebook under the variables of `tracing`."
        )
    lines = log.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in reversed(lines))


def untracked(folder: Path, notebook: Notebook) -> list[str]:
    """What ran though the notebook's stamp does not count it, one sentence a file; empty if nothing did."""
    package = notebook.root / "course_utils"
    counted = {
        file.relative_to(package).as_posix() for file in sources_used(notebook.script, package)
    }
    return [
        f"{notebook.name} runs {function} of course_utils/{file}, which its stamp does not count: import "
        "it where it is used"
        for file, function in sorted(files_run(folder).items())
        if file not in counted
    ]
