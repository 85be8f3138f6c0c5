"""The README and the references as they stand in the repository."""

import re
from pathlib import Path

import pytest

from course_utils import references, results

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BIBLIOGRAPHY = references.load(ROOT)
FOLDERS = ("foundations", "chronology", "distillation", "pruning")
SECTIONS = (
    "What is quantization?", "Why quantize?", "The linear mapping", "The dynamic range",
    "Two flavours: PTQ and QAT", "FP32 against INT8", "A chronology of methods",
    "The algorithms compared", "Decision guide", "Trade-offs", "Distillation", "Pruning",
    "Getting started in practice",
)  # fmt: skip
NOTEBOOKS = (
    "foundations/linear_mapping", "foundations/integer_arithmetic", "foundations/dynamic_range",
    "foundations/smoothing", "foundations/mixed_precision", "foundations/ptq_vs_qat",
    "foundations/packed_kernels", "chronology/llm_int8_demo", "chronology/gptq_demo",
    "chronology/gptq_ablations", "chronology/awq_demo", "chronology/awq_ablations",
    "chronology/nf4_demo", "chronology/nf4_qlora", "chronology/hqq_demo",
    "chronology/bitnet_demo",
    "chronology/tpoti_demo", "chronology/tpoti_two_bit_ladder", "chronology/comparison",
    "distillation/distillation_demo",
    "distillation/feature_distillation", "distillation/reasoning_distillation",
    "pruning/pruning_demo", "pruning/structured_pruning", "pruning/one_shot_pruning",
)  # fmt: skip


def anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def headings() -> list[str]:
    return re.findall(r"^#{1,6} (.+)$", re.sub(r"^```.*?^```", "", README, flags=re.S | re.M), re.M)


def test_every_number_and_every_marker_is_true():
    assert results.check(ROOT) == []


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_of_the_theory_is_there(section):
    assert section in headings()


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_every_notebook_of_the_course_has_its_row(notebook):
    assert f"<!-- notebook: {notebook} -->" in README


def test_no_notebook_is_missing_on_the_map():
    built = {
        f"{path.parent.name}/{path.stem}" for f in FOLDERS for path in (ROOT / f).glob("*.ipynb")
    }
    assert all(f"<!-- notebook: {notebook} -->" in README for notebook in built)


def test_links_within_the_page_have_their_heading():
    anchors = {anchor(heading) for heading in headings()}
    links = re.findall(r"\]\(#([^)]+)\)", README)
    assert links
    assert set(links) <= anchors


def test_links_to_files_have_their_file():
    links = re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_contents_name_every_section_once():
    contents = README.split("## Contents")[1].split("\n## ")[0]
    listed = re.findall(r"\]\(#([^)]+)\)", contents)
    sections = re.findall(r"^## (.+)$", README, re.M)
    assert listed == [anchor(section) for section in sections if section != "Contents"]


def test_windows_lines_name_the_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for command in ("run --profile quick", "test", "lab"):
        assert re.search(rf"\$\(COURSE\) {command}$", makefile, re.M)
        assert f".venv\\Scripts\\python -m course_utils {command}\n" in README


def test_the_references_are_listed_for_the_reader():
    end = README.split("<!-- references: all -->")[1]
    for key in references.cited(README):
        assert f"**@{key}**" in end


def test_every_key_cited_in_a_notebook_exists():
    scripts = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]
    missing = {
        (path.name, key)
        for path in scripts
        for key in references.cited(path.read_text("utf-8"))
        if key not in BIBLIOGRAPHY
    }
    assert missing == set()


@pytest.mark.parametrize("key", BIBLIOGRAPHY)
def test_a_reference_is_complete_and_well_formed(key):
    entry = BIBLIOGRAPHY[key]
    assert entry["title"]
    assert entry["author"]
    assert re.fullmatch(r"(19|20)\d\d", entry.get("year", "2000"))
    assert {"eprint", "doi", "url"} & set(entry)
    assert re.fullmatch(r"\d{4}\.\d{4,5}", entry.get("eprint", "2208.07339"))
    assert entry.get("doi", "10.").startswith("10.")
    assert entry.get("url", "https://").startswith("https://")


@pytest.mark.parametrize("field", ["title", "eprint", "doi", "url"])
def test_no_work_is_listed_twice(field):
    values = [entry[field].lower() for entry in BIBLIOGRAPHY.values() if field in entry]
    assert len(values) == len(set(values))


def test_the_month_of_an_arxiv_id_is_a_month_and_not_after_the_year_of_the_work():
    for key, entry in BIBLIOGRAPHY.items():
        if "eprint" in entry:
            year, month = 2000 + int(entry["eprint"][:2]), int(entry["eprint"][2:4])
            assert 1 <= month <= 12, key
            assert year <= int(entry["year"]), key


def test_a_bibliography_with_a_key_twice_or_stray_text_is_refused(tmp_path):
    (tmp_path / "docs").mkdir()
    file = tmp_path / "docs" / "references.bib"
    entry = "@misc{a2020,\n  title = {T},\n}\n"
    file.write_text(entry + entry, "utf-8")
    with pytest.raises(ValueError, match="a2020"):
        references.load(tmp_path)
    file.write_text(entry + "stray", "utf-8")
    with pytest.raises(ValueError, match="stray"):
        references.load(tmp_path)


def test_no_filled_value_begins_a_line():
    """GitHub takes a line that begins with a comment for HTML, and shows its markdown as it is."""
    assert re.findall(r"^ *<!-- (?:value|notebook):.*", README, re.M) == []
