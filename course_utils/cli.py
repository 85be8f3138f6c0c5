"""The command `course`.

What a command needs is imported when it runs, so that `course --help` is quick, and so that the
package's own dependencies are enough for it.
"""

import ast
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from course_utils.build import CourseError
from course_utils.cache import DownloadError

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)
results_app = typer.Typer(no_args_is_help=True)
app.add_typer(results_app, name="results", help="Measured values: list, accept, fill, check.")
bench_app = typer.Typer(no_args_is_help=True)
app.add_typer(bench_app, name="bench", help="Benchmarks, never run as tests.")

Names = Annotated[
    list[str] | None,
    typer.Argument(
        help="Notebooks, as `llm_int8_demo` or `chronology/llm_int8_demo`. Default: all."
    ),
]
ProfileOption = Annotated[str, typer.Option(help="quick, cpu, colab or gpu.")]


def main() -> None:
    """Run the command line; an expected error is one line, and the exit status 1."""
    try:
        app()
    except ModuleNotFoundError as error:
        _fail(f"{error}: this command needs the whole course, `pip install -e .[course]`.")
    except (CourseError, DownloadError) as error:
        _fail(str(error))


@app.callback()
def course() -> None:
    """The course Large Model Quantization: its notebooks run, built and checked."""


@app.command()
def run(
    names: Names = None,
    profile: ProfileOption = "quick",
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", metavar="KEY=VALUE", help="A notebook's parameter."),
    ] = None,
) -> None:
    """Run notebooks from top to bottom, into runs/PROFILE.

    Examples: `course run`; `course run llm_int8_demo --profile cpu`;
    `course run llm_int8_demo -p SEED=1 -p MODEL=course-lm`.
    """
    from course_utils.build.execute import execute
    from course_utils.build.notebooks import course_root, find_notebooks, from_script

    root = course_root()
    runs = root / "runs" / profile
    notebooks = find_notebooks(root, names)
    parameters = dict(_parse(text) for text in parameter or [])
    for number, notebook in enumerate(notebooks, 1):
        typer.echo(f"[{number}/{len(notebooks)}] {notebook.name} ... ", nl=False)
        start = time.monotonic()
        out = runs / f"{notebook.name}.ipynb"
        execute(
            from_script(notebook), notebook.name, out,
            profile=profile, runs=runs, parameters=parameters,
        )  # fmt: skip
        typer.echo(f"{time.monotonic() - start:.0f} s")
    typer.echo(f"\nThe executed notebooks are in {runs}. Read them with `make lab` (`course lab`).")


@app.command()
def build(
    names: Names = None,
    force: Annotated[bool, typer.Option(help="Also those whose stamp is still right.")] = False,
) -> None:
    """Build notebooks from their scripts, executed in the profile cpu.

    Only those are built whose script, or part of the package that they use, changed.
    Examples: `course build`; `course build llm_int8_demo --force`.
    """
    from course_utils.build import make
    from course_utils.build.notebooks import course_root, find_notebooks

    for notebook in find_notebooks(course_root(), names):
        typer.echo(f"{notebook.name} ... ", nl=False)
        start = time.monotonic()
        built = make.build(notebook, force=force)
        typer.echo(f"built in {time.monotonic() - start:.0f} s" if built else "is up to date")


@app.command()
def check(names: Names = None) -> None:
    """Check that scripts, built notebooks, package and references agree. Runs no notebook.

    Examples: `course check`; `course check llm_int8_demo`.
    """
    from course_utils.build.check import check as problems_of
    from course_utils.build.notebooks import course_root, find_notebooks

    notebooks = find_notebooks(course_root(), names)
    _report([problem for notebook in notebooks for problem in problems_of(notebook)])
    typer.echo(f"{len(notebooks)} notebooks checked: all agree.")


@app.command()
def student(
    name: Annotated[str, typer.Argument(help="A notebook, as `llm_int8_demo`.")],
    out: Annotated[Path, typer.Option(help="The .ipynb file to write.")],
) -> None:
    """Write a notebook's student version: set-up and exercises, without solutions.

    Example: `course student llm_int8_demo --out llm_int8_assignment.ipynb`.
    """
    import nbformat

    from course_utils.build.exercises import student_version
    from course_utils.build.notebooks import course_root, find_notebooks, from_script

    (notebook,) = find_notebooks(course_root(), [name])
    out.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(student_version(from_script(notebook)), out)
    typer.echo(f"Wrote {out}.")


@app.command()
def lab() -> None:
    """Open JupyterLab on the course."""
    from course_utils.build.notebooks import course_root

    _call("jupyterlab", f"--ServerApp.root_dir={course_root()}")


@app.command()
def lint(
    fix: Annotated[bool, typer.Option(help="Repair what can be repaired.")] = False,
) -> None:
    """Check style and format of the package, the tests and the notebooks' scripts with ruff.

    Examples: `course lint`; `course lint --fix`.
    """
    from course_utils.build.notebooks import course_root

    os.chdir(course_root())
    _call("ruff", "check", *(["--fix"] if fix else []), ".")
    _call("ruff", "format", *([] if fix else ["--check"]), ".")


@app.command()
def test(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="For pytest, after `--`, as `-- -k int8`.")
    ] = None,
) -> None:
    """Lint, check, and run all tests, the notebooks among them.

    Examples: `course test`; `course test -- tests/test_build.py -x`.
    """
    lint()
    check()
    _call("pytest", *(arguments or []))


@app.command()
def test_colab(
    runtimes: Annotated[
        list[str] | None,
        typer.Argument(help="Runtimes of Colab, as `2026.04`. Default: all in tests/colab."),
    ] = None,
    profile: ProfileOption = "colab",
    python: Annotated[
        str | None,
        typer.Option(help="A Python to run on, as that of Colab's image, in place of runtimes."),
    ] = None,
) -> None:
    """Run every notebook on Colab's packages; its set-up cell installs the course from an archive.

    Examples: `course test-colab`; `course test-colab 2025.10 --profile quick`;
    `course test-colab --python python3`, in Colab's image.
    """
    import shutil

    from course_utils.build import colab
    from course_utils.build.notebooks import course_root, find_notebooks

    root = course_root()
    notebooks = find_notebooks(root)
    if python:
        found = Path(shutil.which(python) or python)
        typer.echo(colab.run_on_python(root, found, notebooks, profile, root / "runs" / "colab"))
        return
    for name in colab.runtimes(root, runtimes):
        typer.echo(colab.run_on_runtime(root, name, notebooks, profile))


@app.command()
def test_gpu() -> None:
    """Run what needs a GPU: its tests, and every notebook in the profile gpu on course-lm.

    Without a CUDA device it says so and does nothing. Example: `course test-gpu`.
    """
    import torch

    if not torch.cuda.is_available():
        typer.echo(f"Skipped: torch {torch.__version__} sees no CUDA device on this machine.")
        return
    _call("pytest", "-m", "gpu", "tests")
    run(profile="gpu", parameter=["MODEL=course-lm"])


@app.command()
def oracles(
    names: Annotated[
        list[str] | None, typer.Argument(help="As `gptqmodel`. Default: all in tests/oracles.")
    ] = None,
) -> None:
    """Write the golden vectors of production libraries anew, into tests/golden.

    Each library is installed in an environment of its own, in runs/oracles: some minutes, 3 GB.
    Examples: `course oracles`; `course oracles gptqmodel`.
    """
    from course_utils.build.notebooks import course_root
    from course_utils.build.oracles import write_vectors

    for line in write_vectors(course_root(), names):
        typer.echo(line)


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
    from course_utils.training.report import report

    _choose_runs("report")
    try:
        report(folder)
    except (FileNotFoundError, ValueError) as error:
        raise CourseError(str(error)) from error
    typer.echo(f"Wrote {folder / 'README.md'}. Next: `course results accept --profile report`.")


@bench_app.callback()
def bench() -> None:
    """Benchmarks, never run as tests: their seconds are this machine's, at this moment."""


@bench_app.command("quantize")
def bench_quantize(
    methods: Annotated[
        list[str] | None,
        typer.Argument(help="With settings, as `gptq:n_bits=4,group_size=64`. Default: that."),
    ] = None,
    model: Annotated[str, typer.Option(help="As `load_model` knows it.")] = "course-lm",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, in turns.")] = 3,
    sequences: Annotated[int, typer.Option(help="Of the calibration.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a sequence, and window.")] = 256,
    evaluated: Annotated[int, typer.Option(help="Tokens of the perplexity; 0: none.")] = 8192,
    threads: Annotated[int | None, typer.Option(help="Default: as torch chooses.")] = None,
) -> None:
    """Quantize a whole model with methods by name, beside the libraries of `course oracles`.

    Time, memory, bits and perplexity, in one table; `course results accept --profile bench` takes them over.
    Examples: `course bench quantize`;
    `course bench quantize affine gptq:group_size=64 --model smollm2-135m-dithered --length 512`.
    """
    import torch
    from rich.console import Console

    from course_utils.build.bench import Protocol, bench

    root = _choose_runs("bench")
    threads = threads or torch.get_num_threads()
    protocol = Protocol(sequences, length, evaluated, repeats, threads)
    console = Console(width=None if sys.stdout.isatty() else 160)  # a file has no width of its own
    for line in bench(root, methods or ["gptq:n_bits=4,group_size=64"], model, protocol):
        if isinstance(line, str):
            typer.echo(line)
        else:
            console.print(line)


@results_app.command("list")
def results_list(profile: ProfileOption = "cpu") -> None:
    """Show what runs in a profile recorded. Example: `course results list --profile quick`."""
    from course_utils.results import list_runs

    _choose_runs(profile)
    for entry in _results(list_runs):
        typer.echo(f"{entry['key']}  {entry['value']:.6g} {entry['unit']}  ({entry['model']})")


@results_app.command("accept")
def results_accept(profile: ProfileOption = "cpu") -> None:
    """Make what runs in a profile recorded the accepted values. Example: `course results accept`."""
    from course_utils.results import accept

    taken = _results(accept, _choose_runs(profile))
    typer.echo(f"{len(taken)} values accepted. Next: `course results fill`.")


@results_app.command("fill")
def results_fill() -> None:
    """Write the accepted values into the README. Example: `course results fill`."""
    from course_utils.build.notebooks import course_root
    from course_utils.results import fill

    changed = _results(fill, course_root())
    typer.echo("\n".join(changed) if changed else "The README is up to date.")


@results_app.command("check")
def results_check() -> None:
    """Check that every number in the README has a source. Example: `course results check`."""
    from course_utils.build.notebooks import course_root
    from course_utils.results import check as problems_of

    _report(_results(problems_of, course_root()))
    typer.echo("Every number in the README has a source.")


def _choose_runs(profile: str) -> Path:
    """Point `COURSE_RUNS` to the records of a profile's runs; returns the course's folder."""
    from course_utils.build.notebooks import course_root

    root = course_root()
    os.environ["COURSE_RUNS"] = str(root / "runs" / profile)
    return root


def _results(function: Callable[..., list], *arguments: Path) -> list:
    """Call into `course_utils.results`, whose `ValueError`s are about the files a person wrote."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise CourseError(str(error)) from error


def _parse(text: str) -> tuple[str, object]:
    """`KEY=VALUE` with the value as Python writes it, or else as text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise CourseError(f"a parameter is KEY=VALUE, got {text!r}.")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _report(problems: list[str]) -> None:
    if problems:
        typer.echo("\n".join(problems))
        raise CourseError(f"{len(problems)} problems.")


def _call(module: str, *arguments: str) -> None:
    """Run a tool of this Python; if it fails, this process ends with its exit status."""
    status = subprocess.run([sys.executable, "-m", module, *arguments]).returncode
    if status:
        sys.exit(status)


def _fail(message: str) -> None:
    typer.secho(f"Error: {message}", fg=typer.colors.RED, err=True)
    sys.exit(1)
