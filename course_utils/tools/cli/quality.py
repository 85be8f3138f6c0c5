"""Commands that test: lint, test, test-colab, test-gpu, oracles."""

import os
from pathlib import Path
from typing import Annotated

import typer

from course_utils.tools.cli.notebooks import check, run
from course_utils.tools.cli.shared import JobsOption, ProfileOption, call
from course_utils.tools.environments import cores

MOST_WORKERS = 4  # each takes a gigabyte, and so does the kernel that it runs
NO_TESTS = 5  # pytest's exit status when it has found none to run
app = typer.Typer(no_args_is_help=True)


@app.command()
def lint(
    fix: Annotated[bool, typer.Option(help="Repair what can be repaired.")] = False,
) -> None:
    """Check style and format of the package, the tests and the notebooks' scripts with ruff.

    Examples: `course lint`; `course lint --fix`.
    """
    from course_utils.tools.notebooks.pairs import course_root

    os.chdir(course_root())
    call("ruff", "check", *(["--fix"] if fix else []), ".")
    call("ruff", "format", *([] if fix else ["--check"]), ".")


@app.command()
def test(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="For pytest, after `--`, as `-- -k int8`.")
    ] = None,
) -> None:
    """Lint, check, and run all tests, the notebooks among them.

    Those that measure memory or time run first, one at a time; then the others, side by side.
    Examples: `course test`; `course test -- tests/test_build.py -x`; `course test -- -n0 --pdb`.
    """
    lint()
    check()
    given = arguments or []
    alone = call("pytest", "--alone", *given, passing=(0, NO_TESTS))
    side_by_side = [f"-n{min(cores(), MOST_WORKERS)}", "--no-loadscope-reorder"]
    call("pytest", *side_by_side, *given, passing=(0,) if alone == NO_TESTS else (0, NO_TESTS))


@app.command()
def test_colab(
    runtimes: Annotated[
        list[str] | None,
        typer.Argument(
            help="Runtimes of Colab, as `2026.04`. Default: all in course_utils/tools/runtimes."
        ),
    ] = None,
    profile: ProfileOption = "colab",
    python: Annotated[
        str | None,
        typer.Option(help="A Python to run on, as that of Colab's image, in place of runtimes."),
    ] = None,
    t4: Annotated[
        bool, typer.Option("--t4", help="In float16 and without Triton, as on Colab's card.")
    ] = False,
    jobs: JobsOption = None,
) -> None:
    """Run every notebook on Colab's packages; its set-up cell installs the course from an archive.

    Examples: `course test-colab`; `course test-colab 2025.10 --profile quick --t4`;
    `course test-colab --python python3`, in Colab's image.
    """
    import shutil

    from course_utils.tools import colab
    from course_utils.tools.notebooks.pairs import course_root, find_notebooks

    root = course_root()
    notebooks = find_notebooks(root)
    if python:
        found = Path(shutil.which(python) or python)
        runs = root / "runs" / "colab"
        typer.echo(colab.run_on_python(root, found, notebooks, profile, runs, t4=t4, jobs=jobs))
        return
    for name in colab.runtimes(root, runtimes):
        typer.echo(colab.run_on_runtime(root, name, notebooks, profile, t4=t4, jobs=jobs))


@app.command()
def test_gpu() -> None:
    """Run what needs a GPU: its tests, and every notebook in the profile gpu on course-lm.

    Without a CUDA device it says so and does nothing. Example: `course test-gpu`.
    """
    import torch

    if not torch.cuda.is_available():
        typer.echo(f"Skipped: torch {torch.__version__} sees no CUDA device on this machine.")
        return
    call("pytest", "-m", "gpu", "tests")
    run(profile="gpu", parameter=["MODEL=course-lm"])


@app.command()
def oracles(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="As `gptqmodel`. Default: all in course_utils/tools/oracles."),
    ] = None,
) -> None:
    """Write the golden vectors of production libraries anew, into tests/golden.

    Each library is installed in an environment of its own, in the cache: some minutes, 3 GB.
    Examples: `course oracles`; `course oracles gptqmodel`.
    """
    from course_utils.tools.golden import write_vectors
    from course_utils.tools.notebooks.pairs import course_root

    for line in write_vectors(course_root(), names):
        typer.echo(line)
