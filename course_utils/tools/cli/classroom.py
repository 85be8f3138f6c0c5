"""Commands of the classroom: student, assignments, release-assignments, grade, self-check."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from course_utils.tools import CourseError
from course_utils.tools.cli.shared import Names

if TYPE_CHECKING:
    from course_utils.tools.notebooks.classroom import Outcome

SecondsOption = Annotated[int, typer.Option(help="How long a cell may run.")]
app = typer.Typer(no_args_is_help=True)


@app.command()
def student(
    name: Annotated[str, typer.Argument(help="A notebook, as `llm_int8_demo`.")],
    out: Annotated[Path, typer.Option(help="The .ipynb file to write.")],
    force: Annotated[bool, typer.Option(help="Overwrite a file that is there.")] = False,
) -> None:
    """Write a notebook's student version: set-up and exercises, without solutions.

    Example: `course student llm_int8_demo --out llm_int8_demo.ipynb`.
    """
    import nbformat

    from course_utils.tools.notebooks.pairs import course_root, find_notebooks, from_script
    from course_utils.tools.notebooks.students import student_version

    (notebook,) = find_notebooks(course_root(), [name])
    if out.exists() and not force:
        raise CourseError(f"{out} is there, and may hold work: give --force to overwrite it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(student_version(from_script(notebook), notebook.name), out)
    typer.echo(f"Wrote {out}.")


@app.command()
def assignments(
    names: Names = None,
    out: Annotated[Path, typer.Option(help="A teacher's folder.")] = Path("classroom"),
    seed_file: Annotated[
        Path | None,
        typer.Option(envvar="COURSE_SEED_FILE", help="A secret of yours, outside the course."),
    ] = None,
) -> None:
    """Write assignments for nbgrader: teachers' versions, and by it what students get.

    Hidden tests that draw their cases take the seed from your secret; without one they are as anybody can
    read them in the course. Needs the extra `classroom`.
    Examples: `course assignments --out ../class --seed-file ~/secret.txt`; `course assignments gptq_demo`.
    """
    from course_utils.tools.notebooks import classroom, grading
    from course_utils.tools.notebooks.exercises import exercises_of
    from course_utils.tools.notebooks.pairs import course_root, find_notebooks, from_script

    root = course_root()
    notebooks = classroom.with_exercises(find_notebooks(root, names))
    if not notebooks:
        raise CourseError("none of these notebooks has exercises.")
    secret = classroom.read_secret(seed_file, root) if seed_file else None
    grading.generate(out, classroom.write_sources(notebooks, out, secret))
    for notebook in notebooks:
        found = exercises_of(from_script(notebook))
        points, minutes = (sum(getattr(e, what) for e in found) for what in ("points", "minutes"))
        typer.echo(
            f"{classroom.short(notebook)}: {len(found)} exercises, {points} points, {minutes} minutes"
        )
    typer.echo(
        f"\nHand out {out / 'release'}. What comes back goes to {out / 'submitted'}/STUDENT/NAME/."
    )
    if secret is None:
        typer.echo("Hidden tests draw from public seeds: give --seed-file for others.")


@app.command()
def release_assignments(
    names: Names = None,
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("assignments"),
) -> None:
    """Write the student versions into a folder that can be pushed as the branch `assignments`.

    Their badges open them there, on Colab. Examples: `course release-assignments --out ../assignments`.
    """
    from course_utils.tools.notebooks import classroom
    from course_utils.tools.notebooks.pairs import course_root, find_notebooks

    notebooks = classroom.with_exercises(find_notebooks(course_root(), names))
    if out.exists() and any(out.glob("*/*.ipynb")):
        raise CourseError(f"{out} holds notebooks: give a folder that is new or empty.")
    for file in classroom.write_students(notebooks, out):
        typer.echo(f"Wrote {file}.")


@app.command()
def grade(
    folder: Annotated[Path, typer.Argument(help="A folder that `course assignments` wrote.")],
    names: Annotated[
        list[str] | None, typer.Argument(help="Assignments, as `gptq_demo`. Default: all.")
    ] = None,
    seconds: SecondsOption = 120,
) -> None:
    """Grade what students handed in: points with reasons, feedback, and grades.csv.

    Runs students' code on this machine: do it where there is nothing that it may not read.
    Example: `course grade ../class gptq_demo`.
    """
    from course_utils.tools.notebooks import grading

    for graded in grading.grade(folder, names, seconds):
        typer.echo(
            f"{graded.student}, {graded.assignment}: {graded.points} of {graded.most} points"
        )
        for note in graded.notes:
            typer.echo(f"  {note}")
        _tell(graded.exercises)
    typer.echo(
        f"\nThe grades are in {folder / 'grades.csv'}, the feedback in {folder / 'feedback'}."
    )


@app.command()
def self_check(
    file: Annotated[Path, typer.Argument(help="Your student notebook.")],
    seconds: SecondsOption = 120,
) -> None:
    """Run the tests of your own student notebook: points, and what the tests say.

    Example: `course self-check llm_int8_demo.ipynb`.
    """
    from course_utils.tools.notebooks.self_check import self_check as check

    found = check(file, seconds)
    _tell(found)
    points, most = sum(o.points for o in found), sum(o.most for o in found)
    typer.echo(f"{points} of {most} points by the tests that you see; graded, there are more.")


def _tell(found: list["Outcome"]) -> None:
    for outcome in found:
        told = outcome.reason or "passed"
        typer.echo(
            f"  {outcome.number}. {outcome.title}: {outcome.points} of {outcome.most}, {told}"
        )
