"""`course run` on several notebooks at a time: what is told, what ends, and what each took."""

import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest

from conftest import script
from course_utils.tools.environments import cores
from course_utils.tools.notebooks.pairs import Notebook
from course_utils.tools.notebooks.side_by_side import (
    LIMITS,
    Took,
    default_jobs,
    side_by_side,
    write_report,
)


@pytest.fixture
def other(sample: Notebook) -> Notebook:
    """A second notebook in the sample's course."""
    notebook = Notebook(sample.root, "pruning/other")
    notebook.script.parent.mkdir()
    notebook.script.write_text(script(), encoding="utf-8")
    return notebook


def work(notebook: Notebook, code: str) -> None:
    notebook.script.write_text(script(work=f"# %%\n{code}"), encoding="utf-8")


def start(notebook: Notebook, *arguments: str, **variables: str) -> subprocess.Popen:
    kept = {key: os.environ[key] for key in os.environ if key != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [sys.executable, "-m", "course_utils", "run", *arguments],
        cwd=notebook.root,
        env=kept | {"PYTHONSAFEPATH": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=None if sys.platform == "win32" else hear_ctrl_c,
    )


def hear_ctrl_c() -> None:
    """A shell's background jobs ignore it, and so would what they start: the suite waited for ever."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(notebook: Notebook, *arguments: str, **variables: str) -> tuple[int, str, str]:
    """Exit status, what is printed, and what is told of errors."""
    process = start(notebook, *arguments, **variables)
    printed, errors = process.communicate()
    return process.returncode, printed, errors


MEET = """
from time import sleep

Path(os.environ["MEETING"], {own!r}).touch()
while not Path(os.environ["MEETING"], {others!r}).exists():
    sleep(0.1)
print("threads", os.environ["OMP_NUM_THREADS"])
"""


def test_two_notebooks_run_at_the_same_time_and_divide_the_threads(sample, other, tmp_path):
    """Each waits for the other: one after the other they would never end."""
    for notebook, own, others in ((sample, "a", "b"), (other, "b", "a")):
        work(notebook, "from pathlib import Path\n" + MEET.format(own=own, others=others))
    status, printed, errors = run(sample, "--jobs", "2", MEETING=str(tmp_path))
    assert status == 0, errors
    runs = sample.root / "runs" / "quick"
    for notebook in (sample, other):
        assert f"/2] {notebook.name}: " in printed
        text = (runs / f"{notebook.name}.ipynb").read_text(encoding="utf-8")
        assert f"threads {max(1, cores() // 2)}\\n" in text
    report = json.loads((runs / "report.json").read_text(encoding="utf-8"))
    assert report["profile"] == "quick" and report["limit_seconds"] == LIMITS["quick"]
    assert set(report["notebooks"]) == {sample.name, other.name}
    assert all(took["seconds"] > 0 for took in report["notebooks"].values())


def test_threads_that_the_reader_set_stay(sample):
    work(sample, "print('threads', os.environ['OMP_NUM_THREADS'])")
    status, _, errors = run(sample, OMP_NUM_THREADS="7")
    assert status == 0, errors
    executed = sample.root / "runs" / "quick" / f"{sample.name}.ipynb"
    assert "threads 7\\n" in executed.read_text(encoding="utf-8")


def test_notebooks_that_fail_are_named_and_the_others_are_done(sample, other):
    last = Notebook(sample.root, "pruning/third")
    last.script.write_text(script(), encoding="utf-8")
    work(sample, "1 / 0")
    work(other, "[][0]")
    status, printed, errors = run(sample, "--jobs", "1")
    assert status == 1
    assert f"[1/3] {sample.name}: failed" in printed and f"[3/3] {last.name}: " in printed
    assert last.name not in errors, errors
    lines = errors.splitlines()  # a kernel that ends can leave a ZMQError before ours
    told = next(at for at, line in enumerate(lines) if line.startswith("Error: "))
    first, second = lines[told : told + 2]
    assert first.startswith(f"Error: {sample.name}, cell 7 (1 / 0): ZeroDivisionError")
    assert second.startswith(f"{other.name}, cell 7 ([][0]): IndexError")
    executed = nbformat.read(sample.root / "runs" / "quick" / f"{last.name}.ipynb", as_version=4)
    assert executed.cells[-1].execution_count


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_ctrl_c_ends_all_kernels(sample, other, tmp_path):
    for notebook in (sample, other):
        code = "from pathlib import Path\nfrom time import sleep\n\n"
        code += f"Path({str(tmp_path)!r}, f'{{os.getpid()}}.kernel').touch()\nsleep(600)"
        work(notebook, code)
    process = start(sample, "--jobs", "2")
    while len(kernels := list(tmp_path.glob("*.kernel"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode != 0
    pids = {int(kernel.stem) for kernel in kernels}
    assert pids <= {worker.pid for worker in workers}
    assert psutil.wait_procs(workers, timeout=60)[1] == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL to send")
def test_a_process_that_is_ended_from_outside_is_no_traceback(sample):
    work(sample, "import psutil\n\npsutil.Process(os.getppid()).kill()")
    status, _, errors = run(sample)
    assert status == 1
    assert errors.splitlines()[-1].startswith(f"Error: {sample.name}: its process was ended")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], "at least one notebook must run at a time, got --jobs 0"),
        (["--profile", "slow"], "no profile 'slow'. There are: quick, cpu, colab, gpu"),
    ],
)
def test_what_cannot_be_is_refused(sample, arguments, message):
    status, _, errors = run(sample, *arguments)
    assert status == 1 and message in errors and len(errors.splitlines()) == 1


# What each took


def test_a_notebook_over_the_limit_of_its_profile_is_told_of(tmp_path):
    took = {"pruning/fast": Took(60.0, 59.0), "pruning/slow": Took(61.2, 40.4)}
    lines = write_report(tmp_path / "runs" / "report.json", "quick", took)
    assert lines == [
        "pruning/slow took 61 s (40 s of a processor); the limit of the profile quick is 60 s."
    ]
    assert write_report(tmp_path / "report.json", "cpu", took) == []
    report = json.loads((tmp_path / "runs" / "report.json").read_text(encoding="utf-8"))
    assert report["notebooks"]["pruning/slow"] == {"seconds": 61.2, "cpu_seconds": 40.4}


def test_course_run_warns_of_a_slow_notebook(sample, monkeypatch, capsys):
    """Its end is planted: nothing is waited for."""
    from course_utils.tools.notebooks import side_by_side

    monkeypatch.setattr(
        side_by_side, "side_by_side", lambda tasks, jobs: {sample.name: Took(99, 98)}
    )
    side_by_side.execute_all({}, profile="quick", runs=sample.root / "runs")
    assert f"Warning: {sample.name} took 99 s" in capsys.readouterr().out


def test_limits_are_those_of_the_profiles():
    from course_utils.profiles import PROFILES

    assert tuple(LIMITS) == PROFILES


def test_one_core_runs_one_notebook(monkeypatch):
    monkeypatch.setattr("course_utils.tools.notebooks.side_by_side.cores", lambda: 1)
    assert default_jobs() == 1


def noted() -> list[str]:
    return ["cell 3: a", "cell 4: b", "cell 5: c"]


def test_notes_of_many_notebooks_are_a_line_each(capsys):
    """`make course` ended in 76 lines on models that its profile leaves out."""
    side_by_side({"pruning/one": noted, "pruning/two": noted}, 1)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "cell" in line] == [
        "  cell 3: a (2 more like it: run this notebook alone to see them)"
    ] * 2
    side_by_side({"pruning/one": noted}, 1)
    assert sum("cell" in line for line in capsys.readouterr().out.splitlines()) == 3
