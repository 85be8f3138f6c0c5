"""`course bench generate`: who is run, and what is told of it. No milliseconds are tested."""

import shutil
from pathlib import Path

import pytest
from rich.table import Table

from course_utils.results import list_runs
from course_utils.tools import CourseError
from course_utils.tools.bench.generate import bench_generate

ASKED = {"tokens": 4, "rounds": 1, "threads": 1, "head": True}


def test_float_and_packed_models_take_turns_and_are_recorded(tmp_path: Path):
    spec = "affine:n_bits=4,group_size=64"
    *told, table = bench_generate(tmp_path, [spec], "course-lm", **ASKED)
    assert told == ["float: saved", f"{spec}: saved", "round 1 of 1"]
    assert isinstance(table, Table) and table.row_count == 2
    found = {entry["key"]: entry["value"] for entry in list_runs(tmp_path / "runs" / "bench")}
    packed, of_float = (
        f"bench.generate.course-lm.{n}" for n in ("affine-n-bits-4-group-size-64", "float")
    )
    assert found[f"{of_float}.times_as_fast"] == 1
    ratio = found[f"{of_float}.milliseconds"] / found[f"{packed}.milliseconds"]
    assert found[f"{packed}.times_as_fast"] == pytest.approx(ratio)
    assert found[f"{packed}.bits_per_weight"] == pytest.approx(4.3125, abs=0.01)


def test_what_is_not_there_and_a_run_that_fails_are_told(tmp_path: Path, monkeypatch):
    with pytest.raises(CourseError, match="no-such"):
        list(bench_generate(tmp_path, ["no-such"], "course-lm", **ASKED))
    with pytest.raises(CourseError, match="no-such-model"):
        list(bench_generate(tmp_path, [], "no-such-model", **ASKED))
    steps = bench_generate(tmp_path, [], "course-lm", **ASKED)
    assert next(steps) == "float: saved"
    (folder,) = (tmp_path / "runs" / "bench").glob("*/model-0")
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(CourseError, match=r"float: the run failed: .* All of it is in"):
        next(steps)
