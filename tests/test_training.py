"""The training loop: it learns, repeats itself, resumes, stops, and is the same under torchrun."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import course_utils.training.loop as loop_module
from course_utils import results
from course_utils.data.batches import TrainingBatches
from course_utils.data.corpora import Document
from course_utils.models import load_model
from course_utils.results import entries
from course_utils.tools.site import model_card as report_module
from course_utils.tools.site import ngram as ngram_module
from course_utils.training import course_lm
from course_utils.training.loop import TrainConfig, next_token_loss, train

CONTEXT = 8
CONFIG = TrainConfig(steps=30, lr=1e-2, warmup=4, decay=10, eval_every=10)


def tiny_model(seed: int = 0) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=16, n_positions=CONTEXT, n_embd=16, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def tiny_batches(batch_size: int = 4) -> TrainingBatches:
    """Text that can be learned: every token follows from the one before."""
    stream = torch.arange(600) * 3 % 16
    return TrainingBatches(stream, context=CONTEXT, batch_size=batch_size, seed=1)


def held_out(model) -> float:
    with torch.no_grad():
        return next_token_loss(model, torch.arange(CONTEXT + 1)[None] * 3 % 16).item()


def run(config=CONFIG, model=None, **more):
    model = tiny_model() if model is None else model
    return model, train(model, tiny_batches(), config, progress=False, **more)


def without_seconds(curve):
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in curve]


def assert_same_weights(a, b):
    b = b.state_dict()
    assert all(torch.equal(value, b[name]) for name, value in a.state_dict().items())


class Interrupted(Exception):
    """Stands for whatever stops a run."""


def test_loss_falls_and_the_curve_says_so():
    _, curve = run(evaluate=held_out)
    assert [row["step"] for row in curve] == [10, 20, 30]
    assert curve[0]["loss"] > curve[1]["loss"] > curve[2]["loss"]
    assert curve[-1]["held_out"] < 0.7 * curve[0]["held_out"]
    assert set(curve[0]) == {"step", "loss", "lr", "held_out", "seconds", "cpu_seconds"}


def test_a_bar_shows_the_steps_and_the_losses_unless_it_is_switched_off(capsys):
    train(tiny_model(), tiny_batches(), CONFIG, evaluate=held_out)
    shown = capsys.readouterr().err
    assert "30/30" in shown and "loss=" in shown and "held_out=" in shown
    run(evaluate=held_out)
    assert not capsys.readouterr().err


def test_a_run_repeats_bit_for_bit():
    (a, curve_a), (b, curve_b) = run(evaluate=held_out), run(evaluate=held_out)
    assert_same_weights(a, b)
    assert without_seconds(curve_a) == without_seconds(curve_b)


@pytest.mark.parametrize("stopped_at", [10, 17, 29])
def test_resuming_is_bit_exact(tmp_path, stopped_at):
    file = tmp_path / "checkpoint.safetensors"
    whole, whole_curve = run(evaluate=held_out, checkpoint=tmp_path / "whole.safetensors")
    batches = tiny_batches()

    def interrupted(step):
        if step == stopped_at:
            raise Interrupted
        return batches(step)

    with pytest.raises(Interrupted):
        train(tiny_model(), interrupted, CONFIG, evaluate=held_out, checkpoint=file, progress=False)
    resumed, curve = run(model=tiny_model(seed=7), evaluate=held_out, checkpoint=file)
    assert_same_weights(whole, resumed)
    assert without_seconds(curve) == without_seconds(whole_curve)
    # weights, best weights, both moments and the step counters of AdamW
    assert tensors(file) == tensors(tmp_path / "whole.safetensors")


def tensors(file: Path) -> dict[str, bytes]:
    with loop_module.safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name).numpy().tobytes() for name in opened.keys()}  # noqa: SIM118


def test_a_finished_run_is_loaded_not_repeated(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    finished, _ = run(evaluate=held_out, checkpoint=file)
    again, curve = run(model=tiny_model(seed=7), evaluate=held_out, checkpoint=file)
    assert_same_weights(finished, again)
    assert len(curve) == 3


def test_best_weights_survive_an_interruption(tmp_path):
    """The best evaluation lies before the interruption; what follows is worse."""
    file = tmp_path / "checkpoint.safetensors"
    at_step_10, _ = run(replace(CONFIG, steps=10, decay=0))
    losses = iter([1.0, 2.0])
    config = replace(CONFIG, decay=0)
    run(replace(config, steps=20), evaluate=lambda _: next(losses), checkpoint=file)
    resumed, curve = run(config, tiny_model(seed=7), evaluate=lambda _: 3.0, checkpoint=file)
    assert [row["held_out"] for row in curve] == [1.0, 2.0, 3.0]
    assert_same_weights(at_step_10, resumed)


def test_patience_stops_and_keeps_the_best_weights():
    config = replace(CONFIG, steps=100, decay=0, patience=2)
    losses = iter([3.0, 2.0, 2.5, 2.1, 0.0])  # the last is never asked for
    model, curve = run(config, evaluate=lambda _: next(losses))
    assert [row["held_out"] for row in curve] == [3.0, 2.0, 2.5, 2.1]
    assert_same_weights(model, run(replace(config, steps=20, patience=None))[0])


def test_learning_rate_warms_up_stays_and_decays_to_zero():
    config = TrainConfig(steps=100, lr=2.0, warmup=10, decay=20)
    rates = [config.lr_at(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[9:81] == [2.0] * 72
    assert rates[80:] == pytest.approx([2.0 - 0.1 * i for i in range(21)])
    assert rates[100] == 0


@given(st.integers(1, 50), st.integers(0, 50), st.integers(100, 200), st.integers(100, 200))
def test_learning_rate_before_the_decay_does_not_depend_on_steps(warmup, decay, steps, other):
    a, b = (TrainConfig(steps=n, warmup=warmup, decay=decay) for n in (steps, other))
    plateau = range(min(steps, other) - decay)
    assert [a.lr_at(step) for step in plateau] == [b.lr_at(step) for step in plateau]


def test_frozen_weights_stay_and_matrices_alone_are_decayed():
    model = tiny_model()
    model.transformer.wpe.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    no_gradient = TrainConfig(steps=1, lr=0.5, warmup=0, weight_decay=0.1, eval_every=1)
    train(
        model, tiny_batches(), no_gradient, progress=False,
        loss=lambda m, batch: 0.0 * sum(p.sum() for p in m.parameters()),
    )  # fmt: skip
    for name, p in model.named_parameters():
        decayed = p.ndim == 2 and "wpe" not in name
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if decayed else 1.0))


def test_weight_decay_can_follow_a_schedule():
    class Alternating(TrainConfig):
        def weight_decay_at(self, step):
            return 0.1 * (step % 2)

    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(
        model, tiny_batches(), Alternating(steps=4, lr=0.5, warmup=0, eval_every=4), progress=False,
        loss=lambda m, batch: 0.0 * sum(p.sum() for p in m.parameters()),
    )  # fmt: skip
    for name, p in model.named_parameters():
        factor = 0.95**2 if p.ndim == 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)


def test_before_step_is_told_each_step_also_of_a_resumed_run(tmp_path):
    file, steps = tmp_path / "checkpoint.safetensors", []
    run(replace(CONFIG, steps=20, decay=0), checkpoint=file, before_step=steps.append)
    assert steps == list(range(20))
    run(replace(CONFIG, decay=0), checkpoint=file, before_step=steps.append)
    assert steps == list(range(30))


def test_tied_weights_survive_checkpoint_and_best_weights(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    run(replace(CONFIG, steps=10, decay=0), evaluate=held_out, checkpoint=file)
    model, _ = run(replace(CONFIG, decay=0), evaluate=held_out, checkpoint=file)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_interrupted_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.safetensors"
    run(replace(CONFIG, steps=10, decay=0), checkpoint=file)
    before = file.read_bytes()

    def half(tensors, path, metadata):
        path.write_bytes(before[:100])
        raise Interrupted

    monkeypatch.setattr(loop_module, "save_file", half)
    with pytest.raises(Interrupted):
        run(replace(CONFIG, decay=0), checkpoint=file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_checkpoint_of_another_model_is_refused(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    run(replace(CONFIG, steps=10, decay=0), checkpoint=file)
    config = tiny_model().config
    config.vocab_size = 20
    with pytest.raises(ValueError, match=r"another model .*wte.*\[16, 16\].*\[20, 16\]"):
        run(model=GPT2LMHeadModel(config), checkpoint=file)


OTHERS = {
    "another learning rate": ({"lr": 2e-2}, {}, "lr is 0.01 there, 0.02 here"),
    "other betas": ({"betas": (0.8, 0.9)}, {}, r"betas is \[0.9, 0.98\] there, \[0.8, 0.9\] here"),
    "another rhythm": (
        {"eval_every": 5, "clip": 2.0},
        {},
        "clip is 1.0 .*; eval_every is 10 there, 5",
    ),
    "other data": ({}, {"batches": tiny_batches(batch_size=5)}, "the first batch is another"),
    "data called otherwise": ({}, {"data": "sotu"}, "data is 'a stream' there, 'sotu' here"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_saying_what_differs(tmp_path, other):
    """A run once went on with other data, or another learning rate, as if nothing had happened."""
    file = tmp_path / "checkpoint.safetensors"
    run(replace(CONFIG, steps=10, decay=0), checkpoint=file, data="a stream")
    changed, more, message = OTHERS[other]
    more = {"batches": tiny_batches(), "data": "a stream"} | more
    config = replace(CONFIG, decay=0, **changed)
    model = tiny_model(seed=7)
    with pytest.raises(ValueError, match=rf"another run: {message}.*move it away"):
        train(model, more.pop("batches"), config, checkpoint=file, progress=False, **more)
    assert_same_weights(model, tiny_model(seed=7))


def test_a_checkpoint_that_does_not_say_what_it_was_made_with_is_refused(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    run(replace(CONFIG, steps=10), checkpoint=file)
    with loop_module.safe_open(file, "pt") as opened:
        kept = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    del metadata["made"]
    save_file(kept, file, metadata=metadata)
    with pytest.raises(ValueError, match="it does not say what it was made with"):
        run(checkpoint=file)


def stopped(config, file, at) -> None:
    batches = tiny_batches()

    def until(step):
        if step == at:
            raise Interrupted
        return batches(step)

    with pytest.raises(Interrupted):
        train(tiny_model(), until, config, checkpoint=file, progress=False)


@pytest.mark.parametrize(("planned", "steps"), [(30, 40), (40, 30), (30, 21)])
def test_steps_may_change_before_the_decay_begins(tmp_path, planned, steps):
    file = tmp_path / "checkpoint.safetensors"
    stopped(replace(CONFIG, steps=planned), file, at=12)  # the checkpoint is of step 10
    config = replace(CONFIG, steps=steps)
    assert_same_weights(run(config, checkpoint=file)[0], run(config)[0])


@pytest.mark.parametrize(("planned", "steps", "at"), [(30, 40, 30), (40, 25, 20)])
def test_steps_may_not_change_once_the_decay_has_begun(tmp_path, planned, steps, at):
    file = tmp_path / "checkpoint.safetensors"
    if at == planned:
        run(replace(CONFIG, steps=planned), checkpoint=file)
    else:
        stopped(replace(CONFIG, steps=planned), file, at)
    message = (
        f"steps is {planned} there, {steps} here, and after {at} updates the decay of the last 10"
    )
    with pytest.raises(ValueError, match=message):
        run(replace(CONFIG, steps=steps), checkpoint=file)


def half_frozen(seed: int = 0, frozen_seed: int = 0) -> GPT2LMHeadModel:
    """The block is frozen, and the embedding (with the head, which is tied to it) is trained."""
    model = tiny_model(seed)
    model.transformer.h[0].load_state_dict(tiny_model(frozen_seed).transformer.h[0].state_dict())
    model.transformer.h[0].requires_grad_(False)
    return model


def test_trained_weights_alone_are_cloned_and_saved(tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.safetensors"
    cloned = []
    clone = torch.Tensor.clone
    model = half_frozen()
    frozen = {p.data_ptr() for p in model.transformer.h.parameters()}

    def noted(tensor, *arguments, **more):
        cloned.append(tensor.data_ptr())
        return clone(tensor, *arguments, **more)

    monkeypatch.setattr(torch.Tensor, "clone", noted)
    run(replace(CONFIG, steps=10), model, evaluate=held_out, checkpoint=file)
    monkeypatch.undo()
    assert model.transformer.wte.weight.data_ptr() in cloned and not frozen & set(cloned)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    kinds = ("best", "model", "exp_avg", "exp_avg_sq", "step")
    assert set(tensors(file)) == {f"{kind}.{name}" for kind in kinds for name in trained}


def test_a_half_frozen_model_resumes_and_its_frozen_half_stays(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    whole, _ = run(replace(CONFIG, decay=0), half_frozen(), evaluate=held_out)
    run(replace(CONFIG, steps=10, decay=0), half_frozen(), evaluate=held_out, checkpoint=file)
    resumed = half_frozen(seed=7)
    run(replace(CONFIG, decay=0), resumed, evaluate=held_out, checkpoint=file)
    assert_same_weights(whole, resumed)
    assert_same_weights(resumed.transformer.h, tiny_model().transformer.h)


def test_a_checkpoint_with_another_frozen_half_is_refused(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    run(replace(CONFIG, steps=10), half_frozen(), checkpoint=file)
    with pytest.raises(
        ValueError, match=r"tensors that are not trained are others, as transf.*h\.0"
    ):
        run(model=half_frozen(frozen_seed=1), checkpoint=file)
    thawed = half_frozen().requires_grad_(True)
    with pytest.raises(ValueError, match=r"another model .*h\.0.* is not trained there, \["):
        run(model=thawed, checkpoint=file)


def test_a_buffer_that_is_another_is_refused(tmp_path):
    """A packed base, as of QLoRA, lies in buffers."""
    file = tmp_path / "checkpoint.safetensors"
    models = [tiny_model(), tiny_model()]
    for number, model in enumerate(models):
        model.register_buffer("packed", torch.full((3,), number, dtype=torch.uint8))
    run(replace(CONFIG, steps=10), models[0], checkpoint=file)
    with pytest.raises(ValueError, match="1 tensors that are not trained are others, as packed"):
        run(model=models[1], checkpoint=file)


def test_loss_that_is_not_finite_stops_the_run_before_a_checkpoint(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(FloatingPointError, match="nan before step 10: lower lr"):
        run(loss=lambda m, batch: next_token_loss(m, batch) * math.nan, checkpoint=file)
    assert not file.exists()


def test_patience_needs_held_out_losses():
    with pytest.raises(ValueError, match="patience=3"):
        run(replace(CONFIG, patience=3))


SCRIPT = """
import json, sys
from pathlib import Path
import torch.distributed
from test_training import CONFIG, held_out, tiny_batches, tiny_model
from course_utils.training.loop import train

try:
    train(tiny_model(), tiny_batches(batch_size=5), CONFIG, progress=False)
except ValueError as error:
    refused = str(error)
curve = train(tiny_model(), tiny_batches(), CONFIG, evaluate=held_out, progress=False)
found = {"refused": refused, "curve": curve}
Path(sys.argv[1], f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    """What each of two processes under torchrun found with the public `train`."""
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "script.py").write_text(SCRIPT, "utf-8")
    paths = [str(Path(__file__).parent), str(Path(loop_module.__file__).parents[2])]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(folder / "script.py"), str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_give_the_curve_of_one(two_processes):
    """To rounding: relative 1e-4 after 30 steps in float32, where sums come in another order."""
    _, expected = run(evaluate=held_out)
    for of_rank in two_processes:
        for key in ("step", "loss", "lr", "held_out"):
            found = [row[key] for row in of_rank["curve"]]
            assert found == pytest.approx([row[key] for row in expected], rel=1e-4)


def test_batch_that_two_processes_cannot_share_is_refused(two_processes):
    for of_rank in two_processes:
        assert "a batch of 5 sequences cannot be shared equally by 2" in of_rank["refused"]


@settings(deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 5), st.integers(0, 60), st.integers(0, 4), st.integers(0, 3)
)
def test_an_epoch_visits_every_window_once(context, batch_size, extra, seed, epoch):
    """Token i of the stream is i, so a batch says where it was cut."""
    stream = torch.arange(context * (batch_size + 1) + 1 + extra)
    batches = TrainingBatches(stream, context=context, batch_size=batch_size, seed=seed)
    first = epoch * batches.steps_per_epoch
    windows = torch.cat([batches(first + i) for i in range(batches.steps_per_epoch)])
    assert windows.shape == (batches.steps_per_epoch * batch_size, context + 1)
    assert torch.equal(windows.diff(), torch.ones_like(windows[:, 1:]))  # contiguous
    predicted = windows[:, 1:].flatten().tolist()
    assert len(set(predicted)) == len(predicted)  # no token is predicted twice
    # what an epoch leaves out: less than a batch of windows, and the two ends of the stream
    assert len(predicted) > len(stream) - 2 * context - 1 - batch_size * context


def test_batches_depend_on_seed_and_epoch_alone():
    def epochs(batches, order):
        return {e: [batches(e * batches.steps_per_epoch + i) for i in range(3)] for e in order}

    forwards, backwards = epochs(tiny_batches(), [0, 1, 2]), epochs(tiny_batches(), [2, 1, 0])
    for epoch in range(3):
        assert all(map(torch.equal, forwards[epoch], backwards[epoch]))
    stream = torch.arange(600)
    a, b = (TrainingBatches(stream, context=8, batch_size=4, seed=seed) for seed in (0, 1))
    assert not torch.equal(a(0), b(0))
    assert not torch.equal(a(0), a(a.steps_per_epoch))


def test_a_stream_too_short_for_one_batch():
    with pytest.raises(ValueError, match=r"stream of 30 tokens has 2 windows of 8.*batch of 4"):
        TrainingBatches(torch.arange(30), context=8, batch_size=4)


def test_next_token_loss_is_the_loss_of_transformers():
    model, window = tiny_model(), tiny_batches()(0)[:, :CONTEXT]  # labels are shifted inside it
    expected = model(input_ids=window, labels=window).loss
    torch.testing.assert_close(next_token_loss(model, window), expected)


# course-lm and its report


WORDS = ["river", "island", "people", "trade", "the", "of", "fish", "coast", "its", "and"]


def text(corpus: str, split: str) -> list[Document]:
    """A little made text: each corpus and split says other things, from the same words."""
    generator = torch.Generator().manual_seed(len(corpus) * 100 + len(split))
    picks = torch.randint(len(WORDS), (2, 400), generator=generator)
    return [
        Document(f"{corpus}/{i}", " ".join(WORDS[k] for k in row) + ".")
        for i, row in enumerate(picks)
    ]


@pytest.fixture
def trained(tmp_path, monkeypatch) -> Path:
    """What `train_course_lm` writes, of a small model on a little text."""
    for module in (course_lm, report_module):
        monkeypatch.setattr(module, "documents", text)
    monkeypatch.setattr(course_lm, "VOCABULARY", 300)
    monkeypatch.setattr(course_lm, "CONTEXT", 32)
    monkeypatch.setattr(report_module, "STRIDE", 16)
    monkeypatch.setattr(report_module, "NEW_TOKENS", 5)
    monkeypatch.setattr(report_module, "PROMPTS", ("the", "its coast", "fish of", "people", "and"))
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(entries, "_context", dict.fromkeys(entries._context))
    folder = tmp_path / "course-lm"
    config = TrainConfig(steps=6, warmup=1, decay=2, eval_every=3, patience=8)
    course_lm.train_course_lm(folder, config)
    return folder


def test_course_lm_is_written_as_transformers_reads_it(trained):
    model, tokenizer = load_model(str(trained))
    assert isinstance(model, GPT2LMHeadModel) and model.dtype == torch.float32
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.decode(tokenizer("A river: 42 neighbours.\n").input_ids) == (
        "A river: 42 neighbours.\n"
    )
    assert model.lm_head.weight is model.transformer.wte.weight
    log = json.loads((trained / "training_log.json").read_text())
    assert log["training_tokens_seen"] == 6 * 8 * 32
    assert log["parameters"] == model.num_parameters()
    assert [row["step"] for row in log["curve"]] == [3, 6]


def test_report_measures_records_and_writes_the_card(trained):
    figures = report_module.report(trained, trained.parent / "runs")
    assert json.loads((trained / "report.json").read_text()) == figures

    # one corpus by hand: every token but the first, after at least a stride of others
    model, tokenizer = load_model(str(trained))
    found = text("sotu", "evaluation")
    ids = [i for d in found for i in [*tokenizer(d.text).input_ids, tokenizer.eos_token_id]]
    nats = 0.0
    for i in range(1, len(ids)):
        start = max(0, (i // 16 - 1) * 16)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[start:i]])).logits[0, -1]
        nats -= logits.log_softmax(-1)[ids[i]].item()
    of = figures["corpora"]["sotu"]
    assert of["tokens"] == len(ids) and of["documents"] == 2
    assert of["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-4)
    n_bytes = sum(len(d.text.encode()) for d in found)
    assert of["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-4)

    training = [
        i
        for corpus in course_lm.CORPORA
        for d in text(corpus, "train")
        for i in [*tokenizer(d.text).input_ids, tokenizer.eos_token_id]
    ]
    baseline = ngram_module.NGram(training, 300).perplexity(ids)
    assert of["ngram_perplexity"] == pytest.approx(baseline.perplexity)

    recorded = {entry["key"]: entry for entry in results.list_runs()}
    assert recorded["course_lm.sotu.bits_per_byte"]["value"] == of["bits_per_byte"]
    assert recorded["course_lm.wikipedia.ngram_perplexity"]["profile"] == "report"
    assert len(recorded) == 3 * 4 + 2

    card = (trained / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0",
        "language": "en",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    assert f"{of['perplexity']:.2f} | {of['bits_per_byte']:.3f}" in body
    assert body.count("\n> **") == 5


def test_report_refuses_other_training_text(trained, monkeypatch):
    monkeypatch.setattr(
        report_module, "documents", lambda corpus, split: text("other", "train")[:1]
    )
    with pytest.raises(ValueError, match="the corpora changed"):
        report_module.report(trained, trained.parent / "runs")


def test_report_of_an_unfinished_training(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "checkpoint.safetensors")
    with pytest.raises(FileNotFoundError, match="course train-lm"):
        report_module.report(tmp_path, tmp_path / "runs")
