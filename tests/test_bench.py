"""`course bench quantize`: who is run, with what, and what is told of it. No seconds are tested."""

import hashlib
import io
import math
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from course_utils.compression import method_names
from course_utils.quantizers.gptq import GPTQ
from course_utils.results import list_runs
from course_utils.tools import CourseError
from course_utils.tools.bench import layer
from course_utils.tools.bench import quantize as bench
from course_utils.tools.bench.quantize import Protocol, cause_of_failure, parse_method
from course_utils.tools.golden import environment

ROOT = Path(__file__).parent.parent
MEMORY = ROOT / "course_utils" / "tools" / "bench" / "memory"
PROTOCOL = Protocol(sequences=2, length=64, evaluated=128, repeats=1, threads=1)
# A library that "quantizes" to the float weights, and has no symmetric grids.
LIBRARY = """
import json, sys
from pathlib import Path
from peak_memory import forget_peak, peak_bytes
from safetensors.torch import load_file, save_file
folder, settings, out = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
tokens = load_file(folder / "calibration.safetensors")["tokens"]
measured = {"refused": "it has no symmetric grids"}
runs = folder / "runs of the library"
number = len(runs.read_text()) if runs.is_file() else 0
runs.write_text("x" * (number + 1))
if settings["act_order"] and number == 1:
    sys.exit("its second run fails")
if not settings["symmetric"]:
    assert settings["group_size"] == 64 and tokens.shape == (2, 64)
    forget_peak()
    assert peak_bytes() > 10**7
    found = load_file(folder / "model.safetensors")
    layers = {n.removesuffix(".weight"): w for n, w in found.items() if ".c_" in n and w.ndim == 2}
    save_file({n: w.T.contiguous() for n, w in layers.items()}, out / "weights.safetensors")
    measured = {"seconds": (1.0, 5.0, 2.0)[number], "loaded_bytes": 1000000, "peak_bytes": 4000000,
                "bits_per_weight": None, "versions": {"library": "1.2"}}
(out / "measured.json").write_text(json.dumps(measured))
"""


@pytest.fixture
def course(tmp_path: Path, monkeypatch) -> Path:
    """A course with a library for GPTQ that runs in this Python; and another, not installed."""
    for name in ("library", "missing"):
        scripts = tmp_path / "course_utils" / "tools" / "oracles" / name / "model"
        scripts.mkdir(parents=True)
        (scripts / "gptq.py").write_text(LIBRARY)
        (scripts.parent / "requirements.txt").write_text("# nothing\n")
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    made = environment(tmp_path / "library")
    made.mkdir(parents=True)
    (made / "requirements.txt").write_text("# nothing\n")
    monkeypatch.setattr(bench, "python_of", lambda folder: sys.executable)
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs" / "bench"))
    return tmp_path


def run(root: Path, *specs: str, protocol=PROTOCOL) -> tuple[list[str], list[list[str]]]:
    """The lines that are told, and the table's cells, row by row."""
    *lines, table = bench.bench(root, list(specs), "course-lm", protocol)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    rows = [line.strip("│").split("│") for line in text.splitlines() if line.startswith("│")]
    return lines, [[cell.strip() for cell in row] for row in rows]


def test_methods_and_libraries_stand_in_one_table(course):
    lines, rows = run(course, "affine:group_size=32", "gptq:group_size=64")
    told = "\n".join(lines)
    assert "missing is not installed: `make oracles`" in told
    assert "1 threads, torch " in told and "load before" in told

    reference, affine, gptq, library = rows
    assert [row[:2] for row in rows[1:]] == [
        ["affine:group_size=32", "course"],
        ["gptq:group_size=64", "course"],
        ["gptq:group_size=64", "library"],
    ]
    assert affine[6] == "4.625" and gptq[6] == "4.312"  # bits: codes, scales, zero points
    assert library[2] == "1.0 (1.0 to 1.0)" and library[4:7] == ["4", "3", "-"]
    assert library[7] == reference[7] != gptq[7]  # its weights are the float ones, in their places
    assert gptq[8] == "1.0000" and library[8] == f"{float(library[7]) / float(gptq[7]):.4f}"

    found = {entry["key"]: entry for entry in list_runs()}
    assert not any(key.endswith("perplexity_ratio_error") for key in found)  # it takes two runs
    entry = found["bench.course-lm.gptq-group-size-64.library.perplexity"]
    assert entry["value"] == found["bench.course-lm.float.perplexity"]["value"]
    assert entry["profile"] == "bench" and entry["versions"]["library"] == "1.2"
    assert "library" not in entry["protocol"] and entry["protocol"]["length"] == 64
    assert entry["protocol"]["settings"] == repr(GPTQ(group_size=64))
    assert found["bench.course-lm.gptq-group-size-64.course.seconds"]["tolerance"] is None


def test_each_run_has_a_calibration_of_its_own_and_the_ratio_an_error(course, monkeypatch):
    monkeypatch.setattr(bench, "run_once", run_and_keep := RunAndKeep(bench.run_once))
    lines, rows = run(course, "gptq:group_size=64", protocol=replace(PROTOCOL, repeats=3))
    of_course, of_library = (
        run_and_keep.calibrations["course"],
        run_and_keep.calibrations["library"],
    )
    assert of_course == of_library and len(set(of_course)) == 3

    values = {"course": [], "library": []}
    for line in lines:
        if found := re.search(r"(course|library): .* perplexity ([\d.]+) \(\d/3\)", line):
            values[found[1]].append(float(found[2]))
    assert len(set(values["course"])) == 3 and len(set(values["library"])) == 1
    logs = [math.log(b / a) for a, b in zip(values["course"], values["library"], strict=True)]
    ratio = math.exp(statistics.fmean(logs))
    error = ratio * statistics.stdev(logs) / math.sqrt(3)
    found = {
        entry["key"].rpartition(".")[2]: entry["value"]
        for entry in list_runs()
        if "library" in entry["key"]
    }
    assert found["perplexity_ratio"] == pytest.approx(ratio, abs=1e-4)
    assert found["perplexity_ratio_error"] == pytest.approx(error, abs=1e-4)
    assert found["perplexity"] == pytest.approx(values["library"][0], abs=1e-3)
    seconds = [found[name] for name in ("least_seconds", "seconds", "most_seconds")]
    assert seconds == [1.0, 2.0, 5.0]
    of_course_seconds = next(
        entry["value"] for entry in list_runs() if entry["key"].endswith("course.seconds")
    )
    assert found["seconds_ratio"] == pytest.approx(2.0 / of_course_seconds)
    assert rows[-1][2:4] == ["2.0 (1.0 to 5.0)", f"{found['seconds_ratio']:.2f}"]
    assert run_and_keep.order == ["course", "library", "library", "course", "course", "library"]
    assert (
        rows[-1][8] == f"{found['perplexity_ratio']:.4f} +- {found['perplexity_ratio_error']:.4f}"
    )


class RunAndKeep:
    """Runs, and keeps a hash of the calibration that each run found."""

    def __init__(self, run_once):
        self.run_once, self.calibrations = run_once, {"course": [], "library": []}
        self.order = []

    def __call__(self, one, model, out, threads):
        kept = (model / "calibration.safetensors").read_bytes()
        self.order.append(one.who)
        self.calibrations[one.who].append(hashlib.sha256(kept).hexdigest())
        return self.run_once(one, model, out, threads)


def test_what_a_library_does_not_have_is_left_out(course):
    lines, rows = run(course, "gptq:group_size=64,symmetric=True")
    assert "gptq:group_size=64,symmetric=True, library: it has no symmetric grids" in lines
    assert [row[1] for row in rows] == ["", "course"]


def test_a_library_that_fails_leaves_the_others_their_table(course):
    """One failed run once threw away all that the others had measured."""
    spec = "gptq:group_size=64,act_order=True"
    lines, rows = run(course, spec, protocol=replace(PROTOCOL, repeats=2))
    assert any(
        re.fullmatch(rf"{spec}, library: the run failed: its second run fails All .*\.log\.", line)
        for line in lines
    )  # fmt: skip
    assert [row[1] for row in rows] == ["", "course"] and "(2/2)" in lines[-1]


def test_a_library_that_leaves_a_layer_out_is_told_which(course):
    script = course / "course_utils" / "tools" / "oracles" / "library" / "model" / "gptq.py"
    script.write_text(LIBRARY.replace('".c_" in n', '".c_" in n and "h.1.mlp.c_fc" not in n'))
    with pytest.raises(CourseError, match=r"differ in these layers: transformer\.h\.1\.mlp\.c_fc"):
        run(course, "gptq:group_size=64")


def test_a_run_that_fails_tells_its_reason_and_its_log(course):
    with pytest.raises(CourseError, match=r"affine:group_size=100, course: .*256.* is in .*\.log"):
        run(course, "affine:group_size=100")


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system's own count is taken")
def test_peak_memory_is_not_that_of_the_process_that_started_it():
    held = bytearray(10**9)  # getrusage counts this for the child, too
    ask = "kept = bytearray(10**8); from peak_memory import peak_bytes; print(peak_bytes())"
    done = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, check=True, cwd=MEMORY
    )
    assert 10**8 < int(done.stdout) < len(held)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no peak can be forgotten")
def test_a_peak_that_is_forgotten_does_not_count():
    ask = (
        "from peak_memory import forget_peak, peak_bytes; kept = bytearray(10**8); del kept;"
        "before = peak_bytes(); forget_peak(); print(before, peak_bytes())"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, check=True, cwd=MEMORY
    )
    before, after = map(int, done.stdout.split())
    assert before - after > 9 * 10**7


def test_memory_is_measured_by_one_module_which_needs_no_library():
    """Its five lines once stood in three scripts."""
    ask = "import sys; sys.path.insert(0, sys.argv[1]); import peak_memory"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", ask, str(MEMORY)], capture_output=True)
    assert done.returncode == 0, done.stderr
    sources = [path for path in ROOT.glob("course_utils/**/*.py") if "VmHWM" in path.read_text()]
    assert [path.name for path in sources] == ["peak_memory.py"]


STARTS = "Traceback (most recent call last):\n"
BUILD_FAILED = """INFO a library tells much
\x1b[31mERROR\x1b[0m it tells more
Traceback (most recent call last):
  File "build.py", line 3, in compile
subprocess.CalledProcessError: Command '['ninja']' returned non-zero exit status 1.

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/a course/gptq.py", line 7, in <module>
    load()
  File "build.py", line 9, in load
RuntimeError: Error building extension 'pack': [1/2] c++ -I/a course/include
g++: error: course/include: No such file or directory
ninja: build stopped: subcommand failed.
"""


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (BUILD_FAILED, "RuntimeError: Error building extension 'pack': [1/2] c++ -I/a course/include"),
        ("much\n\x1b[31mits second run fails\x1b[0m\n\n", "its second run fails"),
        (f"{STARTS}  File\nKeyError: " + "x" * 300, "KeyError: " + "x" * 190 + "..."),
        (f"{STARTS}  File\nlibrary.Error\n", "library.Error"),
        ("", "it said nothing."),
    ],
)  # fmt: skip
def test_why_a_run_failed_is_told_in_one_readable_line(log, cause):
    """Of a library that failed to build, the compiler's last line was once all that was told."""
    assert cause_of_failure(log) == cause


def test_settings_are_read_as_python_writes_them():
    assert parse_method("gptq:n_bits=3,group_size=row,act_order=True") == GPTQ(
        n_bits=3, group_size="row", act_order=True
    )
    assert parse_method("gptq") == GPTQ()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gtpq", r"gtpq: unknown method 'gtpq': choose one of .*gptq"),
        ("gptq:bits=4", r"gptq has no setting bits\. It has n_bits, group_size"),
        ("gptq:n_bits", r"a parameter is KEY=VALUE, got 'n_bits'"),
        ("gptq:n_bits=9", r"gptq:n_bits=9: n_bits 9: choose 2 to 8"),
        ("gptq:act_order=false", r"act_order 'false': choose True or False"),
    ],
)
def test_a_bad_name_or_setting_is_an_error(spec, message):
    with pytest.raises(CourseError, match=message):
        parse_method(spec)


@pytest.mark.parametrize(
    ("model", "length", "evaluated", "message"),
    [
        ("course-lm", 512, 0, "length 512: course-lm takes 2 to 256"),
        ("course-lm", 1, 0, "length 1: course-lm takes 2 to 256"),
        ("course-lm", 64, 1, r"evaluated 1: choose 0 \(no perplexity\), or 2 or more"),
        ("nothing", 64, 0, "unknown model 'nothing'"),
    ],
)
def test_a_bad_model_or_length_is_an_error(course, model, length, evaluated, message):
    protocol = Protocol(sequences=1, length=length, evaluated=evaluated, repeats=1, threads=1)
    with pytest.raises(CourseError, match=message):
        list(bench.bench(course, ["affine"], model, protocol))


def test_a_library_without_requirements_runs_in_the_courses_own_python(tmp_path):
    for name in ("json", "no_such_library"):
        scripts = tmp_path / "course_utils" / "tools" / "oracles" / name / "model"
        scripts.mkdir(parents=True)
        (scripts / "nf4.py").write_text("")
    contenders, absent = bench._contenders(tmp_path, ["nf4"])
    assert [one.who for one in contenders] == ["course", "json"]
    assert contenders[1].command[0] == sys.executable
    assert absent == {"no_such_library": "`pip install no_such_library`"}


def test_scripts_for_whole_models_are_named_as_methods():
    scripts = list(ROOT.glob("course_utils/tools/oracles/*/model/*.py"))
    assert scripts and {script.stem for script in scripts} <= set(method_names())


@pytest.mark.parametrize("name", ["hqq", "nf4"])
def test_a_layer_is_quantized_by_both_to_the_same_codes(name, tmp_path, monkeypatch):
    monkeypatch.setattr(layer, "SHAPE", (8, 128))
    said = list(layer.bench_layer(tmp_path, name, 2, 1))
    assert said[0] == f"{name}: 1,024 codes, all equal; 1 threads"
    found = {entry["key"]: entry for entry in list_runs(tmp_path / "runs" / "bench")}
    by = {who: found[f"bench.layer.{name}.{who}.seconds"]["value"] for who in ("course", "library")}
    ratio = found[f"bench.layer.{name}.times_as_fast"]
    assert ratio["value"] == pytest.approx(by["library"] / by["course"])
    assert ratio["protocol"] == {"repeats": 2, "threads": 1, "n_bits": 4, "group_size": 64}
    assert layer.LIBRARIES[name] in ratio["versions"]


def test_a_layer_with_other_codes_is_not_timed(tmp_path, monkeypatch):
    rivals = lambda weight: (lambda: 1, lambda: 2, lambda ours, theirs: 3)  # noqa: E731
    monkeypatch.setitem(layer.LAYERS, "other", rivals)
    monkeypatch.setitem(layer.LIBRARIES, "other", "torch")
    with pytest.raises(CourseError, match="3 of 2359296 codes differ"):
        list(layer.bench_layer(tmp_path, "other", 1, 1))
    with pytest.raises(CourseError, match="nothing: there is a layer's benchmark of hqq"):
        list(layer.bench_layer(tmp_path, "nothing", 1, 1))
