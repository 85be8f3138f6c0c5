"""Quantization-aware training: where it starts, that it learns, resumes, and becomes integers."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from course_utils.compression import QuantizedLinear, get_method, quantize_model
from course_utils.data.batches import TrainingBatches
from course_utils.finetuning.conversion import convert
from course_utils.finetuning.qat import FakeQuantLinear, prepare_qat
from course_utils.models import linear_layers
from course_utils.quantizers.affine import Affine
from course_utils.training.loop import TrainConfig, next_token_loss, train

CONTEXT = 8
TWO_BITS = Affine(n_bits=2, group_size="row", symmetric=True)
CONFIG = TrainConfig(steps=6, lr=3e-3, warmup=2, decay=2, eval_every=2)


def gpt2(seed=0):
    config = GPT2Config(
        vocab_size=16, n_positions=CONTEXT, n_embd=16, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


def llama(seed=0):
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def batches(step):
    """Text that can be learned: every token follows from the one before."""
    stream = torch.arange(600) * 3 % 16
    return TrainingBatches(stream, context=CONTEXT, batch_size=4, seed=1)(step)


def prepared(make=gpt2, method=TWO_BITS, **more):
    model = make(**more)
    prepare_qat(model, method)
    return model


def run(model, config=CONFIG, **more):
    return train(model, batches, config, progress=False, **more)


@pytest.fixture(scope="module")
def trained_gpt2():
    """A float model that has learned the text, for a loss worth losing."""
    model = gpt2()
    run(model, TrainConfig(steps=60, lr=1e-2, warmup=4, decay=20, eval_every=60))
    return model


@torch.no_grad()
def loss(model):
    return next_token_loss(model, batches(1000)).item()


@torch.no_grad()
def logits(model):
    return model(input_ids=batches(1000)[:, :-1]).logits


@pytest.fixture
def torch_multiplies(monkeypatch):
    """Packed weights are decoded and multiplied as floats are, so that sums are equal to the last bit."""
    monkeypatch.setenv("COURSE_KERNELS", "torch")


@pytest.mark.usefixtures("torch_multiplies")
@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("group_size", [8, "row", "tensor"])
@pytest.mark.parametrize("weight_range", ["minmax", "mse"])
def test_training_starts_where_round_to_nearest_ends(make, group_size, weight_range):
    method = Affine(3, group_size, symmetric=True, weight_range=weight_range)
    rounded = make()
    quantize_model(rounded, method)
    assert torch.equal(logits(prepared(make, method)), logits(rounded))


@pytest.mark.usefixtures("torch_multiplies")
@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("group_size", [8, "row", "tensor"])
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
def test_packed_integers_give_the_same_logits(make, group_size, scale_dtype, tmp_path):
    method = Affine(3, group_size, symmetric=True, scale_dtype=scale_dtype)
    model = prepared(make, method)
    run(model)
    expected = logits(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FakeQuantLinear)}
    latent = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    report = convert(model)
    assert torch.equal(logits(model), expected)

    assert [layer.name for layer in report.layers] == list(latent)
    assert not any(isinstance(m, FakeQuantLinear) for m in model.modules())
    for row in report.layers:
        module = model.get_submodule(row.name)
        assert isinstance(module, QuantizedLinear)
        out, columns = row.shape
        steps = {8: out * columns // 8, "row": out, "tensor": 1}[group_size]
        stored = out * math.ceil(columns * 3 / 8) + steps * (2 if scale_dtype == "float16" else 4)
        assert row.nbytes == stored == module.quantized_weight.nbytes
        difference = latent[row.name] - module.quantized_weight.dequantize()
        error = (difference.norm() / latent[row.name].norm()).item() ** 2
        assert 0 < row.weight_error == pytest.approx(error, rel=1e-4)

    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), expected)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 8), st.integers(1, 5), st.integers(1, 12), st.integers(2, 8),
    st.sampled_from(["float16", "float32"]), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_stored_weight_is_the_fake_quantized_one_bit_for_bit(
    out, groups, size, n_bits, dtype, per_row, seed
):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, groups * size, generator=generator)
    method = Affine(n_bits, "row" if per_row else size, symmetric=True, scale_dtype=dtype)
    layer = FakeQuantLinear(method, weight, None)
    with torch.no_grad():  # somewhere else, as after training
        layer.weight += 0.3 * torch.randn(weight.shape, generator=generator)
        layer.log_step += 0.3 * torch.randn(layer.log_step.shape, generator=generator)
    stored = layer.quantized_weight()
    assert torch.equal(stored.dequantize(), layer.fake_quantized_weight())
    assert stored.scale.dtype == getattr(torch, dtype)
    assert torch.equal(stored.scale.float(), layer.step())


def test_a_short_training_lowers_the_loss_from_round_to_nearest(trained_gpt2):
    model = copy.deepcopy(trained_gpt2)
    prepare_qat(model, Affine(2, "tensor", symmetric=True))
    start, steps = loss(model), model.transformer.h[0].mlp.c_fc.step().clone()
    assert start > loss(trained_gpt2) + 0.05
    run(model, TrainConfig(steps=40, lr=3e-3, warmup=2, decay=20, eval_every=20))
    assert loss(model) < start - 0.5 * (start - loss(trained_gpt2))
    assert not torch.equal(model.transformer.h[0].mlp.c_fc.step(), steps)


def test_steps_are_not_decayed_and_weights_are():
    model = prepared()
    layer = model.transformer.h[0].mlp.c_fc
    weight, steps = layer.weight.detach().clone(), layer.log_step.detach().clone()
    run(
        model,
        TrainConfig(steps=1, lr=0.5, warmup=0, weight_decay=0.1, eval_every=1),
        loss=lambda m, _: 0.0 * sum(p.sum() for p in m.parameters()),
    )
    assert torch.equal(layer.log_step, steps)
    torch.testing.assert_close(layer.weight.detach(), weight * 0.95)


def test_one_update_changes_large_and_small_steps_alike():
    """The first update of AdamW is the learning rate, here relative to the step."""
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    weight *= torch.tensor([[1e-2], [1.0], [1e2], [1e-1]])
    layer = FakeQuantLinear(TWO_BITS, weight, None)
    before = layer.step().detach()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.0)
    layer(torch.ones(1, 32)).sum().backward()
    optimizer.step()
    change = (layer.step().detach() / before).log().abs()
    torch.testing.assert_close(change, torch.full((4, 1), 0.1), rtol=0.02, atol=0)


def test_steps_are_positive_after_the_wildest_update():
    layer = FakeQuantLinear(TWO_BITS, torch.randn(4, 8), None)
    for parameter in (-8.0, 8.0):
        with torch.no_grad():
            layer.log_step.fill_(parameter)
        assert (layer.step() > 0).all()
        assert torch.equal(layer.quantized_weight().dequantize(), layer.fake_quantized_weight())


@pytest.mark.parametrize("parameter", [-20.0, 20.0, math.nan])
def test_steps_that_the_stored_dtype_cannot_hold_are_refused(parameter):
    model = prepared()
    layer = model.transformer.h[0].mlp.c_fc
    with torch.no_grad():
        layer.log_step[1] = parameter
    with pytest.raises(ValueError, match=r"float16: lower the learning rate.*'float32'"):
        logits(model)
    with pytest.raises(ValueError, match=r"layer transformer\.h\.0\.mlp\.c_fc: steps"):
        convert(model)
    assert isinstance(model.transformer.h[0].attn.c_attn, FakeQuantLinear)  # left whole


class Interrupted(Exception):
    """Stands for whatever stops a run."""


def test_resuming_is_bit_exact_with_learned_steps(tmp_path):
    whole = prepared()
    whole_curve = run(whole, evaluate=loss, checkpoint=tmp_path / "whole.safetensors")

    def interrupted(step):
        if step == 3:
            raise Interrupted
        return batches(step)

    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Interrupted):
        train(prepared(), interrupted, CONFIG, evaluate=loss, checkpoint=file, progress=False)
    resumed = prepared(seed=7)  # other weights, and steps: all of them come from the checkpoint
    curve = run(resumed, evaluate=loss, checkpoint=file)
    expected = whole.state_dict()
    assert any(name.endswith("log_step") for name in expected)
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())
    assert [row["held_out"] for row in curve] == [row["held_out"] for row in whole_curve]
    assert torch.equal(logits(resumed), logits(whole))


def test_a_checkpoint_of_other_groups_is_refused(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    run(prepared(), checkpoint=file)
    with pytest.raises(ValueError, match=r"another model .*log_step"):
        run(prepared(method=Affine(2, 8, symmetric=True)), checkpoint=file)


def test_a_zero_layer_can_be_trained_and_stored():
    layer = FakeQuantLinear(TWO_BITS, torch.zeros(2, 8), None)
    assert layer.step().tolist() == [[1.0], [1.0]]
    assert torch.equal(layer.quantized_weight().dequantize(), torch.zeros(2, 8))


def test_bad_weights_are_named_with_their_layer_and_the_model_is_left_whole():
    model = gpt2()
    model.transformer.h[0].mlp.c_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"layer transformer\.h\.0\.mlp\.c_proj: 1 of .* nan"):
        prepare_qat(model, TWO_BITS)
    assert len(linear_layers(model)) == 4
    with pytest.raises(ValueError, match=r"group_size 5 does not divide the 16 columns"):
        prepare_qat(gpt2(), Affine(2, 5, symmetric=True))


def test_training_that_ran_away_is_not_converted():
    model = prepared()
    model.transformer.h[0].mlp.c_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"layer transformer\.h\.0\.mlp\.c_proj: 1 of 1024 values"):
        convert(model)
    assert isinstance(model.transformer.h[0].mlp.c_proj, FakeQuantLinear)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (Affine(2, "row"), ValueError, "LSQ learns steps alone: use symmetric=True"),
        (Affine(8, "row", symmetric=True, inputs="per_token"), ValueError, "inputs='per_token'"),
        (get_method("llm_int8"), TypeError, "LLMInt8"),
    ],
)
def test_methods_that_it_cannot_train_are_refused(method, error, message):
    with pytest.raises(error, match=message):
        prepare_qat(gpt2(), method)


def test_half_precision_is_refused():
    with pytest.raises(TypeError, match=r"layer .*torch\.float16.*model\.float\(\)"):
        prepare_qat(gpt2().half(), TWO_BITS)


def test_wrong_order_is_refused():
    with pytest.raises(ValueError, match="prepare_qat or prepare_bitnet, and train it first"):
        convert(gpt2())
    with pytest.raises(ValueError, match="quantized already"):
        prepare_qat(prepared(), TWO_BITS)
