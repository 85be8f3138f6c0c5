"""The measured comparison: `course leaderboard`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def leaderboard(
    rows: Annotated[
        list[str] | None, typer.Argument(help="As `gptq_w4g64`. Default: all that fit the model.")
    ] = None,
    model: Annotated[str, typer.Option(help="As `load_model` knows it.")] = "course-lm",
    threads: Annotated[int, typer.Option(min=1, help="Of the measuring processes.")] = 1,
    ship: Annotated[
        Path | None, typer.Option(help="Measure nothing: write the finished rows to this folder.")
    ] = None,
) -> None:
    """Measure every method under one protocol: bits, bytes, nats lost on two texts, words, seconds, speed.

    Goes on where it was interrupted, and measures again what changed. Minutes for course-lm, hours for
    SmolLM2. Examples: `course leaderboard`; `course leaderboard --model smollm2-135m-dithered --threads 2`;
    `course leaderboard --ship course_utils/assets/leaderboard`.
    """
    from course_utils.tools.bench import leaderboard as board
    from course_utils.tools.notebooks.pairs import course_root

    protocol = board.Protocol(threads=threads)
    if ship is not None:
        typer.echo(board.ship(course_root(), model, protocol, ship))
        return
    for line in board.measure_all(course_root(), model, protocol, rows):
        typer.echo(line)
