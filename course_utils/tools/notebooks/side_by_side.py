"""Several notebooks at a time, and a report of what each took.

A notebook gets its settings from environment variables, which a process has once: so each runs from
a process of its own. Processors are divided: the kernels of `jobs` processes get one share each.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import nbformat
import psutil
from nbformat import NotebookNode
from rich.console import Console

from course_utils.tools import CourseError
from course_utils.tools.environments import cores
from course_utils.tools.notebooks.execute import execute, recorded
from course_utils.tools.notebooks.fillings import unfilled
from course_utils.tools.notebooks.reader import readers_version

# Seconds that a notebook may take: in quick on one core, since two run side by side in CI.
LIMITS = {"quick": 60, "cpu": 300, "colab": 900, "gpu": 600}


@dataclass(frozen=True)
class Took:
    """What a notebook took: seconds that passed, and seconds of a processor (0 on Windows)."""

    seconds: float
    cpu_seconds: float
    notes: list[str] = field(default_factory=list)  # what else there is to say of it


def execute_all(
    notebooks: Mapping[str, NotebookNode],
    *,
    profile: str,
    runs: Path,
    jobs: int | None = None,
    **settings: object,
) -> None:
    """Execute notebooks, given by their names, into `runs`, and write what each took into report.json there.

    `settings` are those of `execute`. One that takes longer than its profile allows is told of, and no
    failure. Raises `CourseError` when all are done, for those that failed.
    """
    if profile not in LIMITS:
        raise CourseError(f"there is no profile {profile!r}. There are: {', '.join(LIMITS)}.")
    tasks = {
        name: partial(
            _execute, nb, name, runs / f"{name}.ipynb", profile=profile, runs=runs, **settings
        )
        for name, nb in notebooks.items()
    }
    took = side_by_side(tasks, default_jobs() if jobs is None else jobs)
    for slow in write_report(runs / "report.json", profile, took):
        print(f"Warning: {slow}")


def default_jobs() -> int:
    """Two, where there are two cores: kernels of the profile cpu take gigabytes each."""
    return min(2, cores())


def _execute(nb: NotebookNode, name: str, out: Path, **settings: object) -> list[str]:
    """Execute a notebook into `out`, as readers see it; returns what its text could not be told."""
    executed = execute(nb, name, out, **settings)
    nbformat.write(readers_version(executed, recorded(executed)), out)
    return unfilled(executed, recorded(executed))  # a smaller profile may leave out a model


def side_by_side(tasks: Mapping[str, Callable[[], object]], jobs: int) -> dict[str, Took]:
    """Call tasks, by the name of their notebook, `jobs` at a time, and print how it goes.

    Tasks go to other processes, so they must be picklable. A task that raises `CourseError` does not
    stop the others; at the end one error tells of all that failed. Anything else, as Ctrl-C, ends all
    processes at once, and kernels with them. Raises `CourseError`.
    """
    if jobs < 1:
        raise CourseError(f"at least one notebook must run at a time, got --jobs {jobs}.")
    console = Console(highlight=False, soft_wrap=True)
    pool = ProcessPoolExecutor(
        jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_take_threads,
        initargs=(max(1, cores() // jobs),),
    )
    try:
        with console.status("") as status:
            return _call_all(tasks, jobs, pool, console, status.update)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        _end_processes()
        raise
    finally:
        pool.shutdown()


def write_report(path: Path, profile: str, took: Mapping[str, Took]) -> list[str]:
    """Write what notebooks took as JSON; returns a line for each that took longer than it may."""
    limit = LIMITS[profile]
    notebooks = {
        name: {"seconds": took[name].seconds, "cpu_seconds": took[name].cpu_seconds}
        for name in sorted(took)
    }
    report = {"profile": profile, "limit_seconds": limit, "notebooks": notebooks}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return [
        f"{name} took {took[name].seconds:.0f} s ({took[name].cpu_seconds:.0f} s of a processor); "
        f"the limit of the profile {profile} is {limit} s."
        for name in notebooks
        if took[name].seconds > limit
    ]


def _call_all(
    tasks: Mapping[str, Callable[[], object]],
    jobs: int,
    pool: ProcessPoolExecutor,
    console: Console,
    show: Callable[[str], None],
) -> dict[str, Took]:
    waiting = list(tasks)
    running: dict[Future, str] = {}
    took, failures = {}, []
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            running[pool.submit(_timed, tasks[name])] = name
        show(f"Running {', '.join(running.values())}; {len(waiting)} to come")
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            name = running.pop(future)
            place = f"[{len(tasks) - len(waiting) - len(running)}/{len(tasks)}]"
            try:
                took[name] = future.result()
            except CourseError as error:
                failures.append(str(error))
                console.print(f"{place} {name}: failed", markup=False)
            except BrokenProcessPool as error:
                raise CourseError(
                    f"{name}: its process was ended from outside, as for want of memory: "
                    "--jobs 1 needs the least."
                ) from error
            else:
                console.print(f"{place} {name}: {took[name].seconds:.0f} s", markup=False)
                for note in _shown(took[name].notes, alone=len(tasks) == 1):
                    console.print(f"  {note}", markup=False)
    if failures:
        raise CourseError("\n".join(failures))
    return took


def _shown(notes: list[str], *, alone: bool) -> list[str]:
    """What to print of a notebook's notes: all where it runs `alone`, else the first, and their number."""
    if alone or len(notes) < 2:
        return notes
    return [f"{notes[0]} ({len(notes) - 1} more like it: run this notebook alone to see them)"]


def _take_threads(number: int) -> None:
    """In a new process: so many threads for its kernels, unless the reader said how many."""
    os.environ.setdefault("OMP_NUM_THREADS", str(number))


def _timed(task: Callable[[], object]) -> Took:
    start, before = time.monotonic(), os.times()
    notes = task() or []
    after = os.times()
    spent = [getattr(after, part) - getattr(before, part)
             for part in ("user", "system", "children_user", "children_system")]  # fmt: skip
    return Took(round(time.monotonic() - start, 1), round(sum(spent), 1), notes)


def _end_processes() -> None:
    """End the pool's processes and their kernels, which Ctrl-C passes by as sessions of their own."""
    processes = []
    for child in multiprocessing.active_children():
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(child.pid)
            processes += [process, *process.children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(processes, timeout=10)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
