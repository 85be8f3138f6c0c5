"""The Factbook's figures: the same countries as its prose, and nothing of that prose."""

import pytest

from course_utils.data.corpora import documents, split_of
from course_utils.data.figures import figures

SPLITS = ("train", "calibration", "evaluation")


def test_the_split_is_that_of_the_prose():
    found = {split: figures(split) for split in SPLITS}
    assert {split: len(of) for split, of in found.items()} == {
        "train": 223, "calibration": 18, "evaluation": 15,
    }  # fmt: skip
    for split, of_split in found.items():
        assert [d.name for d in of_split] == sorted(d.name for d in of_split)
        assert all(split_of(d.name) == split for d in of_split)
        assert {d.name for d in documents("factbook", split)} <= {d.name for d in of_split}


def test_no_line_is_one_of_the_prose():
    prose = {d.name: set(d.text.split("\n\n")) for d in documents("factbook", "evaluation")}
    for document in figures("evaluation"):
        lines = document.text.splitlines()
        assert lines and not set(lines) & prose.get(document.name, set())
        assert all(": " in line and line == line.strip() for line in lines)


def test_figures_have_many_digits():
    def digits(text):
        return sum(map(str.isdigit, text)) / len(text)

    text = "".join(d.text for d in figures("evaluation"))
    assert digits(text) > 0.1 > 5 * digits("".join(d.text for d in documents("factbook", "train")))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="unknown split 'test'"):
        figures("test")
