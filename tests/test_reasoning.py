"""Traces: the task and its verifier, any teacher's text, what a student reads, and the shipped models."""

import itertools
import json
import random

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from course_utils.distillation import reasoning_lm
from course_utils.distillation.arithmetic import (
    LONGEST,
    SYMBOLS,
    answer_is_right,
    answer_only,
    character_tokenizer,
    dotted,
    first_wrong_step,
    next_step,
    on_form,
    parts,
    random_problems,
    shuffled,
    split_of,
    steps_of,
    worked,
)
from course_utils.distillation.reasoning_lm import (
    KINDS,
    Run,
    accuracy,
    lines_of,
    new_model,
    shipped_logs,
    shipped_model,
    solve,
    train_lines,
)
from course_utils.distillation.traces import (
    LineBatches,
    completion_loss,
    completion_mask,
    line_rows,
    rejection_sample,
    same_tokenizer,
    write_traces,
)
from course_utils.evaluation.proportion import wilson
from course_utils.models import load_model
from course_utils.plotting.traces import one_step_or_all, solved_by_length, written_steps
from course_utils.training.loop import TrainConfig

matplotlib.use("agg")
TOKENIZER = character_tokenizer()
PROBLEMS = st.builds(
    lambda first, rest: first + "".join(rest),
    st.sampled_from("0123456789"),
    st.lists(
        st.builds(str.__add__, st.sampled_from("+-"), st.sampled_from("0123456789")),
        min_size=1,
        max_size=LONGEST,
    ),
)


@pytest.fixture(autouse=True)
def closed():
    """pyplot keeps every figure until it is closed."""
    yield
    plt.close("all")


def tiny(seed=0):
    return new_model(16, seed).eval()


# The task


@given(PROBLEMS)
def test_the_answer_is_the_sum_modulo_ten(problem):
    terms = [int(problem[0]), *(int(problem[i : i + 2]) for i in range(1, len(problem), 2))]
    assert int(steps_of(problem)[-1]) == sum(terms) % 10
    assert len(steps_of(problem)) == len(terms)


@given(PROBLEMS)
def test_a_worked_line_passes_and_has_no_wrong_step(problem):
    line = worked(problem)
    assert answer_is_right(line) and first_wrong_step(line) is None
    assert parts(line) == (problem, steps_of(problem))


@given(PROBLEMS, st.data())
def test_a_changed_step_is_found_where_it_was_changed(problem, data):
    steps = steps_of(problem)
    place = data.draw(st.integers(0, len(steps) - 1))
    other = data.draw(st.sampled_from([d for d in "0123456789." if d != steps[place]]))
    line = on_form(problem) + steps[:place] + other + steps[place + 1 :] + "\n"
    assert first_wrong_step(line) == place
    assert answer_is_right(line) == (place < len(steps) - 1)


def test_a_step_is_judged_by_the_one_before_as_it_was_written():
    assert first_wrong_step(on_form("7+5-3+8") + "7386\n") == 1  # 3 - 3 and 0 + 8 would be right
    assert first_wrong_step(on_form("7+5-3+8") + "730\n") == 1
    assert first_wrong_step(on_form("7+5-3") + "72\n") == 2  # a step is missing
    assert first_wrong_step(on_form("7+5-3") + "7299\n") == 3  # one too much
    assert first_wrong_step(on_form("7+5-3") + "729") == 3  # no end
    assert next_step("2", "-", "3") == "9"


@pytest.mark.parametrize(
    "line", ["", "\n", "nonsense\n", "7+5\n", on_form("7+5") + "\n", "7+5:2", ":2\n"]
)
def test_what_is_no_solution_is_not_right_and_no_error(line):
    assert not answer_is_right(line)


@pytest.mark.parametrize("problem", ["", "7", "+5", "7*5", "12+3", "7+"])
def test_what_is_no_problem_is_refused(problem):
    with pytest.raises(ValueError, match="is no problem: write digits"):
        steps_of(problem)


def test_a_problem_too_long_for_the_form_is_refused():
    with pytest.raises(ValueError, match="has 7 operations, and the form holds 6"):
        on_form("1" + "+1" * 7)


def test_versions_of_a_line_keep_problem_answer_and_length():
    line = worked("7+5-3+8+1")
    assert answer_only(line) == on_form("7+5-3+8+1") + "8\n"
    assert parts(dotted(line))[1] == "....8"
    found = {shuffled(line, random.Random(seed)) for seed in range(20)}
    assert len(found) > 5
    for other in (*found, dotted(line)):
        assert len(other) == len(line) and answer_is_right(other)
    assert {tuple(sorted(parts(other)[1])) for other in found} == {tuple(sorted("72978"))}


def test_splits_do_not_meet_and_problems_are_drawn_by_their_seed():
    train = random_problems(300, 2, split="train", seed=0)
    held_out = random_problems(300, 2, split="evaluation", seed=0)
    assert not set(train) & set(held_out)
    assert {split_of(p) for p in held_out} == {"evaluation"}
    assert train == random_problems(300, 2, split="train", seed=0)
    assert train != random_problems(300, 2, split="train", seed=1)
    with pytest.raises(ValueError, match="got 'test'"):
        random_problems(1, 2, split="test", seed=0)
    with pytest.raises(ValueError, match="1 to 6 operations, got 7"):
        random_problems(1, 7, split="train", seed=0)


def test_every_symbol_is_a_token_and_text_comes_back():
    assert TOKENIZER(SYMBOLS).input_ids == list(range(len(SYMBOLS))) and len(TOKENIZER) == 16
    assert TOKENIZER.decode(TOKENIZER(SYMBOLS).input_ids) == SYMBOLS


# What a teacher writes


def test_the_likeliest_text_is_that_of_transformers():
    model = tiny()
    prompts = ["\n" + on_form(p) for p in random_problems(20, 3, split="train", seed=0)]
    ours = write_traces(model, TOKENIZER, prompts, max_new_tokens=8)
    ids = torch.tensor([TOKENIZER(p).input_ids for p in prompts])
    theirs = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=0
    )
    for text, row in zip(ours, theirs.tolist(), strict=True):
        new = row[ids.shape[1] :]
        new = new[: new.index(0) + 1] if 0 in new else new
        assert text == TOKENIZER.decode(row[: ids.shape[1]] + new)


def test_prompts_of_other_lengths_come_back_in_their_order():
    model, prompts = tiny(), ["\n7+", "\n7", "\n123", "\n4"]
    together = write_traces(model, TOKENIZER, prompts, max_new_tokens=4)
    alone = [write_traces(model, TOKENIZER, [p], max_new_tokens=4)[0] for p in prompts]
    assert together == alone


def test_a_seed_draws_the_same_text_again_with_the_model_s_probabilities():
    model, prompts = tiny(), ["\n7+5"] * 4000
    drawn = write_traces(model, TOKENIZER, prompts, max_new_tokens=1, temperature=2.0, seed=3,
                         batch_size=4000)  # fmt: skip
    assert drawn == write_traces(model, TOKENIZER, prompts, max_new_tokens=1, temperature=2.0, seed=3,
                                 batch_size=4000)  # fmt: skip
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([TOKENIZER("\n7+5").input_ids])).logits[0, -1]
    expected = torch.softmax(logits / 2.0, -1)
    counts = torch.tensor([sum(t[-1] == s for t in drawn) for s in SYMBOLS]) / len(drawn)
    assert (counts - expected).abs().max() < 0.04


def test_any_causal_model_is_a_teacher():
    model, tokenizer = load_model("course-lm")
    texts = write_traces(model, tokenizer, ["The island", "7+5 ="], max_new_tokens=3)
    assert texts[0].startswith("The island") and texts[1].startswith("7+5 =")


def test_bad_requests_to_a_teacher_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match=r"training mode: call \.eval"):
        write_traces(new_model(16, 0).train(), TOKENIZER, ["7"], max_new_tokens=1)
    with pytest.raises(ValueError, match=r"temperature=-1.0 is negative"):
        write_traces(model, TOKENIZER, ["7"], max_new_tokens=1, temperature=-1.0)
    with pytest.raises(ValueError, match="no prompts"):
        write_traces(model, TOKENIZER, [], max_new_tokens=1)
    with pytest.raises(ValueError, match="a prompt holds no token"):
        write_traces(model, TOKENIZER, [""], max_new_tokens=1)
    with pytest.raises(ValueError, match="20 tokens and 8 new ones need more than the model's"):
        write_traces(model, TOKENIZER, ["7" * 20], max_new_tokens=8)


# Sorting, and what a student reads


def test_a_verifier_sorts_and_an_empty_result_is_refused():
    good, bad = worked("7+5"), on_form("7+5") + "73\n"
    found = rejection_sample([good, bad, good, bad], answer_is_right)
    assert found.accepted == [good, good] and found.rejected == [bad, bad] and found.rate == 0.5
    with pytest.raises(ValueError, match=r"accepted none of 1 traces: take a better teacher.*73"):
        rejection_sample([bad], answer_is_right)
    with pytest.raises(ValueError, match="accepted none of 0 traces"):
        rejection_sample([], answer_is_right)


def test_students_of_another_tokenizer_are_refused_with_the_reason():
    _, other = load_model("course-lm")
    same_tokenizer(TOKENIZER, character_tokenizer())
    with pytest.raises(
        ValueError, match=r"different tokenizers \(16 and 4096 tokens; .*decode the"
    ):
        same_tokenizer(TOKENIZER, other)
    with pytest.raises(ValueError, match="different tokenizers"):
        line_rows([worked("7+5")], TOKENIZER, teacher_tokenizer=other)


def test_rows_begin_and_are_filled_and_only_the_trace_is_counted():
    rows = line_rows([worked("7+5-3"), worked("4-9")], TOKENIZER)
    assert rows.shape == (2, 1 + 13 + 1 + 3 + 1)
    mask = completion_mask(rows, SYMBOLS.index(":"), 0)
    counted = ["".join(SYMBOLS[t] for t in row[m]) for row, m in zip(rows, mask, strict=True)]
    assert counted == ["729\n", "45\n"]
    with pytest.raises(ValueError, match="no lines to learn from"):
        line_rows([], TOKENIZER)


def test_the_loss_is_the_cross_entropy_of_the_trace():
    rows, model = line_rows([worked("7+5-3"), worked("4-9")], TOKENIZER), tiny()
    ours = completion_loss(SYMBOLS.index(":"), 0)(model, rows)
    logits, losses = model(input_ids=rows).logits, []
    for row, z, written in zip(rows, logits, (4, 3), strict=True):
        losses += [F.cross_entropy(z[i - 1], row[i]) for i in range(15, 15 + written)]
    torch.testing.assert_close(ours, torch.stack(losses).mean())
    with pytest.raises(ValueError, match="no row has a token after the token 1"):
        completion_loss(1, 0)(model, torch.zeros(2, 4, dtype=torch.long))


def test_an_epoch_visits_every_row_once_in_an_order_of_its_seed():
    rows = torch.arange(12)[:, None]
    batches = LineBatches(rows, batch_size=4, seed=1)
    epochs = [torch.cat([batches(3 * e + i) for i in range(3)]).flatten().tolist() for e in (0, 1)]
    assert epochs[0] != epochs[1] and all(sorted(e) == list(range(12)) for e in epochs)
    assert torch.equal(LineBatches(rows, batch_size=4, seed=1)(4), batches(4))
    with pytest.raises(ValueError, match="12 lines are too few for a batch of 13"):
        LineBatches(rows, batch_size=13)


# Intervals


@settings(max_examples=30)
@given(st.integers(1, 500), st.data())
def test_wilson_holds_the_share_and_solves_its_equation(count, data):
    right = data.draw(st.integers(0, count))
    low, high = wilson(right, count)
    share = right / count
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):  # |p - end| is z standard errors at the end itself
        if 0 < end < 1:
            assert abs(share - end) == pytest.approx(
                1.96 * (end * (1 - end) / count) ** 0.5, abs=1e-9
            )


def test_wilson_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.binomtest(7, 20).proportion_ci(0.95, method="wilson")
    z = stats.norm.ppf(0.975)
    assert wilson(7, 20, z) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize(("right", "count"), [(0, 0), (5, 4), (-1, 4)])
def test_counts_that_are_no_share_are_refused(right, count):
    with pytest.raises(ValueError, match=f"{right} of {count} is no share"):
        wilson(right, count)


# Training


def test_each_kind_of_student_reads_its_version():
    good, bad, cut = worked("7+5-3+8"), on_form("7+5") + "73\n", on_form("7+5") + "7"
    found = {kind: lines_of(kind, [good, bad, cut]) for kind in KINDS}
    assert found["verified"] == [good] and found["unfiltered"] == [good, bad, cut]
    assert found["rejected"] == [bad]  # what has no end cannot be a row
    assert found["answers"] == [answer_only(good)] and found["dots"] == [dotted(good)]
    assert sorted(found["shuffled"][0]) == sorted(good)
    with pytest.raises(ValueError, match="unknown kind 'best': choose of answers"):
        lines_of("best", [good])
    with pytest.raises(ValueError, match="accepted none of 1"):
        lines_of("answers", [bad])


def test_tokens_of_a_step_are_equal_with_and_without_steps():
    rows = (
        line_rows([worked("1+2+3+4+5")], TOKENIZER),
        line_rows([answer_only(worked("1+2"))], TOKENIZER),
    )
    widths = [r.shape[1] for r in rows]
    assert widths == [21, 17] and {reasoning_lm.TOKENS % w for w in widths} == {0}


def test_a_student_learns_one_operation_within_seconds():
    lines = [worked(f"{a}+{b}") for a, b in itertools.product(range(10), range(2))]
    model = new_model(32, 0)
    before = accuracy_of_one(model.eval(), lines)
    config = TrainConfig(120, 4e-3, warmup=5, decay=30, eval_every=60)
    curve = train_lines(model, lines * 3, config)
    assert accuracy_of_one(model, lines) > max(0.9, before)
    assert curve[-1]["loss"] < 0.3 and set(curve[0]) >= {"held_out", "cpu_seconds"}


def accuracy_of_one(model, lines):
    written = solve(model, [parts(line)[0] for line in lines])
    return sum(map(answer_is_right, written)) / len(lines)


def test_the_command_trains_ships_and_goes_on(tmp_path, monkeypatch):
    from course_utils.tools.cli.models import app

    monkeypatch.setattr(reasoning_lm, "STEPS", {"teacher": 20, "student": 20})
    monkeypatch.setattr(reasoning_lm, "TRACED", 60)
    monkeypatch.setattr(reasoning_lm, "WIDTHS", {"teacher": 16, "student": 16})
    monkeypatch.setattr(reasoning_lm, "PLAN", [("verified", 0), ("verified", 1)])
    solved = {n: [True, False] for n in range(1, 7)}
    monkeypatch.setattr(reasoning_lm, "accuracy", lambda model, count: solved)
    monkeypatch.setattr(reasoning_lm, "teacher_traces", lambda teacher: [worked("7+5-3+8")] * 40)
    out, folder = tmp_path / "runs", tmp_path / "shipped"
    for _ in range(2):  # the second time all is there
        done = CliRunner().invoke(app, ["train-reasoning", "--out", str(out)])
        assert done.exit_code == 0, done.output
    assert "teacher" not in done.output  # nothing was trained again
    done = CliRunner().invoke(app, ["train-reasoning", "--out", str(out), "--ship", str(folder)])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "teacher.json", "teacher.safetensors", "verified-seed0.json",
        "verified-seed0.safetensors", "verified-seed1.json",
    ]  # fmt: skip
    log = json.loads((folder / "verified-seed1.json").read_text("utf-8"))
    assert log["run"] == {"kind": "verified", "seed": 1} and log["tokens_seen"] == 20 * 714
    assert "| verified-seed1 |" in (folder / "README.md").read_text("utf-8")
    shipped = shipped_model("verified-seed0", folder)
    with torch.no_grad():
        assert shipped(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()


def test_the_shipped_models_solve_what_their_logs_say():
    logs = shipped_logs()
    assert {f"{kind}-seed0" for kind in KINDS} | {"teacher"} <= set(logs)
    for name in ("teacher", "verified-seed0"):
        right = accuracy(shipped_model(name), 100)
        for length, of in right.items():
            assert sum(of) / 100 == pytest.approx(logs[name]["right"][str(length)], abs=0.15)
    with pytest.raises(
        ValueError, match="no weights of 'verified-seed1' are shipped; there are answers"
    ):
        shipped_model("verified-seed1")


def test_a_run_s_schedule_and_name():
    assert Run("dots", 2).name == "dots-seed2" and Run("teacher").name == "teacher"
    assert Run("dots").config().steps == reasoning_lm.STEPS["student"]


# Figures


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_the_two_ways_show_the_problem_and_what_is_computed():
    with_steps, alone = one_step_or_all("7+5-3", "729").axes
    assert texts(with_steps) == list("7+5-3") + list("729") and texts(alone) == [
        *list("7+5-3"),
        "9",
    ]
    with pytest.raises(ValueError, match="has 3 digits, and 2 steps are given"):
        one_step_or_all("7+5-3", "72")


def test_a_wrong_step_has_another_colour_and_a_missing_one_a_mark():
    figure = written_steps({"a": ("7+5-3", "738", 1), "b": ("7+5-3", "72", 2)})
    assert texts(figure.axes[0]).count("?") == 1
    colours = {matplotlib.colors.to_hex(p.get_facecolor()).upper() for p in figure.axes[0].patches}
    assert {"#EBAE8A", "#8FC1DE", "#F7F7F7"} <= colours
    with pytest.raises(ValueError, match="15 symbols are too many"):
        written_steps({"a": ("1" + "+1" * 7, "1", None)})


def test_shares_by_length_have_their_intervals():
    figure = solved_by_length({"a": {1: (1.0, 0.9, 1.0), 5: (0.1, 0.05, 0.2)}}, (1, 2, 3, 4))
    axis = figure.axes[0]
    assert "never trained on" in texts(axis)
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["chance", "a"]
