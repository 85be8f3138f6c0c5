"""Measured values: `course results`."""

from collections.abc import Callable
from pathlib import Path

import typer

from course_utils.tools import CourseError
from course_utils.tools.cli.shared import ProfileOption, choose_runs, report_problems

app = typer.Typer(no_args_is_help=True)


@app.command("list")
def results_list(profile: ProfileOption = "cpu") -> None:
    """Show what runs in a profile recorded. Example: `course results list --profile quick`."""
    from course_utils.results import list_runs

    choose_runs(profile)
    for entry in _results(list_runs):
        typer.echo(f"{entry['key']}  {entry['value']:.6g} {entry['unit']}  ({entry['model']})")


@app.command("accept")
def results_accept(profile: ProfileOption = "cpu") -> None:
    """Make what runs in a profile recorded the accepted values. Example: `course results accept`."""
    from course_utils.results import accept

    taken = _results(accept, choose_runs(profile))
    typer.echo(f"{len(taken)} values accepted. Next: `course results fill`.")


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


def _results(function: Callable[..., list], *arguments: Path) -> list:
    """Call into `course_utils.results`, whose `ValueError`s are about the files a person wrote."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise CourseError(str(error)) from error
