"""Measured values: `course results`."""

from collections.abc import Callable
from typing import Annotated

import typer

from course_utils.tools import CourseError
from course_utils.tools.cli.shared import ProfileOption, report_problems, runs_folder

app = typer.Typer(no_args_is_help=True)


@app.command("list")
def results_list(profile: ProfileOption = "cpu") -> None:
    """Show what runs in a profile recorded. Example: `course results list --profile quick`."""
    from course_utils.results import list_runs

    for entry in _results(list_runs, runs_folder(profile)):
        typer.echo(f"{entry['key']}  {entry['value']:.6g} {entry['unit']}  ({entry['model']})")


@app.command("accept")
def results_accept(
    profile: ProfileOption = "cpu",
    replace: Annotated[
        bool, typer.Option(help="Drop what the same keys were accepted with by another protocol.")
    ] = False,
) -> None:
    """Make what runs in a profile recorded the accepted values.

    Examples: `course results accept`; `course results accept --profile quick --replace`.
    """
    from course_utils.results import accept, list_runs
    from course_utils.tools.notebooks.pairs import course_root

    runs = _results(list_runs, runs_folder(profile))
    if not runs:
        raise CourseError(
            f"no values are recorded in {runs_folder(profile)}: `course run --profile {profile}` first."
        )
    _results(accept, course_root(), runs, replace=replace)
    typer.echo(f"{len(runs)} values accepted. Next: `course results fill`.")


@app.command("fill")
def results_fill() -> None:
    """Write the accepted values into the README. Example: `course results fill`."""
    from course_utils.results import fill
    from course_utils.tools.notebooks.pairs import course_root

    changed = _results(fill, course_root())
    typer.echo("\n".join(changed) if changed else "The README is up to date.")


@app.command("check")
def results_check() -> None:
    """Check that every number in the README has a source. Example: `course results check`."""
    from course_utils.results import check as problems_of
    from course_utils.tools.notebooks.pairs import course_root

    report_problems(_results(problems_of, course_root()))
    typer.echo("Every number in the README has a source.")


def _results(function: Callable[..., list], *arguments, **options) -> list:
    """Call into `course_utils.results`, whose `ValueError`s are about the files a person wrote."""
    try:
        return function(*arguments, **options)
    except ValueError as error:
        raise CourseError(str(error)) from error
