"""Feature distillation: losses by hand and against PyTorch, layers, projections, CKA, training, figures."""

import copy
import math

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from course_utils.distillation.features import (
    KINDS,
    FeatureLoss,
    add_projection,
    attention_mse,
    balanced,
    cosine_loss,
    drop_projection,
    feature_loss,
    gradient_norm,
    hidden_mse,
    layer_map,
    relation_kl,
    run_with_features,
)
from course_utils.distillation.similarity import cka_map, linear_cka
from course_utils.distillation.students import half_depth, half_width
from course_utils.distillation.trainer import DistilSettings, distil, loss_with_features
from course_utils.plotting.features import matched_layers, similarity_maps
from course_utils.training.loop import TrainConfig

matplotlib.use("agg")

SOFT = DistilSettings()
MAP = ((1, 2), (2, 4))


def tiny(layers: int = 4, width: int = 16, heads: int = 2, seed: int = 0) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=40, n_positions=32, n_embd=width, n_layer=layers, n_head=heads, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(seed)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def teacher():
    return tiny()


IDS = torch.arange(24).reshape(2, 12) * 7 % 40


def batches(step: int) -> torch.Tensor:
    return (IDS + step) % 40


def normal(*shape, seed=0, dtype=torch.double):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Losses


def test_losses_by_hand():
    h, g = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[6.0, 8.0], [1.0, 0.0]])
    assert hidden_mse(h, g).item() == (9 + 16 + 1 + 1) / 4
    assert cosine_loss(h, g).item() == pytest.approx((0 + 1) / 2), "twice as long is no loss"
    a, b = torch.zeros(1, 2, 2), torch.tensor([[[1.0, 50.0], [2.0, 3.0]]])
    assert attention_mse(a, b).item() == pytest.approx((1 + 4 + 9) / 3), "50 is in the future"
    p = torch.tensor([2.0, 3.0]).softmax(-1)
    expected = ((p * (p / 0.5).log()).sum() / 2).item()  # the first row sees itself alone: 0
    assert relation_kl(a, b).item() == pytest.approx(expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000))
def test_losses_are_those_of_pytorch(batch, tokens, width, seed):
    h, g = normal(2, batch, tokens, width, seed=seed)
    torch.testing.assert_close(hidden_mse(h, g), F.mse_loss(h, g))
    hint = 0.5 * (h - g).square().sum(-1).mean()
    torch.testing.assert_close(width / 2 * hidden_mse(h, g), hint, msg="FitNets' convention")
    ones = torch.ones(batch * tokens, dtype=torch.double)
    by_torch = nn.CosineEmbeddingLoss()(h.flatten(0, 1), g.flatten(0, 1), ones)
    torch.testing.assert_close(cosine_loss(h, g), by_torch, atol=1e-6, rtol=1e-6)
    a, b = normal(2, batch, tokens, tokens, seed=seed)
    rows = [
        F.kl_div(a[i, t, : t + 1].log_softmax(-1), b[i, t, : t + 1].softmax(-1), reduction="sum")
        for i in range(batch)
        for t in range(tokens)
    ]
    torch.testing.assert_close(relation_kl(a, b), torch.stack(rows).mean())


@pytest.mark.parametrize("loss", [hidden_mse, cosine_loss, attention_mse, relation_kl])
def test_gradients_and_none_for_the_teacher(loss):
    a, b = normal(2, 2, 4, 4).requires_grad_().unbind()
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, b), a)
    loss(a, b).backward()
    assert b.grad is None
    assert loss(b, b).item() == pytest.approx(0, abs=1e-12)


def test_the_softmax_does_not_see_a_shift_and_the_scores_do():
    scores = normal(2, 5, 5)
    shifted = scores + normal(2, 5, 1, seed=1)
    assert relation_kl(shifted, scores).item() == pytest.approx(0, abs=1e-12)
    assert attention_mse(shifted, scores).item() > 0.1


def test_shapes_that_cannot_be_compared():
    with pytest.raises(ValueError, match=r"width 4 and 8: .*add_projection"):
        hidden_mse(torch.zeros(2, 4), torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"\(2, 4\) and \(3, 4\) are not of the same tokens"):
        cosine_loss(torch.zeros(2, 4), torch.zeros(3, 4))
    with pytest.raises(
        ValueError, match=r"\(2, 5, 5\) and \(4, 5, 5\) have to be .* as many heads"
    ):
        attention_mse(torch.zeros(2, 5, 5), torch.zeros(4, 5, 5))
    with pytest.raises(ValueError, match="tokens, tokens"):
        relation_kl(torch.zeros(2, 5, 6), torch.zeros(2, 5, 6))


# Features of a model


def hooks_of(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_features_are_what_the_model_computes(teacher):
    output = teacher(input_ids=IDS, output_hidden_states=True, output_attentions=True)
    hooks = hooks_of(teacher)  # transformers keeps some of its own
    logits, found = run_with_features(teacher, IDS)
    assert hooks_of(teacher) == hooks, "nothing is left behind"
    torch.testing.assert_close(logits, output.logits)
    assert len(found.hidden) == 5 and len(found.keys) == 4
    for m in range(4):  # transformers gives the last one after the last norm
        torch.testing.assert_close(found.hidden[m], output.hidden_states[m])
    last = teacher.transformer.ln_f(found.hidden[4])
    torch.testing.assert_close(last, output.hidden_states[4])
    seen = torch.ones(12, 12, dtype=torch.bool).tril()
    for block in (1, 4):
        scores = found.scores(block).masked_fill(~seen, -math.inf)
        torch.testing.assert_close(scores.softmax(-1), output.attentions[block - 1])
    relations = found.value_relations(2)
    torch.testing.assert_close(relations, relations.mT)
    assert relations.shape == (2, 2, 12, 12)


def test_other_models_are_refused():
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with pytest.raises(ValueError, match=r"class LlamaDecoderLayer: .* GPT-2's blocks only"):
        run_with_features(LlamaForCausalLM(config), IDS)


# Layers


def test_the_uniform_map():
    assert layer_map(2, 4) == MAP
    assert layer_map(4, 12) == ((1, 3), (2, 6), (3, 9), (4, 12))
    assert layer_map(3, 3) == ((1, 1), (2, 2), (3, 3))
    with pytest.raises(ValueError, match="4 teacher layers are no multiple of 3 student layers"):
        layer_map(3, 4)
    with pytest.raises(ValueError, match="of 0 student layers"):
        layer_map(0, 4)


def test_losses_that_cannot_be():
    with pytest.raises(ValueError, match="no feature loss 'norms': choose of hidden, cosine"):
        FeatureLoss("norms", MAP)
    with pytest.raises(ValueError, match="layers are empty"):
        FeatureLoss("hidden", ())
    for weight in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="above 0 and finite"):
            FeatureLoss("hidden", MAP, weight)


@pytest.mark.parametrize(
    ("kind", "layers", "said"),
    [
        ("hidden", ((1, 5),), "teacher has no layer 5 for 'hidden', only 0 to 4"),
        ("cosine", ((3, 4),), "student has no layer 3 for 'cosine', only 0 to 2"),
        ("attention", ((0, 1),), "student has no layer 0 for 'attention', only 1 to 2"),
        ("relations", ((1, -1),), "teacher has no layer -1"),
    ],
)
def test_layers_that_do_not_exist_are_refused_before_any_step(teacher, kind, layers, said):
    student = half_depth(teacher)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=said):
        distil(
            student, teacher, batches, SOFT, TrainConfig(1), features=[FeatureLoss(kind, layers)]
        )
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())


def test_kinds_compare_the_layers_they_name(teacher):
    student = half_depth(teacher)
    with torch.no_grad():
        (_, ours), (_, theirs) = (run_with_features(m, IDS) for m in (student, teacher))
    assert FeatureLoss("hidden", ((0, 0), (1, 1)))(ours, theirs).item() == 0, "inherited"
    assert FeatureLoss("attention", ((1, 1),))(ours, theirs).item() == 0
    pair = [hidden_mse(ours.hidden[m], theirs.hidden[n]) for m, n in MAP]
    found = FeatureLoss("hidden", MAP, 3.0)(ours, theirs)
    assert found.item() == pytest.approx(3 * sum(p.item() for p in pair))
    both = relation_kl(ours.scores(2), theirs.scores(4)) + relation_kl(
        ours.value_relations(2), theirs.value_relations(4)
    )
    assert FeatureLoss("relations", ((2, 4),))(ours, theirs).item() == pytest.approx(both.item())


# Training


@pytest.mark.parametrize("kind", KINDS)
def test_training_brings_the_student_closer_in_what_it_is_told(teacher, kind):
    student = half_depth(teacher, inherit=False, seed=3)
    loss = FeatureLoss(kind, MAP)

    def away(model):
        with torch.no_grad():
            (_, ours), (_, theirs) = (run_with_features(m, IDS) for m in (model, teacher))
        return loss(ours, theirs).item()

    before, frozen = away(student), copy.deepcopy(teacher.state_dict())
    curve = distil(
        student, teacher, batches, SOFT, TrainConfig(40, 3e-3, warmup=2, eval_every=20),
        features=[FeatureLoss(kind, MAP, 10.0)],
    )  # fmt: skip
    assert away(student) < 0.8 * before
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert all(torch.equal(frozen[k], v) for k, v in teacher.state_dict().items())


def test_loss_is_soft_targets_and_features(teacher):
    student = half_depth(teacher)
    told = FeatureLoss("hidden", MAP, 0.5)
    batch = batches(0)
    found = loss_with_features(student, teacher, batch, SOFT, [told])
    with torch.no_grad():
        (z, ours), (v, theirs) = (run_with_features(m, batch[:, :-1]) for m in (student, teacher))
    soft = F.kl_div(
        z.log_softmax(-1).flatten(0, 1), v.softmax(-1).flatten(0, 1), reduction="batchmean"
    )
    assert found.item() == pytest.approx((soft + told(ours, theirs)).item(), rel=1e-3)


def test_features_of_another_source(teacher):
    student, other = half_depth(teacher), tiny(seed=9)
    with torch.no_grad():
        (_, ours), (_, theirs), (_, others) = (
            run_with_features(m, IDS) for m in (student, teacher, other)
        )
        found = feature_loss([FeatureLoss("hidden", MAP, source=other)], student, ours, theirs, IDS)
    assert found.item() == FeatureLoss("hidden", MAP)(ours, others).item()
    with pytest.raises(ValueError, match="source of features is in training mode"):
        distil(
            student, teacher, batches, SOFT, TrainConfig(1),
            features=[FeatureLoss("hidden", MAP, source=other.train())],
        )  # fmt: skip


def test_features_need_a_teacher_that_runs(teacher):
    student = half_depth(teacher)
    for told, of, said in (
        (DistilSettings(mix=0), teacher, "mix=0 and"),
        (DistilSettings(on_policy=1.0), teacher, "on_policy=1.0"),
        (DistilSettings(mix=0), None, "NoneType as teacher"),
    ):
        with pytest.raises(ValueError, match=said):
            distil(
                student, of, batches, told, TrainConfig(1), features=[FeatureLoss("hidden", MAP)]
            )


def test_an_interrupted_run_goes_on_and_another_feature_loss_is_refused(teacher, tmp_path):
    file = tmp_path / "run.safetensors"
    short, long = (TrainConfig(n, 1e-3, warmup=1, eval_every=2) for n in (2, 4))
    told = [FeatureLoss("hidden", MAP, 0.5)]
    whole, cut = half_depth(teacher), half_depth(teacher)
    distil(whole, teacher, batches, SOFT, long, features=told)
    distil(cut, teacher, batches, SOFT, short, features=told, checkpoint=file)
    with pytest.raises(ValueError, match="another run"):
        distil(half_depth(teacher), teacher, batches, SOFT, long, checkpoint=file)
    again = half_depth(teacher)
    distil(again, teacher, batches, SOFT, long, features=told, checkpoint=file)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


# Another width


def test_a_narrow_student_needs_a_projection_for_hidden_states_and_none_for_relations(teacher):
    student = half_width(teacher, seed=1)
    assert student.config.hidden_size == 8 and not student.training
    layers = ((4, 4),)
    with pytest.raises(ValueError, match="width 8 and 16"):
        loss_with_features(student, teacher, batches(0), SOFT, [FeatureLoss("hidden", layers)])
    loss_with_features(student, teacher, batches(0), SOFT, [FeatureLoss("relations", layers)])
    names = set(student.state_dict())
    projection = add_projection(student, teacher, seed=2)
    before = projection.weight.detach().clone()
    assert before.shape == (16, 8)
    distil(
        student, teacher, batches, SOFT, TrainConfig(2, 1e-2, warmup=1, eval_every=2),
        features=[FeatureLoss("hidden", layers)],
    )  # fmt: skip
    assert not torch.equal(before, student.projection.weight), "it is trained"
    drop_projection(student)
    assert set(student.state_dict()) == names
    with pytest.raises(ValueError, match="3 heads do not divide half of the width 15"):
        half_width(tiny(width=15, heads=3))


def test_gradient_norm(teacher):
    x = nn.Linear(2, 1, bias=False)
    assert gradient_norm(x(torch.tensor([3.0, 4.0])).sum(), x) == pytest.approx(5)


# CKA


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_cka_of_rotated_scaled_and_moved_copies(p, q, seed):
    x, y = normal(40, p, seed=seed), normal(40, q, seed=seed + 1)
    rotation, _ = torch.linalg.qr(normal(p, p, seed=seed + 2))
    assert linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1)
    found = linear_cka(x, y)
    assert 0 <= found < 1
    assert linear_cka(y, x) == pytest.approx(found)
    # the same by kernels [examples, examples], as the paper defines it
    centre = torch.eye(40, dtype=torch.double) - 1 / 40
    k, m = (centre @ z @ z.T @ centre for z in (x, y))
    assert found == pytest.approx(((k * m).sum() / (k.norm() * m.norm())).item())


def test_cka_maps_and_what_cannot_be_compared():
    x, y = normal(3, 10, 4), normal(3, 10, 2, seed=1)
    found = cka_map([x, y], [x])
    assert found.shape == (2, 1)
    assert found[0, 0].item() == pytest.approx(1)
    assert found[1, 0].item() == pytest.approx(linear_cka(y.flatten(0, 1), x.flatten(0, 1)))
    with pytest.raises(ValueError, match=r"\(5, 2\) and \(4, 2\) .* the same examples"):
        linear_cka(torch.zeros(5, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="same for all examples"):
        linear_cka(torch.ones(5, 2), normal(5, 2))


# Weights and figures


def test_balanced_losses_pull_as_hard_as_the_soft_targets(teacher):
    student, batch = half_depth(teacher, inherit=False), batches(0)
    loss = balanced(FeatureLoss("attention", MAP, 7.0), student, teacher, batch)
    assert loss == FeatureLoss("attention", MAP, loss.weight)
    z, ours = run_with_features(student, batch)
    with torch.no_grad():
        v, theirs = run_with_features(teacher, batch)
    soft = F.kl_div(
        z.log_softmax(-1).flatten(0, 1), v.softmax(-1).flatten(0, 1), reduction="batchmean"
    )
    norms = [gradient_norm(value, student) for value in (soft, loss(ours, theirs))]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_figures():
    figure = matched_layers()
    said = [text.get_text() for text in figure.axes[0].texts]
    assert said.count("attention") == 2 and {"teacher", "block 4", "hidden\nstate 2"} <= set(said)
    figure = similarity_maps({"before": torch.eye(3)[:, :2], "after": torch.ones(3, 2)})
    assert [axis.get_title() for axis in figure.axes] == ["before", "after"]
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written == ["1.00", "0.00", "0.00", "1.00", "0.00", "0.00"]
    with pytest.raises(ValueError, match=r"map is a matrix, got \(3,\)"):
        similarity_maps({"a": torch.ones(3)})
    plt.close("all")
