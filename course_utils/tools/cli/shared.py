"""What several groups of commands need."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from course_utils.tools import CourseError

Names = Annotated[
    list[str] | None,
    typer.Argument(
        help="Notebooks, as `llm_int8_demo` or `chronology/llm_int8_demo`. Default: all."
    ),
]
ProfileOption = Annotated[str, typer.Option(help="quick, cpu, colab or gpu.")]
JobsOption = Annotated[
    int | None, typer.Option(help="Notebooks at a time. Default: 2, or 1 where there is one core.")
]


def runs_folder(profile: str) -> Path:
    """Where a profile's runs lie, with what they recorded."""
    from course_utils.tools.notebooks.pairs import course_root

    return course_root() / "runs" / profile


def report_problems(problems: list[str]) -> None:
    if problems:
        typer.echo("\n".join(problems))
        raise CourseError(f"{len(problems)} problems.")


def call(module: str, *arguments: str, passing: tuple[int, ...] = (0,)) -> int:
    """Run a tool of this Python; with an exit status other than those in `passing` this process ends, too."""
    status = subprocess.run([sys.executable, "-m", module, *arguments]).returncode
    if status not in passing:
        sys.exit(status)
    return status
