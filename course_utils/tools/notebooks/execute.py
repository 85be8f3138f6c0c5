"""Running notebooks with papermill, and catching what papermill lets pass.

papermill ends well although a `!command` failed, a cell left by `sys.exit(0)`, a parameter was
unknown, or there was no cell for parameters. Here each of these is a failure.
"""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import papermill
from ipykernel.kernelspec import make_ipkernel_cmd, write_kernel_spec
from IPython.core.inputtransformer2 import TransformerManager
from nbclient.exceptions import CellControlSignal, DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from course_utils.results import list_runs
from course_utils.tools import CourseError
from course_utils.tools.notebooks.pairs import tagged, tags

CELL_TIMEOUT = 900  # seconds; no notebook may take longer than that in any profile
SHELL = re.compile(
    r"get_ipython\(\)\.(system|getoutput|run_line_magic\('(system|sx|sc|pip|conda|uv)'|"
    r"run_cell_magic\('(system|sx|script|bash|sh|cmd)')"
)


class NotebookFailed(CourseError):
    """A notebook did not run as it should; the message names notebook, cell and error."""


def execute(
    nb: NotebookNode,
    name: str,
    out: Path,
    *,
    profile: str,
    runs: Path,
    parameters: dict | None = None,
    python: str = sys.executable,
    variables: dict[str, str] | None = None,
) -> NotebookNode:
    """Run a notebook from its first cell to its last, and write the executed notebook to `out`.

    The kernel is `python`, by default this process's own, in an empty folder, with `profile` in
    `COURSE_PROFILE` and `variables` beside it. What it records goes to `runs`, beside earlier runs'
    records; `recorded` finds this one's in the executed notebook. Variables are
    set in this process for as long as it runs: one notebook a process. Raises `NotebookFailed`.
    """
    parameters = parameters or {}
    _refuse_before(nb, name, parameters)
    out.parent.mkdir(parents=True, exist_ok=True)
    failure = None
    with tempfile.TemporaryDirectory(prefix="course-") as folder:
        scratch = Path(folder)
        source, result, cwd = scratch / "source.ipynb", scratch / "result.ipynb", scratch / "empty"
        cwd.mkdir()
        nbformat.write(nb, source)
        course = {"COURSE_PROFILE": profile, "COURSE_RUNS": str(scratch / "runs")}
        with set_environment(course | (variables or {}) | kernel_of_its_own(scratch, python)):
            try:
                papermill.execute_notebook(
                    source,
                    result,
                    parameters,
                    kernel_name="python3",
                    cwd=cwd,
                    execution_timeout=CELL_TIMEOUT,
                    progress_bar=False,
                    coalesce_streams=True,
                )
            except PapermillExecutionError as error:
                failure = f"{error.ename}: {error.evalue}"
            except (CellControlSignal, DeadKernelError) as error:
                failure = str(error).strip().splitlines()[0]
        executed = nbformat.read(result, as_version=4)
        executed.metadata["course"] = {"recorded": _take_over(scratch / "runs", runs)}
        nbformat.write(executed, out)
    _refuse_after(executed, name, out, failure)
    return executed


def recorded(nb: NotebookNode) -> list[dict]:
    """What the run of an executed or built notebook recorded: key, model, value, unit and protocol."""
    return nb.metadata.get("course", {}).get("recorded", [])


def parameter_names(nb: NotebookNode) -> list[str]:
    """The names that a notebook's `parameters` cell assigns."""
    return list(papermill.inspect_notebook(nb))


def shell_lines(nb: NotebookNode) -> list[tuple[int, str]]:
    """(cell number, line as IPython runs it) of shell commands: they pass when they fail."""
    found = []
    for number, cell in enumerate(nb.cells, 1):
        if cell.cell_type == "code":
            plain = TransformerManager().transform_cell(cell.source)
            found += [(number, line.strip()) for line in plain.splitlines() if SHELL.search(line)]
    return found


def _refuse_before(nb: NotebookNode, name: str, parameters: dict) -> None:
    if len(tagged(nb, "parameters")) != 1:
        raise NotebookFailed(
            f"{name}: a notebook has one cell tagged `parameters`, "
            f"this has {len(tagged(nb, 'parameters'))}."
        )
    known = parameter_names(nb)
    for parameter in parameters:
        if parameter not in known:
            raise NotebookFailed(
                f"{name}: no parameter {parameter!r}; its parameters are {', '.join(known)}."
            )
    for number, line in shell_lines(nb):
        raise NotebookFailed(
            f"{name}, cell {number}: {line} passes when the command fails; "
            "use subprocess.run([...], check=True)."
        )


def _refuse_after(nb: NotebookNode, name: str, out: Path, failure: str | None) -> None:
    own = [cell for cell in nb.cells if "injected-parameters" not in tags(cell)
           and "papermill-error-cell-tag" not in tags(cell)]  # fmt: skip
    for number, cell in enumerate(own, 1):
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        errors = [f"{o.ename}: {o.evalue}" for o in cell.outputs if o.output_type == "error"]
        status = cell.metadata.get("papermill", {}).get("status")
        if errors or status != "completed" or cell.execution_count is None:
            reason = failure or (errors or ["it did not run to its end"])[0]
            line = cell.source.strip().splitlines()[0]
            raise NotebookFailed(
                f"{name}, cell {number} ({line}): {reason.rstrip('.')}. See {out}."
            )
    if failure is not None:
        raise NotebookFailed(f"{name}: {failure.rstrip('.')}. See {out}.")


def _take_over(own: Path, runs: Path) -> list[dict]:
    """Move a run's records to those of other runs, where they replace older ones of the same name."""
    entries = list_runs(own)
    for file in (own / "results").glob("*.json"):
        (runs / "results").mkdir(parents=True, exist_ok=True)
        shutil.move(file, runs / "results" / file.name)
    told = ("key", "model", "value", "unit", "protocol")
    return [{name: entry[name] for name in told} for entry in entries]


def kernel_of_its_own(scratch: Path, python: str = sys.executable) -> dict[str, str]:
    """Variables that keep the user's own Jupyter settings out of a run.

    A kernel called python3 in the user's folder may belong to another Python: the one written here
    is found first. The scripts that IPython runs at its start are the user's, too.
    """
    quiet = ["--log-level=ERROR"]  # ipykernel warns of TCP on this machine, which is not news
    command = make_ipkernel_cmd(executable=python, extra_arguments=quiet)
    write_kernel_spec(scratch / "jupyter" / "kernels" / "python3", overrides={"argv": command})
    return {"JUPYTER_PATH": str(scratch / "jupyter"), "IPYTHONDIR": str(scratch / "ipython")}


@contextmanager
def set_environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables, which the kernel inherits, for a while."""
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
