"""Commands on notebooks: run, build, check, lab."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from course_utils.tools import CourseError
from course_utils.tools.cli.shared import (
    JobsOption,
    Names,
    ProfileOption,
    call,
    report_problems,
    runs_folder,
)
from course_utils.tools.parameters import key_and_value

if TYPE_CHECKING:
    from course_utils.tools.notebooks.pairs import Notebook

app = typer.Typer(no_args_is_help=True)


@app.command()
def run(
    names: Names = None,
    profile: ProfileOption = "quick",
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", metavar="KEY=VALUE", help="A notebook's parameter."),
    ] = None,
    jobs: JobsOption = None,
) -> None:
    """Run notebooks from top to bottom, into runs/PROFILE; report.json there says what each took.

    Examples: `course run`; `course run llm_int8_demo --profile cpu`; `course run --jobs 1`;
    `course run llm_int8_demo -p SEED=1 -p MODEL=course-lm`.
    """
    from course_utils.tools.notebooks.pairs import course_root, find_notebooks, from_script
    from course_utils.tools.notebooks.side_by_side import execute_all

    runs = runs_folder(profile)
    notebooks = find_notebooks(course_root(), names)
    execute_all(
        {notebook.name: from_script(notebook) for notebook in notebooks},
        profile=profile,
        runs=runs,
        jobs=jobs,
        parameters=dict(key_and_value(text) for text in parameter or []),
    )
    typer.echo(f"\nThe executed notebooks are in {runs}. Read them with `make lab` (`course lab`).")


@app.command()
def build(
    names: Names = None,
    force: Annotated[bool, typer.Option(help="Also those whose stamp is still right.")] = False,
    verify: Annotated[
        bool, typer.Option(help="Build none: renew stamps where the profile quick agrees.")
    ] = False,
) -> None:
    """Build notebooks from their scripts, executed in the profile cpu.

    Only those are built whose script, or a file of the package that they use, changed; where no code did,
    the outputs stay, and nothing is executed. After a change of the package that leaves the results as they
    are, `--verify` runs the profile quick instead: where all checked outputs and recorded values agree, it
    renews the stamp, and leaves the outputs.
    Examples: `course build`; `course build llm_int8_demo --force`; `course build --verify`.
    """
    from course_utils.tools.notebooks import build as building
    from course_utils.tools.notebooks.pairs import course_root, find_notebooks

    if force and verify:
        raise CourseError("--force builds all, --verify builds none: give one of them.")
    notebooks = find_notebooks(course_root(), names)
    if verify:
        return _verify(notebooks)
    for notebook in notebooks:
        typer.echo(f"{notebook.name} ... ", nl=False)
        start = time.monotonic()
        built = building.build(notebook, force=force)
        seconds = f"{time.monotonic() - start:.0f} s"
        told = {"code": f"built in {seconds}", "text": "its text is new, its outputs stay"}
        typer.echo(told.get(built, "is up to date"))


def _verify(notebooks: list["Notebook"]) -> None:
    from course_utils.tools.notebooks.verify import verify

    problems = []
    for notebook in notebooks:
        typer.echo(f"{notebook.name} ... ", nl=False)
        start = time.monotonic()
        found = verify(notebook)
        if found is None:
            typer.echo("is up to date")
        elif found:
            typer.echo("is left as it is")
            problems += found
        else:
            typer.echo(f"verified in {time.monotonic() - start:.0f} s")
    report_problems(problems)


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
def lab() -> None:
    """Open JupyterLab on the course."""
    from course_utils.tools.notebooks.pairs import course_root

    call("jupyterlab", f"--ServerApp.root_dir={course_root()}")
