"""Recording, accepting and comparing measured values; filling and checking a README."""

import json
import math
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import course_utils
from course_utils import results
from course_utils.results import entries
from course_utils.tools import CourseError
from course_utils.tools.cli.results import app as results_app
from course_utils.tools.notebooks import pairs

KEY = "demo.tiny.perplexity"
BIBLIOGRAPHY = "@misc{known2020,\n  title = {Title},\n  author = {Doe, Jo},\n  year = {2020},\n}\n"


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A repository with a README, references and no results; runs go to a folder beside them."""
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setitem(entries._context, "profile", "cpu")
    monkeypatch.setitem(entries._context, "model", None)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "references.bib").write_text(BIBLIOGRAPHY, "utf-8")
    readme(tmp_path, "Nothing yet.")
    return tmp_path


def readme(root: Path, text: str) -> None:
    (root / "README.md").write_text(text + "\n", "utf-8")


def accept(root: Path, value: float = 12.345, key: str = KEY, **more) -> None:
    results.record(key, value, **more)
    results.accept(root, results.list_runs())


# ------------------------------------------------------------------ recording


def test_an_entry_says_what_was_measured_how_and_by_which_versions(root):
    results.set_context(profile="quick", model="course-lm", device="cpu")
    results.record(KEY, 7, "nats", 0.5, tokens=100, window=64)
    (entry,) = results.list_runs()
    assert (entry["key"], entry["value"], entry["unit"], entry["tolerance"]) == (
        KEY,
        7,
        "nats",
        0.5,
    )
    assert (entry["profile"], entry["model"], entry["device"]) == ("quick", "course-lm", "cpu")
    assert entry["protocol"] == {"tokens": 100, "window": 64}
    assert set(entry["versions"]) == {"python", "torch", "numpy", "transformers", "course_utils"}
    assert entry["versions"]["course_utils"] == course_utils.__version__
    assert entry["commit"]


def test_the_profile_comes_from_the_environment_where_none_was_resolved(root, monkeypatch):
    monkeypatch.setitem(entries._context, "profile", None)
    monkeypatch.setenv("COURSE_PROFILE", "colab")
    results.record(KEY, 1.0)
    assert results.list_runs()[0]["profile"] == "colab"


def test_a_value_without_a_profile_is_refused(root, monkeypatch):
    monkeypatch.setitem(entries._context, "profile", None)
    monkeypatch.delenv("COURSE_PROFILE", raising=False)
    with pytest.raises(ValueError, match="profile"):
        results.record(KEY, 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(root, value):
    with pytest.raises(ValueError, match="finite"):
        results.record(KEY, value)
    assert results.list_runs() == []


@pytest.mark.parametrize("value", ["1.0", None, True, [1.0]])
def test_a_value_that_is_no_number_is_refused(root, value):
    with pytest.raises(ValueError, match="number"):
        results.record(KEY, value)


@pytest.mark.parametrize("key", ["", "one", "Two.parts", "a..b", "a.b/c", "../a.b", "a.b ", 3])
def test_a_malformed_key_is_refused(root, key):
    with pytest.raises(ValueError, match="key"):
        results.record(key, 1.0)


@pytest.mark.parametrize("tolerance", [-0.1, math.nan, math.inf])
def test_a_bad_tolerance_is_refused(root, tolerance):
    with pytest.raises(ValueError, match="tolerance"):
        results.record(KEY, 1.0, tolerance=tolerance)


def test_a_protocol_that_is_not_json_is_refused(root):
    with pytest.raises(ValueError, match="protocol"):
        results.record(KEY, 1.0, corpus=object())


@settings(max_examples=50)
@given(
    value=st.one_of(
        st.integers(-(10**15), 10**15), st.floats(allow_nan=False, allow_infinity=False)
    )
)
def test_any_finite_number_comes_back_as_it_was_recorded(tmp_path_factory, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_RUNS", str(tmp_path_factory.mktemp("runs")))
        patch.setitem(entries._context, "profile", "cpu")
        results.record(KEY, value)
        assert results.list_runs()[0]["value"] == value


def test_a_broken_run_file_is_named(root):
    results.record(KEY, 1.0)
    (file,) = (root / "runs" / "results").glob("*.json")
    file.write_text("{", "utf-8")
    with pytest.raises(ValueError, match=file.name):
        results.list_runs()


# ------------------------------------------------------------------ accepting


def test_accept_replaces_the_same_measurement_and_keeps_all_others(root):
    accept(root, 1.0)
    accept(root, 2.0, key="demo.tiny.bits")
    accept(root, 3.0, key="other.bits")
    accept(root, 9.0)
    found = {entry["key"]: entry["value"] for entry in results.accepted(root)}
    assert found == {KEY: 9.0, "demo.tiny.bits": 2.0, "other.bits": 3.0}
    assert sorted(p.name for p in (root / "results").iterdir()) == ["demo.json", "other.json"]


def test_two_profiles_and_two_models_of_a_key_stand_side_by_side(root):
    results.set_context(profile="quick")
    accept(root, 1.0, model="a")
    results.set_context(profile="cpu")
    accept(root, 2.0, model="a")
    accept(root, 3.0, model="b")
    found = [(e["profile"], e["model"], e["value"]) for e in results.accepted(root)]
    assert found == [("cpu", "a", 2.0), ("cpu", "b", 3.0), ("quick", "a", 1.0)]


def test_accepted_files_are_sorted_whatever_the_order_of_the_runs(root):
    for key in ("demo.c", "demo.a", "demo.b"):
        accept(root, 1.0, key=key)
    stored = json.loads((root / "results" / "demo.json").read_text("utf-8"))
    assert [entry["key"] for entry in stored] == ["demo.a", "demo.b", "demo.c"]


def test_nothing_is_accepted_without_a_run(root):
    with pytest.raises(ValueError, match="nothing to accept"):
        results.accept(root, [])


def test_recording_alone_changes_no_accepted_result(root):
    results.record(KEY, 1.0)
    assert results.accepted(root) == []


# ------------------------------------------------------------------ comparing


@pytest.mark.parametrize(
    ("value", "deviates"), [(10.0, False), (10.1, False), (10.2, True), (9.8, True)]
)
def test_a_run_is_compared_within_the_accepted_tolerance(root, value, deviates):
    accept(root, 10.0, tolerance=0.15)
    results.record(KEY, value, tolerance=99.0)  # a run cannot loosen its own tolerance
    deviations = results.compare(root, results.list_runs())
    assert bool(deviations) == deviates
    assert all(KEY in line for line in deviations)


def test_tolerance_zero_asks_for_the_same_value(root):
    accept(root, 8, tolerance=0)
    results.record(KEY, 9)
    assert len(results.compare(root, results.list_runs())) == 1


def test_a_changed_unit_deviates(root):
    accept(root, 8.0, unit="ms", tolerance=1)
    results.record(KEY, 8.0, unit="s")
    assert len(results.compare(root, results.list_runs())) == 1


def test_timings_are_not_compared(root):
    accept(root, 10.0)  # no tolerance
    results.record(KEY, 99.0)
    assert results.compare(root, results.list_runs()) == []


def test_a_value_that_was_never_accepted_is_a_deviation(root):
    """A perplexity of 1e9 once passed where nobody had accepted values of the quick profile."""
    accept(root, 10.0, tolerance=0)
    results.set_context(profile="quick")
    results.record(KEY, 1e9, tolerance=0)
    results.record("demo.a-timing", 1.0)
    runs = [run for run in results.list_runs() if run["profile"] == "quick"]
    timing, perplexity = sorted(results.compare(root, runs))
    assert "demo.a-timing" in timing
    assert re.fullmatch(
        rf"{KEY} \(profile quick, model None\): 1e\+09  was never accepted\. Look at it, then "
        "`course results accept --profile quick`",
        perplexity,
    )


def test_a_run_that_recorded_nothing_is_a_deviation(root):
    accept(root, 10.0, tolerance=0)
    (deviation,) = results.compare(root, [])
    assert "no values were recorded" in deviation


# ------------------------------------------------------------------ protocols


def test_a_value_by_another_protocol_stands_beside_the_first(root):
    """Values measured at length 512 once took the place of those measured at 256."""
    accept(root, 1.0, tolerance=0, length=256)
    results.record(KEY, 2.0, tolerance=0, length=512)
    assert [run["value"] for run in results.list_runs()] == [1.0, 2.0]
    (deviation,) = results.compare(root, results.list_runs())
    assert "never accepted by the protocol {'length': 512}, but by [{'length': 256}]" in deviation
    results.accept(root, results.list_runs())
    found = [(e["protocol"], e["value"]) for e in results.accepted(root)]
    assert found == [({"length": 256}, 1.0), ({"length": 512}, 2.0)]
    assert results.compare(root, results.list_runs()) == []


def test_the_order_of_a_protocols_fields_does_not_count(root):
    accept(root, 1.0, tokens=8, window=4)
    accept(root, 2.0, window=4, tokens=8)
    assert [entry["value"] for entry in results.accepted(root)] == [2.0]


def test_accepting_can_drop_what_was_measured_by_other_protocols(root):
    accept(root, 1.0, model="a", length=256)
    accept(root, 2.0, model="b", length=256)
    run = results.list_runs()[0] | {"value": 3.0, "protocol": {"length": 512}}
    results.accept(root, [run], replace=True)
    found = [(e["model"], e["protocol"]["length"], e["value"]) for e in results.accepted(root)]
    assert found == [("a", 512, 3.0), ("b", 256, 2.0)]


def test_versions_of_a_library_are_no_protocol(root):
    accept(root, 1.0, versions={"torch": "1.0", "library": "1"}, length=256)
    accept(root, 2.0, versions={"torch": "1.0", "library": "2"}, length=256)
    (entry,) = results.accepted(root)
    assert entry["versions"]["library"] == "2" and entry["versions"]["torch"] == "1.0"
    assert entry["versions"]["numpy"]


def test_records_go_to_the_folder_that_is_named(root, tmp_path):
    results.record(KEY, 1.0, runs=tmp_path / "of a benchmark")
    assert results.list_runs() == []
    assert [run["value"] for run in results.list_runs(tmp_path / "of a benchmark")] == [1.0]


def test_a_key_of_two_protocols_needs_a_field_that_tells_them_apart(root):
    accept(root, 1.0, length=256, tokens=8)
    accept(root, 2.0, length=512, tokens=8)
    readme(root, VALUE)
    results.fill(root)
    assert any("say which by length=256 or 512" in line for line in results.check(root))
    readme(root, VALUE.replace("profile=cpu", "profile=cpu length=512"))
    results.fill(root)
    assert results.check(root) == []
    assert "2.00" in (root / "README.md").read_text("utf-8")

    table = TABLES["demo"] | {"protocol": {"length": 256}, "rows": TABLES["demo"]["rows"][:1]}
    (root / "results" / "tables.json").write_text(json.dumps({"demo": table}), "utf-8")
    readme(root, "<!-- table: demo --><!-- /table -->")
    results.fill(root)
    assert results.check(root) == []
    assert "| tiny | 1.0 |" in (root / "README.md").read_text("utf-8")


@pytest.fixture
def command(root, monkeypatch):
    """`course results ...` in this root."""
    monkeypatch.setattr(pairs, "course_root", lambda: root)
    return lambda *arguments: CliRunner().invoke(results_app, arguments)


def test_accept_takes_over_the_records_of_the_profile(root, command, monkeypatch):
    monkeypatch.delenv("COURSE_RUNS")
    for profile, value in {"quick": 1.0, "cpu": 2.0}.items():
        results.set_context(profile=profile)
        results.record(KEY, value, tolerance=0, runs=root / "runs" / profile)
    assert "1 values accepted" in command("accept", "--profile", "quick").output
    assert [(e["profile"], e["value"]) for e in results.accepted(root)] == [("quick", 1.0)]
    assert KEY in command("list").output and "COURSE_RUNS" not in os.environ
    with pytest.raises(
        CourseError, match=r"recorded in .*colab: `course run --profile colab` first"
    ):
        raise command("accept", "--profile", "colab").exception


# ------------------------------------------------------------------ filling the README

VALUE = f"It is <!-- value: {KEY} profile=cpu format=.2f --><!-- /value --> here."


def test_a_value_is_filled_in_its_format_and_then_agrees(root):
    accept(root, 12.3)
    readme(root, VALUE)
    assert results.fill(root)
    assert "-->12.30<!--" in (root / "README.md").read_text("utf-8")
    assert results.check(root) == []
    assert results.fill(root) == []  # a second time nothing changes


def test_filling_leaves_all_other_text_as_it_is(root):
    readme(root, f"# Title\n\nÄöü `code`  \n\n{VALUE}\n\n<!-- a comment -->")
    before = (root / "README.md").read_text("utf-8")
    results.fill(root)
    after = (root / "README.md").read_text("utf-8")
    assert after.replace("not measured yet", "") == before


def test_what_nobody_measured_says_so_and_passes(root):
    readme(root, VALUE)
    results.fill(root)
    assert "not measured yet" in (root / "README.md").read_text("utf-8")
    assert results.check(root) == []


def test_an_edited_value_is_caught(root):
    accept(root)
    readme(root, VALUE)
    results.fill(root)
    text = (root / "README.md").read_text("utf-8")
    readme(root, text.replace("-->12.3", "-->11.3"))
    assert any("differs from results" in line for line in results.check(root))


def test_a_value_that_was_accepted_anew_is_caught_until_it_is_filled(root):
    accept(root)
    readme(root, VALUE)
    results.fill(root)
    accept(root, 99.0)
    assert any("differs from results" in line for line in results.check(root))
    results.fill(root)
    assert results.check(root) == []


def test_a_key_that_results_do_not_hold_is_caught(root):
    accept(root)
    readme(root, VALUE.replace("perplexity", "perplexitty"))
    results.fill(root)
    assert any("perplexitty" in line for line in results.check(root))


def test_a_misspelt_option_of_a_marker_is_caught(root):
    accept(root)
    readme(root, VALUE.replace("profile=", "profil="))
    results.fill(root)
    assert any("options" in line for line in results.check(root))


def test_a_key_of_two_models_needs_the_model(root):
    accept(root, 1.0, model="a")
    accept(root, 2.0, model="b")
    readme(root, VALUE)
    results.fill(root)
    assert any("say which by model=a or b" in line for line in results.check(root))
    readme(root, VALUE.replace("profile=cpu", "profile=cpu model=b"))
    results.fill(root)
    assert results.check(root) == []
    assert "2.00" in (root / "README.md").read_text("utf-8")


TABLES = {
    "demo": {
        "profile": "cpu",
        "labels": ["Model"],
        "columns": [{"title": "perplexity", "key": "demo.{model}.perplexity", "format": ".1f"}],
        "rows": [{"labels": ["tiny"], "model": "tiny"}, {"labels": ["big"], "model": "big"}],
    }
}


def with_table(root: Path) -> str:
    (root / "results").mkdir(exist_ok=True)
    (root / "results" / "tables.json").write_text(json.dumps(TABLES), "utf-8")
    accept(root, 12.345)
    accept(root, 6.0, key="demo.big.perplexity")
    readme(root, "<!-- table: demo --><!-- /table -->")
    results.fill(root)
    return (root / "README.md").read_text("utf-8")


def test_a_table_is_made_from_its_layout_and_the_accepted_values(root):
    lines = with_table(root).splitlines()
    assert lines[2:6] == [
        "| Model | perplexity |",
        "| --- | ---: |",
        "| tiny | 12.3 |",
        "| big | 6.0 |",
    ]
    assert results.check(root) == []


def test_an_edited_table_is_caught(root):
    readme(root, with_table(root).replace("6.0", "5.0"))
    assert any("table 'demo' differs" in line for line in results.check(root))


def test_a_table_without_a_layout_is_caught(root):
    readme(root, "<!-- table: nowhere --><!-- /table -->")
    assert any("nowhere" in line for line in results.check(root))


def test_a_notebook_has_a_badge_once_it_is_built_and_no_dead_link_before(root):
    readme(root, "<!-- notebook: chronology/demo --><!-- /notebook -->")
    results.fill(root)
    text = (root / "README.md").read_text("utf-8")
    assert "not built yet" in text
    assert "](" not in text
    (root / "chronology").mkdir()
    (root / "chronology" / "demo.ipynb").write_text("{}", "utf-8")
    assert any("differs" in line for line in results.check(root))
    results.fill(root)
    revision = f"{course_utils.REPOSITORY}/blob/{course_utils.REVISION}"
    target = f"colab.research.google.com/github/{revision}/chronology/demo.ipynb"
    assert target in (root / "README.md").read_text("utf-8")


def test_a_marker_without_its_partner_is_caught(root):
    readme(root, f"<!-- value: {KEY} -->12.3\n\n{VALUE}")
    results.fill(root)
    assert any("no partner" in line for line in results.check(root))


# ------------------------------------------------------------------ the rule for numbers

INVENTED = [
    "It is 4 times smaller.",
    "It is 3.5x faster.",
    "It keeps 99.2% of the quality.",
    "A model of 135M parameters.",
    "It takes ~12 ms.",
    "| row | 12.5 |",
    "- an item with 7",
    "1. an item with 7",
    "## A heading with 7",
    "In 2026 it will be better.",
    "It needs 4.5 bits.",
    "See [the 12 figures](figures.md).",
    "Line one\nline two has 17\nline three.",
    "Cited before [@known2020].\n\nThen 17 without a source.",
    "- cited [@known2020]\n- 17 without",
    "| cited [@known2020] |\n| 17 |",
    "Why <!-- constant: for one reason --> 3.\n\nBut 4.",
    "Empty reason 3 <!-- constant: -->",
    "Unquoted $S = 0.5$.",
]


@pytest.mark.parametrize("text", INVENTED)
def test_a_number_without_a_source_is_caught(root, text):
    readme(root, text)
    assert any("nor cited" in line for line in results.check(root))


SOURCED = [
    "As its authors say, 4 times smaller [@known2020].",
    "Over two lines 4 times\nsmaller [@known2020].",
    "| row [@known2020] | 12.5 |",
    "By definition 8 bits. <!-- constant: a byte -->",
    "By definition 8 bits.\n<!-- constant: a byte -->",
    "INT8, FP32, GPT-2, SmolLM2-135M, W4A16, b1.58, NF4 and LLM.int8().",
    "A 4-bit code and an 8-bit one.",
    "Code: `x = 17`.",
    "```\nx = 17\n```",
    "A [link](https://example.org/17) and <https://example.org/17>.",
    "1. first\n2. second",
    "Hidden <!-- 17 -->.",
]


@pytest.mark.parametrize("text", SOURCED)
def test_a_number_with_a_source_a_constant_and_a_name_pass(root, text):
    readme(root, text)
    assert results.check(root) == []


def test_a_citation_that_the_bibliography_does_not_hold_is_caught(root):
    readme(root, "A number, 17 [@known2020; @unknown2021].")
    assert any("unknown2021" in line for line in results.check(root))


def test_a_problem_is_reported_with_its_line(root):
    readme(root, "One.\n\nTwo.\n\nThere are 17.")
    (line,) = results.check(root)
    assert line.startswith("README.md:5:")


@settings(max_examples=100)
@given(number=st.one_of(st.integers(0, 10**6), st.decimals(0, 1000, places=2)).map(str))
def test_no_bare_number_escapes(tmp_path_factory, number):
    root = tmp_path_factory.mktemp("root")
    (root / "docs").mkdir()
    (root / "docs" / "references.bib").write_text(BIBLIOGRAPHY, "utf-8")
    readme(root, f"The measured value is {number} here.")
    assert len(results.check(root)) == 1
