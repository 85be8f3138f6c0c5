"""Commands on the models that the course makes: train-lm, lm-report, dither, train-bitnet and others."""

from pathlib import Path
from typing import Annotated

import typer

from course_utils.tools import CourseError
from course_utils.tools.cli.shared import runs_folder

app = typer.Typer(no_args_is_help=True)


@app.command()
def train_lm(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint and result.")] = Path(
        "runs/course-lm"
    ),
) -> None:
    """Train course-lm, the model inside the package: about 2 hours on two CPU cores.

    Goes on from its checkpoint when interrupted. Example: `course train-lm --out runs/course-lm`.
    """
    from course_utils.training.course_lm import train_course_lm

    train_course_lm(out)


@app.command()
def lm_report(
    folder: Annotated[
        Path, typer.Argument(help="Folder that `course train-lm` wrote a finished model to.")
    ] = Path("runs/course-lm"),
) -> None:
    """Measure a trained course-lm against an n-gram baseline, and write its model card.

    Takes some minutes. Example: `course lm-report runs/course-lm`.
    """
    from course_utils.tools.site.model_card import report

    try:
        report(folder, runs_folder("report"))
    except (FileNotFoundError, ValueError) as error:
        raise CourseError(str(error)) from error
    typer.echo(f"Wrote {folder / 'README.md'}. Next: `course results accept --profile report`.")


@app.command()
def dither(
    choose: Annotated[
        bool, typer.Option("--choose", help="Choose the exempt columns anew: another model.")
    ] = False,
) -> None:
    """Measure what dithering SmolLM2 costs, and that no 4-bit grid is left: about 10 minutes.

    Example: `course dither`.
    """
    from course_utils.tools.dither import costs, grid_errors, write_exempt_columns

    if choose:
        write_exempt_columns()
    for report in (grid_errors(), costs()):
        for line in report:
            typer.echo(line)


@app.command()
def train_bitnet(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and results.")] = Path(
        "runs/bitnet"
    ),
    ship: Annotated[
        Path | None,
        typer.Option(help="Train nothing: write packed weights and logs to this folder."),
    ] = None,
) -> None:
    """Train the ternary models of `bitnet_demo` and their float twins: hours on two CPU cores.

    Goes on where it was interrupted, and skips what is finished. Example:
    `course train-bitnet --out runs/bitnet`.
    """
    from course_utils.finetuning import bitnet_lm

    try:
        bitnet_lm.train_plan(out) if ship is None else bitnet_lm.ship(out, ship)
    except ValueError as error:
        raise CourseError(str(error)) from error


@app.command()
def train_distillation(
    groups: Annotated[
        list[str] | None,
        typer.Argument(help="inherited, fresh, settings, directions. Default: all, in this order."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and logs.")] = Path(
        "runs/distillation"
    ),
) -> None:
    """Train the students that `distillation_demo` shows the logs of: about 10 minutes of a CPU core.

    Goes on where it was interrupted, and skips what is finished. Example:
    `course train-distillation inherited --out runs/distillation`.
    """
    from course_utils.distillation import runs

    try:
        runs.train_groups(out, groups or runs.GROUPS)
    except ValueError as error:
        raise CourseError(str(error)) from error


@app.command()
def train_reasoning(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and results.")] = Path(
        "runs/reasoning"
    ),
    ship: Annotated[
        Path | None,
        typer.Option(help="Train nothing: write weights and logs to this folder."),
    ] = None,
) -> None:
    """Train the teacher and the students of `reasoning_distillation`: about 6 minutes on one core.

    Goes on where it was interrupted, and skips what is finished. Example:
    `course train-reasoning --out runs/reasoning`.
    """
    from course_utils.distillation import reasoning_lm

    try:
        if ship is None:
            reasoning_lm.train_plan(out, reasoning_lm.PLAN)
        else:
            reasoning_lm.ship(out, ship)
    except ValueError as error:
        raise CourseError(str(error)) from error
