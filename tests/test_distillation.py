"""Distillation: its losses against torch's, the trainer, cached teachers, students and the shipped logs."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import some_tokens, tiny_gpt2, tiny_llama

from course_utils.distillation import runs
from course_utils.distillation.cached import CachedTeacher, TopK, cache_teacher, top_k_loss
from course_utils.distillation.losses import (
    forward_kl,
    generalized_jsd,
    hard_loss,
    mixed_loss,
    reverse_kl,
    soft_target_loss,
)
from course_utils.distillation.students import half_depth, student_of
from course_utils.distillation.trainer import (
    DistilSettings,
    check_tokenizers,
    distil,
    write_on,
)
from course_utils.models import load_model
from course_utils.training.loop import TrainConfig

SHORT = TrainConfig(4, 1e-2, warmup=1, eval_every=2)
temperatures = st.floats(0.5, 20)
betas = st.floats(0, 1)


def logits(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return logits(*shape, seed=seed), logits(*shape, seed=seed + 1)


def steady():
    """A tiny model without dropout, so that a training can be computed again."""
    model = tiny_gpt2()
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(model.config, name, 0.0)
    return model


def batches(step: int) -> torch.Tensor:
    return some_tokens(2, 13, seed=step)


# Losses


@given(st.integers(0, 99), temperatures)
@settings(max_examples=30, deadline=None)
def test_divergences_are_those_of_torch(seed, temperature):
    student, teacher = pair(2, 5, 11, seed=seed)
    log_q, log_p = ((z / temperature).flatten(0, 1).log_softmax(-1) for z in (student, teacher))
    torch.testing.assert_close(
        forward_kl(student, teacher, temperature),
        F.kl_div(log_q, log_p, log_target=True, reduction="batchmean"),
    )
    torch.testing.assert_close(
        reverse_kl(student, teacher, temperature),
        F.kl_div(log_p, log_q, log_target=True, reduction="batchmean"),
    )


@pytest.mark.parametrize(
    "loss",
    [
        lambda q, p: forward_kl(q, p, 2.0),
        lambda q, p: reverse_kl(q, p, 2.0),
        lambda q, p: generalized_jsd(q, p, 0.3, 2.0),
        lambda q, p: soft_target_loss(q, p, 4.0),
        lambda q, p: mixed_loss(q, p, torch.tensor([1, 0, 6]), temperature=2.0, mix=0.3),
        lambda q, p: hard_loss(q, torch.tensor([1, 0, 6]), 0.2),
    ],
)
def test_gradients_are_those_of_differences(loss):
    student, teacher = pair(3, 7)
    assert torch.autograd.gradcheck(lambda q: loss(q, teacher), student.requires_grad_())


def test_a_teacher_gets_no_gradient():
    student, teacher = (z.requires_grad_() for z in pair(3, 7))
    for beta in (0, 0.5, 1):
        soft_target_loss(student, teacher, 2.0, beta).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0


@given(st.integers(0, 99), betas)
@settings(max_examples=30, deadline=None)
def test_a_divergence_is_zero_for_equal_models_only(seed, beta):
    student, teacher = pair(4, 9, seed=seed)
    assert generalized_jsd(teacher, teacher, beta).abs() < 1e-12
    if 0.01 < beta < 0.99 or beta in (0, 1):
        assert generalized_jsd(student, teacher, beta) > 1e-4


@given(st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_jsd_of_one_half_is_symmetric_and_at_most_log_two(seed):
    student, teacher = pair(4, 9, seed=seed)
    there = generalized_jsd(student, 50 * teacher, 0.5)
    torch.testing.assert_close(there, generalized_jsd(50 * teacher, student, 0.5))
    assert 0 < there <= math.log(2)


def test_the_ends_of_the_jsd_are_the_two_divergences_that_it_tends_to():
    student, teacher = pair(4, 9)
    assert generalized_jsd(student, teacher, 0) == forward_kl(student, teacher)
    assert generalized_jsd(student, teacher, 1) == reverse_kl(student, teacher)
    near = 1e-6
    limit = {"rtol": 1e-4, "atol": 0}
    torch.testing.assert_close(
        generalized_jsd(student, teacher, near) / near, forward_kl(student, teacher), **limit
    )
    torch.testing.assert_close(
        generalized_jsd(student, teacher, 1 - near) / near, reverse_kl(student, teacher), **limit
    )


def test_the_jsd_is_the_formula_of_its_mixture():
    q, p = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    m = 0.3 * p + 0.7 * q
    expected = 0.3 * (p * (p / m).log()).sum() + 0.7 * (q * (q / m).log()).sum()
    torch.testing.assert_close(generalized_jsd(q.log(), p.log(), 0.3), expected)


def test_times_t_squared_the_gradient_tends_to_that_of_centred_logits():
    student, teacher = pair(1, 6)
    student.requires_grad_()
    difference = (student - student.mean()) - (teacher - teacher.mean())
    expected = (difference / 6).detach()  # (z - v) / N, Hinton et al., equation 4 times T^2
    for temperature, tolerance in ((1e2, 0.2), (1e4, 2e-3)):
        [gradient] = torch.autograd.grad(soft_target_loss(student, teacher, temperature), student)
        torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance / 10)


def test_cross_entropy_with_soft_targets_is_the_divergence_and_a_constant():
    student, teacher = pair(4, 9)
    p = teacher.softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    torch.testing.assert_close(forward_kl(student, teacher) + entropy, F.cross_entropy(student, p))


def test_a_mix_is_its_parts():
    student, teacher = pair(2, 3, 9)
    labels = torch.tensor([[1, 2, 3], [4, 5, 8]])
    told = {"temperature": 2.0, "smoothing": 0.1}
    soft, hard = soft_target_loss(student, teacher, 2.0), hard_loss(student, labels, 0.1)
    for mix in (0.0, 0.25, 1.0):
        found = mixed_loss(student, teacher, labels, mix=mix, **told)
        torch.testing.assert_close(found, mix * soft + (1 - mix) * hard)


def test_bad_settings_and_shapes_are_refused():
    student, teacher = pair(3, 7)
    for temperature in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"temperature={temperature} has to be above 0"):
            forward_kl(student, teacher, temperature)
    with pytest.raises(ValueError, match=r"beta=1\.5 is a share"):
        generalized_jsd(student, teacher, 1.5)
    with pytest.raises(ValueError, match=r"mix=-0\.1 is a share"):
        mixed_loss(student, teacher, torch.zeros(3).long(), temperature=1.0, mix=-0.1)
    with pytest.raises(ValueError, match=r"other vocabularies"):
        forward_kl(student, logits(3, 8))
    with pytest.raises(
        ValueError, match=r"\(3, 7\) and teacher logits \(2, 7\) have other positions"
    ):
        reverse_kl(student, logits(2, 7))
    with pytest.raises(ValueError, match=r"labels \(2,\) have to be one for each"):
        hard_loss(student, torch.zeros(2).long())
    with pytest.raises(ValueError, match="smoothing=2 is a share"):
        hard_loss(student, torch.zeros(3).long(), 2)


# Students


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_a_student_of_all_layers_computes_what_its_teacher_does(make):
    teacher = make()
    student = student_of(teacher, [0, 1])
    ids = some_tokens()
    with torch.no_grad():
        assert torch.equal(student(input_ids=ids).logits, teacher(input_ids=ids).logits)
        student.get_input_embeddings().weight.zero_()
        assert teacher.get_input_embeddings().weight.abs().max() > 0, "nothing is shared"


def test_a_student_inherits_the_layers_that_it_was_promised():
    teacher = tiny_gpt2()
    student = student_of(teacher, [1])
    assert student.config.num_hidden_layers == 1 and teacher.config.num_hidden_layers == 2
    inherited = student.transformer.h[0].state_dict()
    for name, tensor in teacher.transformer.h[1].state_dict().items():
        assert torch.equal(inherited[name], tensor)
    assert student.lm_head.weight.data_ptr() == student.transformer.wte.weight.data_ptr()
    first = half_depth(teacher).transformer.h
    assert len(first) == 1
    assert torch.equal(first[0].mlp.c_fc.weight, teacher.transformer.h[0].mlp.c_fc.weight)


def test_fresh_students_depend_on_the_seed_alone():
    teacher = tiny_gpt2()
    one, again, other = (half_depth(teacher, inherit=False, seed=s) for s in (1, 1, 2))
    weights = [m.transformer.h[0].mlp.c_fc.weight for m in (one, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("layers", [[], [0, 0], [2], [-1]])
def test_layers_that_a_teacher_lacks_are_refused(layers):
    with pytest.raises(ValueError, match="of a teacher with 2 blocks: name different ones"):
        student_of(tiny_gpt2(), layers)


# The trainer


def test_a_student_learns_and_its_teacher_is_left_alone():
    teacher = steady()
    before = copy.deepcopy(teacher.state_dict())
    student = half_depth(teacher, inherit=False, seed=3)
    ids = some_tokens(4, 13, seed=7)

    def apart(model) -> float:
        with torch.no_grad():
            models = (model, teacher)
            return forward_kl(*(m(input_ids=ids).logits for m in models)).item()

    start = apart(student)
    history = distil(student, teacher, lambda _: ids, DistilSettings(), SHORT, evaluate=apart)
    assert [row["step"] for row in history] == [2, 4]
    assert min(row["held_out"] for row in history) < start
    assert apart(student) == min(row["held_out"] for row in history), "the best weights are kept"
    assert all(torch.equal(before[name], t) for name, t in teacher.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert not teacher.training


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    teacher = steady()
    student = copy.deepcopy(teacher)
    for beta in (0, 0.5, 1):
        batch = batches(0)[:, :-1]
        found = generalized_jsd(*(m(input_ids=batch).logits for m in (student, teacher)), beta)
        found.backward()
    assert max(p.grad.abs().max() for p in student.parameters()) < 1e-6


def test_the_teacher_answers_without_gradients_and_in_evaluation_mode():
    teacher, seen = steady(), []
    teacher.register_forward_hook(
        lambda module, _, out: seen.append((module.training, out.logits.requires_grad))
    )
    distil(half_depth(teacher), teacher, batches, DistilSettings(mix=0.5), SHORT)
    assert seen == [(False, False)] * 4


def test_a_first_step_is_the_gradient_of_the_mixed_loss():
    teacher = steady()
    student = half_depth(teacher)
    reference = copy.deepcopy(student)
    told = DistilSettings(temperature=2, mix=0.75, beta=0.5, smoothing=0.1)
    config = TrainConfig(1, 1e-2, warmup=0)
    [row] = distil(student, teacher, batches, told, config)
    batch = batches(0)
    expected = mixed_loss(
        reference(input_ids=batch[:, :-1]).logits, teacher(input_ids=batch[:, :-1]).logits,
        batch[:, 1:], temperature=2, mix=0.75, beta=0.5, smoothing=0.1,
    )  # fmt: skip
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_without_a_teacher_it_is_the_ordinary_training():
    from course_utils.training.loop import train

    teacher = steady()
    one, other = half_depth(teacher), half_depth(teacher)
    distil(one, None, batches, DistilSettings(mix=0), SHORT)
    train(other, batches, SHORT, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path):
    teacher = steady()
    told = DistilSettings(on_policy=0.5, prompt=3, seed=5)
    whole, parts = half_depth(teacher), half_depth(teacher)
    distil(whole, teacher, batches, told, SHORT)
    for steps in (2, 4):
        config = TrainConfig(steps, 1e-2, warmup=1, eval_every=2)
        parts = half_depth(teacher)
        distil(parts, teacher, batches, told, config, checkpoint=tmp_path / "c.safetensors")
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match="checkpoint of another run: data is"):
        distil(
            parts, teacher, batches, DistilSettings(temperature=3), SHORT,
            checkpoint=tmp_path / "c.safetensors",
        )  # fmt: skip


def test_on_policy_the_loss_is_over_what_the_student_wrote():
    teacher = steady()
    student, asked = half_depth(teacher), []
    reference = copy.deepcopy(student)
    teacher.register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(kwargs["input_ids"]), with_kwargs=True
    )
    told = DistilSettings(on_policy=1, prompt=4, beta=1)
    [row] = distil(student, teacher, batches, told, TrainConfig(1, 1e-2, warmup=0))
    [text] = asked  # all but the last token
    assert text.shape == (2, 12)
    assert torch.equal(text[:, :4], batches(0)[:, :4])
    assert not torch.equal(text[:, 4:], batches(0)[:, 4:-1])
    found = [model(input_ids=text).logits[:, 3:] for model in (reference, teacher)]
    assert row["loss"] == pytest.approx(reverse_kl(*found).item(), rel=1e-5)


def test_what_a_model_writes_follows_its_probabilities():
    model = steady()
    prompts = some_tokens(64, 5, seed=1)
    text = write_on(model, prompts, 6, torch.Generator().manual_seed(0))
    assert torch.equal(text, write_on(model, prompts, 6, torch.Generator().manual_seed(0)))
    assert text.shape == (64, 11) and torch.equal(text[:, :5], prompts)
    with torch.no_grad():
        log_q = model(input_ids=text[:, :-1]).logits[:, 4:].log_softmax(-1)
    nats = -log_q.gather(-1, text[:, 5:, None]).mean()
    entropy = -(log_q.exp() * log_q).sum(-1).mean()
    assert abs(nats - entropy) < 0.1


def test_what_goes_wrong_is_refused():
    teacher, student = steady(), half_depth(steady())
    with pytest.raises(ValueError, match=r"training mode, where dropout is on: call \.eval\(\)"):
        distil(student, steady().train(), batches, DistilSettings(), SHORT)
    with pytest.raises(ValueError, match=r"shares \d+ tensors with its teacher, as transformer"):
        distil(teacher, teacher, batches, DistilSettings(), SHORT)
    halved = half_depth(teacher)
    halved.transformer.wte.weight = teacher.transformer.wte.weight
    with pytest.raises(ValueError, match=r"shares 1 tensors .*wte"):
        distil(halved, teacher, batches, DistilSettings(), SHORT)
    larger = half_depth(teacher)
    larger.resize_token_embeddings(101)
    with pytest.raises(ValueError, match="vocabulary has 101 tokens and the teacher's 99"):
        distil(larger, teacher, batches, DistilSettings(), SHORT)
    with pytest.raises(ValueError, match=r"mix=0\.5 needs a teacher"):
        distil(student, None, batches, DistilSettings(mix=0.5), SHORT)
    with pytest.raises(
        ValueError, match="sequences of 39 tokens, and the student has 32 positions"
    ):
        distil(student, teacher, lambda _: some_tokens(2, 40), DistilSettings(), SHORT)


@pytest.mark.parametrize(
    ("told", "error"),
    [
        ({"temperature": 0}, "temperature=0 has to be above 0"),
        ({"temperature": -2}, "temperature=-2 has to be above 0"),
        ({"mix": 1.2}, r"mix=1\.2 is a share"),
        ({"beta": -1}, "beta=-1 is a share"),
        ({"on_policy": 2}, "on_policy=2 is a share"),
        (
            {"on_policy": 0.5, "mix": 0.5},
            r"with mix=0\.5: text of the student's own holds no labels",
        ),
        ({"prompt": 0}, "prompt=0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(told, error):
    with pytest.raises(ValueError, match=error):
        DistilSettings(**told)


class Words:
    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}


def test_other_tokenizers_are_refused_with_an_example():
    check_tokenizers(Words("a", "b"), Words("a", "b"))
    with pytest.raises(ValueError, match="of 2 and 2 tokens: 'a' is 0 for the student and 1"):
        check_tokenizers(Words("a", "b"), Words("b", "a"))
    with pytest.raises(ValueError, match="'c' is None for the student and 2 for the teacher"):
        check_tokenizers(Words("a", "b"), Words("a", "b", "c"))


# Cached teachers


def test_a_cache_of_nearly_all_tokens_teaches_what_the_teacher_does(tmp_path):
    teacher = steady()
    teacher.transformer.wte.weight.data *= 20  # random weights alone find all tokens equally likely
    told = DistilSettings(temperature=2)
    cache = cache_teacher(teacher, batches, 4, tmp_path / "t.safetensors", k=98, temperature=2)
    models = [half_depth(teacher), half_depth(teacher)]
    one, other = (
        distil(m, t, batches, told, SHORT) for m, t in zip(models, (teacher, cache), strict=True)
    )
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in other], rel=0.1)  # float16


@given(st.integers(0, 99), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_outcomes_taken_together_never_add_divergence(seed, k):
    student, teacher = pair(5, 9, seed=seed)
    values, tokens = teacher.log_softmax(-1).topk(k)
    found = top_k_loss(student, TopK(tokens, values))
    assert found <= forward_kl(student, teacher) + 1e-9
    if k == 8:
        torch.testing.assert_close(found, forward_kl(student, teacher))


def test_a_cache_says_its_size_and_is_read_again(tmp_path):
    path = tmp_path / "t.safetensors"
    small, large = (
        cache_teacher(steady(), batches, 3, tmp_path / f"{k}.safetensors", k=k) for k in (4, 8)
    )
    assert large.nbytes - small.nbytes == pytest.approx(3 * 2 * 12 * 4 * 6, abs=32)
    cache_teacher(steady(), batches, 3, path, k=4)
    assert torch.equal(CachedTeacher(path).at(1, batches(1)).tokens, small.at(1, batches(1)).tokens)


def test_a_cache_refuses_what_it_cannot_answer(tmp_path):
    teacher, path = steady(), tmp_path / "t.safetensors"
    cache = cache_teacher(teacher, batches, 2, path, k=4)
    student = half_depth(teacher)
    with pytest.raises(ValueError, match="holds 2 steps, and step 2 was asked for"):
        distil(student, cache, batches, DistilSettings(), SHORT)
    with pytest.raises(ValueError, match="the batch of step 0 is not the one"):
        distil(student, cache, lambda step: batches(step + 1), DistilSettings(), SHORT)
    with pytest.raises(ValueError, match=r"temperature=2, but .* was written at 1\.0"):
        distil(student, cache, batches, DistilSettings(temperature=2), SHORT)
    with pytest.raises(ValueError, match=r"beta=1, on_policy=0\.0: a cached teacher knows only"):
        distil(student, cache, batches, DistilSettings(beta=1), SHORT)
    with pytest.raises(ValueError, match="k=99: choose 1 to 98 of 99 tokens"):
        cache_teacher(teacher, batches, 2, path, k=99)
    with pytest.raises(ValueError, match="training mode"):
        cache_teacher(steady().train(), batches, 2, path)


# The longer runs


def test_a_run_writes_what_the_notebook_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "PROMPTS", 4)
    monkeypatch.setattr(runs, "WRITTEN", 4)
    monkeypatch.setattr(runs, "PROTOCOL", runs.Protocol("factbook", 512, 64))
    run = runs.Run("mix50", "inherited", 1024, seed=1, lr=1e-3)
    log = runs.train_run(run, load_model("course-lm"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{run.name}.json"]
    assert runs.shipped_logs(tmp_path)[run.name]["run"]["arm"] == "mix50"
    total = sum(log["document_nats"]) / sum(log["document_tokens"])
    assert 2 < total < 6
    assert runs.paired(log, log).value == 0
    better = log | {"document_nats": [nats - 1 for nats in log["document_nats"]]}
    found = runs.paired(log, better)
    documents = len(log["document_tokens"])
    assert found.value == pytest.approx(documents / sum(log["document_tokens"]))
    assert "own_text" not in log, "asked of the runs that are compared in it alone"


def test_the_teacher_reads_what_a_student_writes(monkeypatch):
    monkeypatch.setattr(runs, "PROMPTS", 3)
    monkeypatch.setattr(runs, "WRITTEN", 4)
    monkeypatch.setattr(runs, "PROTOCOL", runs.Protocol("factbook", 512, 64))
    teacher = load_model("course-lm")
    found = runs.own_text(teacher.model, teacher)
    assert [len(values) for values in found.values()] == [3, 3, 3]
    assert max(found["reverse_kl"]) < 1e-3, "the teacher's own text"
    assert min(found["entropy"]) > 0.5


def test_a_run_without_its_sweep_and_an_unknown_group_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"needs a learning rate: run inherited-soft-25k-lr0\.00025"
    ):
        runs.best_rate(runs.Run("mix50", "inherited", 1024), tmp_path)
    with pytest.raises(ValueError, match="no group 'sweeps': choose of inherited, fresh"):
        runs.train_groups(tmp_path, ["sweeps"])
