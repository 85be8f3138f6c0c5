"""`course leaderboard` and what reads it: rows, their pairs, the cloze task. No seconds are tested."""

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from course_utils.compression import method_names
from course_utils.evaluation import cloze
from course_utils.evaluation import leaderboard as reader
from course_utils.evaluation.estimate import over_units
from course_utils.evaluation.leaderboard import kendall, kendall_interval, leaderboard, retention
from course_utils.models import load_model
from course_utils.plotting import leaderboard as figures
from course_utils.results import accepted
from course_utils.tools import CourseError
from course_utils.tools.bench import leaderboard as bench
from course_utils.tools.bench.leaderboard_rows import PACKED, ROWS
from course_utils.tools.bench.quantize import parse_method

ROOT = Path(__file__).parent.parent
SMALL = bench.Protocol(
    sequences=2, window=64, tokens=512, words=8, context=8, generated=4, rounds=1,
    corpora=("factbook",),
)  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Path, list[str]]:
    """A leaderboard of two rows, and what was said."""
    root = tmp_path_factory.mktemp("course")
    said = list(bench.measure_all(root, "course-lm", SMALL, ["affine_w4g64", "llm_int8"]))
    return root, said


@pytest.fixture
def board(measured, tmp_path):
    bench.ship(measured[0], "course-lm", SMALL, tmp_path)
    return leaderboard("course-lm", tmp_path)


def test_every_method_of_the_course_has_a_row_that_it_accepts():
    methods = [parse_method(entry.spec) for entry in ROWS]
    assert {method.name for method in methods} == set(method_names())
    assert len({entry.name for entry in ROWS}) == len(ROWS)


@pytest.mark.parametrize("entry", [e for e in ROWS if not e.small], ids=lambda e: e.name)
def test_the_kernel_that_a_row_names_takes_its_codes(entry):
    method = parse_method(entry.spec)
    if method.wants_statistics:
        pytest.skip("codes of the same kind as those of round-to-nearest")
    weight = method.quantize(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))
    takes_floats = getattr(method, "inputs", "float") == "float"  # BitNet's are int8
    assert (weight.kernel_codes is not None and takes_floats) == (entry.kernel == PACKED)


def test_a_row_tells_bits_bytes_losses_and_words(board):
    assert list(board.rows) == ["float", "affine_w4g64", "llm_int8"]
    row = board.rows["affine_w4g64"]
    assert (row.method, row.settings["group_size"], row.bits) == ("affine", 64, 4.3125)
    assert row.tensor_bytes < row.file_bytes < 1.1 * row.tensor_bytes
    assert row.tensor_bytes < board.rows["llm_int8"].tensor_bytes < board.rows["float"].tensor_bytes
    assert len(row.cloze) == SMALL.words and set(row.cloze) <= {0, 1}
    assert sum(board.tokens["factbook"]) == SMALL.tokens - SMALL.tokens // SMALL.window
    assert 0 < row.scores["factbook"].divergence < 0.1 < row.scores["factbook"].agreement <= 1
    assert board.rows["float"].scores["factbook"].agreement == 1
    assert board.protocol["tokens"] == 512 and board.machine["cores"]


def test_a_row_says_what_comparing_the_models_says(board):
    model, tokenizer = load_model("course-lm")
    text = bench.TextProtocol("factbook", SMALL.tokens, SMALL.window).text(tokenizer)
    packed = load_model("course-lm").model
    from course_utils.compression import get_method, quantize_model

    quantize_model(packed, get_method("affine", n_bits=4, group_size=64))
    found = bench.compare(packed, model, text)
    loss = board.loss("affine_w4g64", "factbook")
    assert loss.value == pytest.approx(found.loss.value, abs=1e-4)
    assert loss.error == pytest.approx(found.loss.error, abs=1e-4)
    ratio = board.perplexity("affine_w4g64", "factbook") / board.perplexity("float", "factbook")
    assert retention(loss.value) == pytest.approx(1 / ratio)


def test_what_is_finished_is_not_measured_again(measured, monkeypatch):
    root, said = measured
    assert said[1] == "3 of 3 rows to measure" and "left" in said[-1]
    again = list(bench.measure_all(root, "course-lm", SMALL, ["affine_w4g64", "llm_int8"]))
    assert again[1:] == ["0 of 3 rows to measure"]
    other = replace(SMALL, words=9)
    run = bench.Run(root, "course-lm", other)
    assert run.finished(ROWS[0]) is None, "another protocol"
    run = bench.Run(root, "course-lm", SMALL)
    assert run.finished(ROWS[0]._replace(stored="said otherwise")).stored == "said otherwise"
    monkeypatch.setattr(bench, "code", lambda text: text + "changed")
    assert run.finished(ROWS[0]) is None, "the method's code changed"


def test_rows_that_fail_are_told_at_the_end_and_the_others_kept(measured, monkeypatch):
    broken = ROWS[0]._replace(name="broken", spec="affine:n_bits=4,group_size=100")
    monkeypatch.setattr(bench, "ROWS", (broken, *ROWS))
    steps = bench.measure_all(measured[0], "course-lm", SMALL, ["broken", "affine_w4g64"])
    with pytest.raises(CourseError, match=r"1 rows failed: broken\. The others are kept"):
        list(steps)


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(CourseError, match="no row nonsense: there are affine_w4g64"):
        list(bench.measure_all(tmp_path, "course-lm", SMALL, ["nonsense"]))
    with pytest.raises(CourseError, match="no-such"):
        list(bench.measure_all(tmp_path, "no-such", SMALL))
    with pytest.raises(CourseError, match="0 rows of course-lm are measured"):
        bench.ship(tmp_path, "course-lm", SMALL, tmp_path)
    assert leaderboard("course-lm", tmp_path) is None


def test_a_row_or_text_that_is_not_there_is_told(board):
    with pytest.raises(ValueError, match="no row 'gptq': there are float"):
        board.loss("gptq", "factbook")
    with pytest.raises(ValueError, match="no text 'sotu': there are factbook"):
        board.loss("llm_int8", "sotu")


@given(st.integers(0, 10**6), st.integers(2, 9))
@settings(max_examples=25, deadline=None)
def test_an_error_from_sums_is_that_over_documents(seed, count):
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (count,), generator=draw)
    unit = torch.arange(count).repeat_interleave(sizes)
    values = torch.randn(len(unit), generator=draw, dtype=torch.float64)
    sums = torch.zeros(count, dtype=torch.float64).index_add(0, unit, values)
    expected, found = over_units(values, unit, "documents"), reader._mean(sums, sizes)
    assert found.value == pytest.approx(expected.value)
    assert found.error == pytest.approx(expected.error)


@given(st.permutations(range(8)), st.permutations(range(8)))
@settings(max_examples=40, deadline=None)
def test_kendall_counts_the_swaps_that_sort_one_order_into_the_other(a, b):
    """Swaps of neighbours are pairs in the other order: tau is 1 - 2 swaps / pairs."""
    order, swaps = [b[i] for i in sorted(range(8), key=a.__getitem__)], 0
    for end in range(7, 0, -1):  # bubble sort
        for i in range(end):
            if order[i] > order[i + 1]:
                order[i], order[i + 1] = order[i + 1], order[i]
                swaps += 1
    found = kendall(torch.tensor(a).double(), torch.tensor(b).double())
    assert found == pytest.approx(1 - 2 * swaps / 28)
    assert kendall(torch.tensor(b).double(), torch.tensor(a).double()) == pytest.approx(found)


def test_kendall_refuses_and_counts_ties_for_none():
    assert kendall(torch.tensor([1.0, 2, 2]), torch.tensor([1.0, 2, 3])) == pytest.approx(2 / 3)
    for a, b in (([1.0], [1.0]), ([1.0, 2], [1.0])):
        with pytest.raises(ValueError, match="give two of one length"):
            kendall(torch.tensor(a), torch.tensor(b))


def test_the_interval_of_ranks_holds_the_value(board):
    names = ["affine_w4g64", "llm_int8"]
    texts = "factbook", "factbook"
    tau, low, high = kendall_interval(board, texts, names, draws=50)
    assert tau == 1 and -1 <= low <= high <= 1  # the draws of two texts are different ones
    assert kendall_interval(board, texts, names, draws=50) == (tau, low, high)
    with_itself = kendall_interval(board, texts, ["llm_int8", "llm_int8"], draws=5)
    assert with_itself == (0, 0, 0)  # a tie counts for neither order


def test_words_are_the_last_of_clauses_and_a_model_that_knows_them_is_right():
    tokenizer = AutoTokenizer.from_pretrained(reader.SHIPPED.parent / "course-lm")
    items = cloze.blanks(tokenizer, 20, 8)
    assert len(items) == 20 and len({item.document for item in items}) > 5
    for item in items:
        word = tokenizer.decode(item.tokens[-item.answer :])
        assert len(item.tokens) == 8 + item.answer and word[0] == " " and word[1:].isalpha()

    class Oracle(torch.nn.Module):
        def __init__(self, right):
            super().__init__()
            self.weight, self.right = torch.nn.Parameter(torch.zeros(1)), right

        def forward(self, input_ids):
            (item,) = [i for i in items if torch.equal(i.tokens[:-1], input_ids[0])]
            logits = torch.nn.functional.one_hot(item.tokens[1:], 5000).float()
            if not self.right:
                logits[-1] = -logits[-1]  # the word's last token alone is wrong
            return type("Output", (), {"logits": logits[None]})

    assert cloze.filled(Oracle(True).eval(), items).all()
    assert not cloze.filled(Oracle(False).eval(), items).any()
    with pytest.raises(ValueError, match="training mode"):
        cloze.filled(Oracle(True), items)
    with pytest.raises(ValueError, match="no blanks"):
        cloze.filled(Oracle(True).eval(), [])
    with pytest.raises(ValueError, match="cannot take 100000 last words"):
        cloze.blanks(tokenizer, 100000, 8)


def test_figures_show_every_row_and_refuse_lists_that_do_not_fit():
    figure = figures.paired_documents({"a": [1.0, 2.0]}, [0.5, 1.0])
    assert list(figure.axes[1].lines[0].get_ydata()) == [0.5, 1.0]
    with pytest.raises(ValueError, match="one value for each document"):
        figures.paired_documents({"a": [1.0]}, [0.5, 1.0])
    points = {"a": ([4.0, 2.0], [0.1, 3.0], [0.01, 0.1])}
    figure = figures.bits_and_nats(points, (3.9, 4.7), most=1)
    assert [t.get_text() for t in figure.axes[0].texts] == ["1 above 1 nats"]
    figure = figures.ranks({"a": (1, 3), "b": (2, 1), "c": (3, 2)}, ("one", "other"))
    assert [t.get_text() for t in figure.axes[0].texts] == ["a", "a", "b", "b", "c", "c"]


def test_what_is_accepted_is_what_was_shipped():
    """The README is filled from the accepted values, and these are the leaderboard's."""
    told = {e["key"]: e["value"] for e in accepted(ROOT) if e["key"].startswith("comparison.")}
    board = leaderboard("course-lm")
    for name, row in board.rows.items():
        if name != "float":
            assert told[f"comparison.{name}.bits"] == pytest.approx(row.bits)
            loss = board.loss(name, "factbook")
            assert told[f"comparison.{name}.loss"] == pytest.approx(loss.value)


def test_shipped_rows_are_those_of_the_list_with_their_settings():
    for file in reader.SHIPPED.glob("*.json"):
        board = leaderboard(file.stem)
        entries = {entry.name: entry for entry in ROWS}
        assert json.loads(file.read_text("utf-8"))["model"] == file.stem
        for name, row in board.rows.items():
            if name != "float":
                settings = asdict(parse_method(entries[name].spec))
                assert row.settings == json.loads(json.dumps(settings)), name
            assert all(math.isfinite(v) for s in row.scores.values() for v in s.nats)


def test_each_leaf_of_the_guide_names_rows_that_are_accepted():
    guide = (ROOT / "README.md").read_text("utf-8").split("## Decision guide")[1].split("```")[1]
    leaves = re.findall(r"rows ([^\"]+)\"", guide)
    keys = {entry["key"] for entry in accepted(ROOT)}
    named = [name for leaf in leaves for name in leaf.split(", ")]
    assert len(leaves) == 8
    assert [n for n in named if not any(key.startswith(f"{n}.") for key in keys)] == []
