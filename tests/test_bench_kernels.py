"""`course bench kernels`: who is run, and what is recorded and refused. No seconds are tested."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from rich.table import Table

from course_utils.results import list_runs
from course_utils.tools import CourseError
from course_utils.tools.bench import kernels as bench

OURS = [
    "ours, 4 bits, float inputs", "ours, 4 bits, int8 inputs", "ours, 8 bits, int8 inputs",
    "ours, NF4, float inputs", "ours, ternary, int8 inputs",
    "ours, ternary looked up, int8 inputs",
]  # fmt: skip
OTHERS = ["float32 F.linear", "float32, a part a thread", "bfloat16 F.linear", "torch int4"]


@pytest.fixture
def small(monkeypatch):
    """Little memory is read and held, and torch gets its threads back."""
    monkeypatch.setattr(bench, "READ", 2**16)
    monkeypatch.setattr(bench, "CACHE", 2**14)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(root: Path, **options) -> list[str | Table]:
    known = {"sizes": [64], "tokens": [1], "rounds": 2, "threads": 1} | options
    return list(bench.bench_kernels(root, **known))


def test_all_contenders_are_timed_and_recorded(tmp_path, small):
    told = run(tmp_path, tokens=[1, 3])
    tables = [table for table in told if isinstance(table, Table)]
    assert [table.title for table in tables] == ["64 x 64, 1 inputs", "64 x 64, 3 inputs"]
    names = [name for name in tables[0].columns[0].cells]
    assert [name for name in names if name != "bitsandbytes NF4"] == OTHERS + OURS
    assert ("bitsandbytes NF4" in names) == (importlib.util.find_spec("bitsandbytes") is not None)
    entries = {entry["key"]: entry for entry in list_runs(tmp_path / "runs" / "bench")}
    assert len(entries) == 2 * 3 * len(names)
    ratio = entries["bench.kernels.64.m1.float32-F-linear.ratio"]
    assert ratio["value"] == 1.0 and ratio["tolerance"] is None
    assert ratio["protocol"] == {"rounds": 2, "threads": 1} and ratio["model"] == "64x64"
    assert entries["bench.kernels.64.m3.ours-4-bits-int8-inputs.milliseconds"]["value"] > 0
    assert told[0].startswith("1 threads; reading float32 from memory")
    assert (tmp_path / "runs" / "bench" / "kernels.png").is_file()


def test_bitsandbytes_is_left_out_where_it_is_missing(tmp_path, small, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    table = run(tmp_path)[1]
    assert list(table.columns[0].cells) == OTHERS + OURS


def test_a_wrong_product_is_not_timed(tmp_path, small, monkeypatch):
    monkeypatch.setattr(bench, "grouped_linear", lambda x, weight, inputs: 2 * x)
    with pytest.raises(CourseError, match="ours, 4 bits, float inputs: outputs are off by"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sizes": [96]}, "size 96: choose multiples of 64"),
        ({"sizes": [64, 0]}, "size 0: choose"),
        ({"tokens": [0]}, "0: tokens, rounds and threads are 1 or more"),
        ({"rounds": 0}, "0: tokens, rounds"),
        ({"threads": -1}, "-1: tokens, rounds"),
    ],
)
def test_bad_sizes_are_refused_before_anything_runs(tmp_path, wrong, message):
    with pytest.raises(CourseError, match=message):
        run(tmp_path, **wrong)
