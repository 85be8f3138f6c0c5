"""What several groups of commands need."""

import ast
import os
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


def choose_runs(profile: str) -> Path:
    """Point `COURSE_RUNS` to the records of a profile's runs; returns the course's folder."""
    from course_utils.tools.notebooks.pairs import course_root

    root = course_root()
    os.environ["COURSE_RUNS"] = str(root / "runs" / profile)
    return root


def key_and_value(text: str) -> tuple[str, object]:
    """`KEY=VALUE` with the value as Python writes it, or else as text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise CourseError(f"a parameter is KEY=VALUE, got {text!r}.")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


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
