"""What readers get beyond the script: numbers of the recorded run, stubs to try, folded cells, warnings."""

import nbformat
import pytest
from typer.testing import CliRunner

from conftest import CELLS, NAME, script
from course_utils.results import accept, list_runs
from course_utils.tools import cli
from course_utils.tools.notebooks import build as building
from course_utils.tools.notebooks.check import check, warnings
from course_utils.tools.notebooks.execute import NotebookFailed
from course_utils.tools.notebooks.fillings import fill, filling_problems, unfilled
from course_utils.tools.notebooks.folding import SOLUTION_TITLE
from course_utils.tools.notebooks.pairs import Notebook, from_script, tagged
from course_utils.tools.notebooks.reader import readers_version
from course_utils.tools.notebooks.students import student_version

RECORD = """# %% tags=["folded"]
# Records of the gain
from course_utils.results import record

gain = {"cpu": 0.5, "quick": 0.25}[os.environ["COURSE_PROFILE"]]
record("sample.gain", gain, "nats", 0.1)
"""
SEEN = "# %% [markdown]\n# The gain is {{sample.gain:+.3f}} nats in the recorded run."


def entry(key: str, value: float, model: str | None = None) -> dict:
    return {"key": key, "model": model, "value": value, "unit": "nats"}


def change(notebook: Notebook, **changed: str | None) -> None:
    notebook.script.write_text(script(**changed), encoding="utf-8")


def text_of(nb: nbformat.NotebookNode) -> str:
    return "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")


# Fillings


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("{{a.loss}}", "0.01235"),
        ("{{a.loss:.2f}} and {{a.loss:+.3f}}", "0.01 and +0.012"),
        ("{{a.loss:.1%}} of {{a.tokens:,d}}", "1.2% of 4,096"),
        ("{{a.many@one:.1f}}, {{a.many@two:.1f}}", "1.0, 2.0"),
        ("{{a.many@two}}", "2"),
        ("$\\frac{a}{b}$ { {x} }", "$\\frac{a}{b}$ { {x} }"),
        ("{{a.lost}}", "(not recorded in this run)"),
    ],
)
def test_a_filling_is_the_recorded_value_in_its_format(text, filled):
    run = [entry("a.loss", 0.012345), entry("a.tokens", 4096)]
    run += [entry("a.many", 1.0, "one"), entry("a.many", 2.0, "two")]
    assert fill(text, run) == filled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{{a.los}}",
            "cell 6: {{a.los}}: the run recorded nothing as a.los; near to it are a.loss",
        ),
        ("{{zz.top}}", "the run recorded nothing as zz.top; no key is near to it"),
        ("{{a.many}}", "recorded for several models: write a.many@MODEL, one of one, two"),
        ("{{a.many@three}}", "not recorded for three, only for one, two"),
        ("{{a.twice}}", "recorded by several protocols: give each a key of its own"),
        ("{{a.loss:d}}", "0.5 cannot be written so: Unknown format code 'd'"),
    ],
)
def test_a_filling_without_its_one_value_is_told_with_cell_key_and_near_keys(sample, text, message):
    change(sample, section=f"# %% [markdown]\n# {text}, in the recorded run")
    run = [entry("a.loss", 0.5), entry("a.many", 1.0, "one"), entry("a.many", 2.0, "two")]
    run += [entry("a.twice", 1.0), entry("a.twice", 2.0)]
    (problem,) = unfilled(from_script(sample), run)
    assert message in problem


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"section": "# %% [markdown]\n# It is {{a.b}}."}, "does not say `in the recorded run`"),
        ({"section": "# %% [markdown]\n# {{a}} in the recorded run"}, "{{a}} names no key"),
        ({"section": "# %% [markdown]\n# $e^{{x+1}}$"}, "{{x+1}} names no key"),
        ({"statement": CELLS["statement"] + " {{a.b}}"}, "in an exercise"),
    ],
)
def test_check_refuses_fillings_that_mislead(sample, changed, message):
    change(sample, **changed)
    (problem,) = filling_problems(from_script(sample))
    assert message in problem
    assert any(message in told for told in check(sample))


def test_the_words_may_begin_a_sentence_and_run_over_a_line(sample):
    change(sample, section="# %% [markdown]\n# In the\n# recorded run it is {{a.b}}.")
    assert filling_problems(from_script(sample)) == []


@pytest.fixture(scope="module")
def built_once(tmp_path_factory):
    """The text and the records of a notebook built with a recorded sentence: one build for all tests."""
    return {}


@pytest.fixture
def built(sample, built_once) -> Notebook:
    change(sample, work=RECORD, seen=SEEN)
    if not built_once:
        assert building.build(sample)
        built_once["text"] = sample.ipynb.read_text(encoding="utf-8")
        built_once["runs"] = list_runs(sample.root / "runs" / building.PROFILE)
    sample.ipynb.write_text(built_once["text"], encoding="utf-8")
    accept(sample.root, built_once["runs"])
    return sample


def test_build_fills_in_what_its_own_run_recorded(built):
    assert "The gain is +0.500 nats in the recorded run." in text_of(building.read(built))
    assert "{{" not in built.ipynb.read_text()
    assert check(built) == []


def test_course_run_shows_its_own_numbers_and_tells_what_it_did_not_record(sample, monkeypatch):
    seen = SEEN + " Others: {{sample.gain@smollm2:.2f}}."
    change(sample, work=RECORD, seen=seen)
    monkeypatch.chdir(sample.root)
    done = CliRunner().invoke(cli.app, ["run", "sample"])
    assert done.exit_code == 0, done.output
    assert "cell 9: {{sample.gain@smollm2:.2f}}: not recorded for smollm2" in done.output
    nb = nbformat.read(sample.root / "runs" / "quick" / f"{NAME}.ipynb", as_version=4)
    assert "+0.250 nats in the recorded run. Others: (not recorded in this run)." in text_of(nb)


def test_build_refuses_a_key_that_the_run_did_not_record_though_an_earlier_one_did(sample):
    change(sample, work=RECORD, seen=SEEN)
    building.build(sample)
    recorded = list((sample.root / "runs" / "cpu" / "results").iterdir())
    assert len(recorded) == 1 and recorded[0].name.startswith("sample.gain.")
    before = sample.ipynb.read_bytes()
    change(sample, work=RECORD.replace("sample.gain", "sample.gains"), seen=SEEN)
    with pytest.raises(NotebookFailed, match=r"cell 9: .*nothing as sample\.gain; .*sample\.gains"):
        building.build(sample)
    assert sample.ipynb.read_bytes() == before


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (lambda nb: nb.cells[8].update(source=nb.cells[8].source.replace("0.500", "0.900")),
         "cell 9 is not what the script and the run's records make it"),
        (lambda nb: nb.cells[8].update(source="The gain is large in the recorded run."),
         "cell 9 is not what the script and the run's records make it"),
        (lambda nb: nb.metadata["course"]["recorded"][0].update(value=0.9), "cell 9 is not what"),
        (lambda nb: nb.metadata["course"].pop("recorded"), "the run recorded nothing as sample.gain"),
        (lambda nb: nb.cells[6].metadata.pop("jupyter"), "cell 7 is not what the script"),
    ],
    ids=["number by hand", "sentence by hand", "record by hand", "no records", "unfolded"],
)  # fmt: skip
def test_check_catches_a_planted_wrong_sentence(built, plant, message):
    nb = building.read(built)
    plant(nb)
    nbformat.write(nb, built.ipynb)
    problems = check(built)
    with pytest.raises(AssertionError, match=message):
        assert not "\n".join(problems)


def test_check_catches_a_planted_wrong_sentence_in_the_script(built):
    change(built, work=RECORD, seen=SEEN.replace("{{sample.gain:+.3f}}", "+0.9"))
    assert any("its cells are not those of the script" in problem for problem in check(built))


def test_check_compares_the_sentences_with_the_accepted_values(built):
    """Sentence and record changed together agree with each other, but not with what was accepted."""
    building.build(built, force=True)
    accept(built.root, list_runs(built.root / "runs" / "cpu"))
    assert check(built) == []
    nb = building.read(built)
    nb.metadata["course"]["recorded"][0]["value"] = 0.9
    nb.cells[8].source = nb.cells[8].source.replace("0.500", "0.900")
    nbformat.write(nb, built.ipynb)
    (problem,) = check(built)
    assert "0.9 nats is 0.4 from the accepted 0.5 nats" in problem


# Folding


def test_cells_that_do_not_teach_are_folded_for_jupyterlab_and_colab(built):
    nb = building.read(built)
    folded = [cell for cell in nb.cells if cell.metadata.get("jupyter")]
    titles = [cell.source.splitlines()[0] for cell in folded]
    assert titles == [
        "#@title Set-up: installs the course's package where it is missing, as on Colab.",
        "#@title Records of the gain",
        f"#@title {SOLUTION_TITLE}",
    ]
    for cell in folded:
        assert cell.metadata["jupyter"] == {"source_hidden": True}
        assert cell.metadata["cellView"] == "form"
        assert cell.execution_count


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ('# %% tags=["folded"]\nx = 1', "cell 7 is folded: begin it with a comment"),
        ('# %% [markdown] tags=["folded"]\n# Text', "cell 7 is text: only code can be folded"),
    ],
)
def test_check_refuses_a_fold_without_a_title(sample, work, message):
    change(sample, work=work)
    assert any(message in problem for problem in check(sample))


def test_the_script_and_its_ids_know_nothing_of_folds(sample):
    nb = from_script(sample)
    read = readers_version(nb, [])
    assert "#@title" not in "".join(cell.source for cell in nb.cells)
    assert [cell.id for cell in read.cells] == [cell.id for cell in nb.cells]


# Exercises


def test_readers_try_first_with_the_stub_and_find_the_solution_folded_below(sample):
    statement, solution, tests = readers_version(from_script(sample), []).cells[-3:]
    assert "**Try it first.**" in statement.source
    stub = 'def double(x: int) -> int:\n    """Twice x."""\n    raise NotImplementedError()'
    assert statement.source.endswith(f"```python\n{stub}\n```")
    assert "return 2 * x" in solution.source and solution.metadata["jupyter"]["source_hidden"]
    assert "jupyter" not in tests.metadata


def test_students_see_the_cell_that_they_write_and_no_second_stub(sample):
    nb = student_version(from_script(sample), sample.name)
    statement, exercise, _ = nb.cells[-3:]
    assert "Try it first" not in statement.source
    assert "jupyter" not in exercise.metadata and not exercise.source.startswith("#@title")
    assert tagged(nb, "setup")[0].metadata["cellView"] == "form"


# Warnings


def test_warnings_count_the_lines_of_cells_that_teach(sample):
    long = "# %%\n" + "x = 1\n" * 9
    change(sample, **{f"long{number}": long for number in range(8)}, code="# %%\n## What you saw")
    first, second = warnings(sample)
    assert "half of its code cells have 9 lines or more, at most 8" in first
    assert "no section `## What you saw`" in second


def test_warnings_count_assertions_that_name_no_mistake(sample):
    tests = '# %% tags=["exercise-tests"]\nassert double(2) == 4\nassert double(1) == 2, "doubled?"'
    change(sample, tests=tests)
    assert any("1 assertions of its exercises have no message" in told for told in warnings(sample))


def test_no_warning_where_style_is_kept_and_folded_cells_do_not_count(sample):
    folded = '# %% tags=["folded"]\n# Records\n' + "x = 1\n" * 20
    closing = "# %% [markdown]\n# ## What you saw\n# - It doubles."
    change(sample, one=folded, two=folded, three=folded, four=folded, closing=closing)
    assert warnings(sample) == []


def test_course_check_prints_warnings_and_does_not_fail_for_them(built, monkeypatch):
    monkeypatch.chdir(built.root)
    done = CliRunner().invoke(cli.app, ["check"])
    assert done.exit_code == 0, done.output
    assert f"warning: {NAME}: it has no section `## What you saw`" in done.output
