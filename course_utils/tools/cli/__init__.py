"""The command `course`: one module a group of commands.

What a command needs is imported when it runs, so that `course --help` is quick, and so that the
package's own dependencies are enough for it.
"""

import sys

import typer

from course_utils.cache import DownloadError
from course_utils.tools import CourseError
from course_utils.tools.cli import (
    bench,
    classroom,
    leaderboard,
    models,
    notebooks,
    quality,
    results,
)

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)
for _group in (notebooks, classroom, quality, models, leaderboard):
    app.add_typer(_group.app)
app.add_typer(bench.app, name="bench", help="Benchmarks, never run as tests.")
app.add_typer(results.app, name="results", help="Measured values: list, accept, fill, check.")


def main() -> None:
    """Run the command line; an expected error is one line, and the exit status 1."""
    try:
        app()
    except ModuleNotFoundError as error:
        extra = "classroom" if error.name == "nbgrader" else "course"
        _fail(f"{error}: this command needs more, `pip install -c constraints.txt -e .[{extra}]`.")
    except (CourseError, DownloadError) as error:
        _fail(str(error))


@app.callback()
def course() -> None:
    """The course Large Model Quantization: its notebooks run, built and checked."""


def _fail(message: str) -> None:
    typer.secho(f"Error: {message}", fg=typer.colors.RED, err=True)
    sys.exit(1)
