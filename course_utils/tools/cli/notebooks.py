"""Commands on notebooks: run, build, check, student, lab."""

import time
from pathlib import Path
from typing import Annotated

import typer

from course_utils.tools.cli.shared import Names, ProfileOption, call, key_and_value, report_problems

app = typer.Typer(no_args_is_help=True)


@app.command()
def run(
    names: Names = None,
    profile: ProfileOption = "quick",
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", metavar="KEY=VALUE", help="A notebook's parameter."),
    ] = None,
) -> None:
    """Run notebooks from top to bottom, into runs/PROFILE.

    Examples: `course run`; `course run llm_int8_demo --profile cpu`;
    `course run llm_int8_demo -p SEED=1 -p MODEL=course-lm`.
    """
    import nbformat

    from course_utils.tools.notebooks.execute import execute, recorded
    from course_utils.tools.notebooks.fillings import unfilled
    from course_utils.tools.notebooks.pairs import course_root, find_notebooks, from_script
    from course_utils.tools.notebooks.reader import readers_version

    root = course_root()
    runs = root / "runs" / profile
    notebooks = find_notebooks(root, names)
    parameters = dict(key_and_value(text) for text in parameter or [])
    for number, notebook in enumerate(notebooks, 1):
        typer.echo(f"[{number}/{len(notebooks)}] {notebook.name} ... ", nl=False)
        start = time.monotonic()
        out = runs / f"{notebook.name}.ipynb"
        nb = execute(
            from_script(notebook), notebook.name, out,
            profile=profile, runs=runs, parameters=parameters,
        )  # fmt: skip
        nbformat.write(readers_version(nb, recorded(nb)), out)
        typer.echo(f"{time.monotonic() - start:.0f} s")
        for problem in unfilled(nb, recorded(nb)):  # a smaller profile may leave out a model
            typer.echo(f"  {problem}")
    typer.echo(f"\nThe executed notebooks are in {runs}. Read them with `make lab` (`course lab`).")


@app.command()
def build(
    names: Names = None,
    force: Annotated[bool, typer.Option(help="Also those whose stamp is still right.")] = False,
) -> None:
    """Build notebooks from their scripts, executed in the profile cpu.

    Only those are built whose script, or part of the package that they use, changed.
    Examples: `course build`; `course build llm_int8_demo --force`.
    """
    from course_utils.tools.notebooks import build as building
    from course_utils.tools.notebooks.pairs import course_root, find_notebooks

    for notebook in find_notebooks(course_root(), names):
        typer.echo(f"{notebook.name} ... ", nl=False)
        start = time.monotonic()
        built = building.build(notebook, force=force)
        typer.echo(f"built in {time.monotonic() - start:.0f} s" if built else "is up to date")


@app.command()
def check(names: Names = None) -> None:
    """Check that scripts, built notebooks, package and references agree. Runs no notebook.

    Warnings, on style, do not fail. Examples: `course check`; `course check llm_int8_demo`.
    """
    from course_utils.tools.notebooks.check import check as problems_of
    from course_utils.tools.notebooks.check import warnings
    from course_utils.tools.notebooks.pairs import course_root, find_notebooks

    notebooks = find_notebooks(course_root(), names)
    for warning in [warning for notebook in notebooks for warning in warnings(notebook)]:
        typer.echo(f"warning: {warning}")
    report_problems([problem for notebook in notebooks for problem in problems_of(notebook)])
    typer.echo(f"{len(notebooks)} notebooks checked: all agree.")


@app.command()
def student(
    name: Annotated[str, typer.Argument(help="A notebook, as `llm_int8_demo`.")],
    out: Annotated[Path, typer.Option(help="The .ipynb file to write.")],
) -> None:
    """Write a notebook's student version: set-up and exercises, without solutions.

    Example: `course student llm_int8_demo --out llm_int8_assignment.ipynb`.
    """
    import nbformat

    from course_utils.tools.notebooks.exercises import student_version
    from course_utils.tools.notebooks.pairs import course_root, find_notebooks, from_script

    (notebook,) = find_notebooks(course_root(), [name])
    out.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(student_version(from_script(notebook)), out)
    typer.echo(f"Wrote {out}.")


@app.command()
def lab() -> None:
    """Open JupyterLab on the course."""
    from course_utils.tools.notebooks.pairs import course_root

    call("jupyterlab", f"--ServerApp.root_dir={course_root()}")
