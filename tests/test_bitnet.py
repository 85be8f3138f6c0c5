"""BitNet b1.58: codes, bytes and sums against llama.cpp's and transformers'; training; what is refused."""

import copy
import json

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations import bitnet as industry

from course_utils.compression import QuantizedLinear, quantize_model
from course_utils.data.batches import TrainingBatches
from course_utils.finetuning import bitnet_lm
from course_utils.finetuning.bitnet import BitLinear, bitnet_model, prepare_bitnet
from course_utils.finetuning.bitnet_lm import Run, TwoStages, best_rate, train_plan, train_run
from course_utils.finetuning.conversion import convert
from course_utils.formats.ternary import (
    from_tq1_0,
    from_tq2_0,
    from_transformers,
    to_tq1_0,
    to_tq2_0,
    to_transformers,
)
from course_utils.kernels import (
    add_subtract,
    base3_product,
    int8_matmul,
    pack_trits,
    unpack_trits,
)
from course_utils.models import linear_layers
from course_utils.quantizers.bitnet import EPSILON, ROUNDINGS, BitNet, quantize_tokens
from course_utils.training.loop import TrainConfig, next_token_loss, train

PACKINGS = ["2bit", "base3"]
CONTEXT = 8


@pytest.fixture(autouse=True)
def industry_without_compiling():
    with torch.compiler.set_stance("force_eager"):
        yield


def random_weight(seed, out=8, columns=256, scale=0.02):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, columns, generator=generator) * scale


def random_trits(seed, *shape):
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).char()


def model(seed=0, width=16):
    return bitnet_model(width, vocabulary=16, context=CONTEXT, seed=seed).eval()


def prepared(method=None, **more):
    found = model(**more)
    prepare_bitnet(found, method or BitNet())
    return found


def batches(step):
    """Text that can be learned: every token follows from the one before."""
    stream = torch.arange(600) * 3 % 16
    return TrainingBatches(stream, context=CONTEXT, batch_size=4, seed=1)(step)


@torch.no_grad()
def logits(found):
    return found(input_ids=batches(1000)[:, :-1]).logits


def trained(found, steps=40):
    config = TrainConfig(steps=steps, lr=1e-2, warmup=2, decay=steps // 2, eval_every=steps)
    train(found, batches, config, progress=False)
    return found


# Codes and scales


@given(st.integers(0, 2**16), st.integers(1, 12), st.integers(1, 40), st.floats(1e-8, 1e4))
def test_weights_are_those_of_transformers_bit_for_bit(seed, out, columns, scale):
    weight = random_weight(seed, out, columns, scale)
    quantized = BitNet().quantize(weight)
    assert torch.equal(quantized.dequantize(), industry.WeightQuant.apply(weight))
    assert quantized.trits().unique().tolist() in (
        [-1, 0, 1],
        [-1, 0],
        [-1, 1],
        [0, 1],
        [-1],
        [0],
        [1],
    )


@given(st.integers(0, 2**16), st.integers(1, 12), st.integers(1, 40), st.floats(1e-8, 1e4))
def test_inputs_are_those_of_transformers_bit_for_bit(seed, tokens, columns, scale):
    x = random_weight(seed, tokens, columns, scale)
    codes, inverse = quantize_tokens(x)
    theirs, their_inverse = industry.BitLinear.activation_quant(None, x)
    assert torch.equal(codes, theirs.float()) and torch.equal(inverse, their_inverse)
    assert torch.equal(codes / inverse, industry.ActQuant.apply(x))
    large = x.abs().amax(1) > EPSILON
    assert (codes.abs().amax(1)[large] == 127).all()


@given(st.integers(0, 2**16), st.sampled_from([0.25, 0.5, 2.0, 64.0]))
def test_codes_do_not_depend_on_the_weight_s_scale_and_follow_its_sign(seed, factor):
    weight = random_weight(seed)
    for rounding in ("absmean", "row_absmean", "least_squares"):
        codes, scale = ROUNDINGS[rounding](weight)
        scaled, its_scale = ROUNDINGS[rounding](factor * weight)
        assert torch.equal(scaled, codes)
        torch.testing.assert_close(its_scale, factor * scale)
        assert torch.equal(ROUNDINGS[rounding](-weight)[0], -codes)


def test_a_weight_of_half_gamma_is_zero():
    codes, gamma = ROUNDINGS["absmean"](torch.tensor([[0.5, 0.51, -0.5, -0.51, 1.98]]).div(0.8))
    assert gamma.item() == pytest.approx(1.0)
    assert codes.tolist() == [[1, 1, -1, -1, 1]]
    codes, gamma = ROUNDINGS["absmean"](torch.tensor([[0.5, -0.5, 1.0, 2.0]]))
    assert gamma.item() == 1.0 and codes.tolist() == [[0, 0, 1, 1]]


def test_absmean_has_the_figures_of_a_gaussian():
    """31.0 % zeros; error 0.2634, where the best ternary grid has 0.1902 and a sign 0.3634."""
    weight = random_weight(0, 1000, 1000, 1.0)
    codes, _ = ROUNDINGS["absmean"](weight)
    assert (codes == 0).float().mean().item() == pytest.approx(0.310, abs=2e-3)
    for rounding, expected in {
        "absmean": 0.2634,
        "least_squares": 0.1902,
        "binary": 0.3634,
    }.items():
        codes, scale = ROUNDINGS[rounding](weight)
        assert (weight - codes * scale).square().mean().item() == pytest.approx(expected, abs=2e-3)


@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=7))
def test_least_squares_is_the_best_of_all_ternary_codes(values):
    weight = torch.tensor([values])
    codes, scale = ROUNDINGS["least_squares"](weight)
    error = (weight - codes * scale).square().sum()
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * len(values)).reshape(
        -1, len(values)
    )
    norm = every.square().sum(1)
    best = weight.square().sum() - ((every @ weight[0]).square() / norm.clamp(min=1)).max()
    assert error.item() == pytest.approx(best.item(), abs=1e-4)


def test_rows_have_scales_of_their_own_and_binary_has_no_zero():
    weight = random_weight(0) * torch.arange(1, 9)[:, None]
    _, scale = ROUNDINGS["row_absmean"](weight)
    torch.testing.assert_close(scale, weight.abs().mean(1, keepdim=True))
    codes, scale = ROUNDINGS["binary"](weight)
    assert codes.unique().tolist() == [-1, 1]
    torch.testing.assert_close(scale, weight.abs().mean().reshape(1, 1))


# Bytes


@given(st.data())
def test_trits_come_back(data):
    packing = data.draw(st.sampled_from(PACKINGS))
    rows, n = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 33))
    trits = random_trits(data.draw(st.integers(0, 2**16)), rows, n)
    packed = pack_trits(trits, packing)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-n // {"2bit": 4, "base3": 5}[packing]))
    assert torch.equal(unpack_trits(packed, packing, n), trits)


def test_five_trits_in_a_byte_come_back_for_all_243():
    trits = torch.cartesian_prod(*[torch.tensor([-1, 0, 1], dtype=torch.int8)] * 5)
    packed = pack_trits(trits, "base3")
    assert len(packed.unique()) == 243
    assert torch.equal(unpack_trits(packed, "base3", 5), trits)
    # llama.cpp's way: three times the low eight bits carries the next digit out
    byte, digits = packed.flatten().int(), []
    for _ in range(5):
        byte = byte * 3
        digits.append(byte >> 8)
        byte = byte & 255
    assert torch.equal(torch.stack(digits, 1) - 1, trits.int())


@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 3), st.floats(1e-4, 1e4))
@settings(max_examples=30)
def test_blocks_are_those_of_llama_cpp(seed, out, blocks, scale):
    trits = random_trits(seed, out, 256 * blocks)
    trits[0, :256] = 0
    scale = torch.tensor([[scale]])
    values = (trits * scale).numpy()
    for kind, to, back in (("TQ2_0", to_tq2_0, from_tq2_0), ("TQ1_0", to_tq1_0, from_tq1_0)):
        quant = gguf.GGMLQuantizationType[kind]
        stored = to(trits, scale)
        assert np.array_equal(stored.numpy(), gguf.quants.quantize(values, quant))
        found, scales = back(stored)
        assert torch.equal(found, trits)
        decoded = found * scales.repeat_interleave(256, 1)
        assert np.array_equal(decoded.numpy(), gguf.quants.dequantize(stored.numpy(), quant))
        bits = {"TQ2_0": 2.0625, "TQ1_0": 1.6875}[kind]
        assert 8 * stored.numel() / trits.numel() == bits


@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(1, 9))
def test_rows_are_packed_as_transformers_packs_them(seed, quarter, columns):
    trits = random_trits(seed, 4 * quarter, columns)
    theirs = industry.pack_weights(trits.clone())  # adds 1 to its input, in place
    assert torch.equal(to_transformers(trits), theirs)
    assert torch.equal(from_transformers(theirs), industry.unpack_weights(theirs, torch.int8))
    assert torch.equal(from_transformers(theirs), trits)


def test_transformers_layers_take_our_codes_with_the_scale_in_opposite_conventions():
    weight, x = random_weight(0), random_weight(1, 5, scale=1.0)
    quantized = BitNet().quantize(weight)
    ours = BitNet().linear(x, quantized, None)
    packed = industry.BitLinear(256, 8, False, dtype=torch.float32)
    packed.weight.copy_(to_transformers(quantized.trits()))
    packed.weight_scale.copy_(1 / quantized.scale.flatten())
    torch.testing.assert_close(packed(x), ours, rtol=1e-5, atol=1e-6)
    offline = industry.AutoBitLinear(256, 8, False)
    offline.weight.data.copy_(quantized.trits())
    offline.weight_scale.copy_(quantized.scale.flatten())
    torch.testing.assert_close(offline(x), ours, rtol=1e-5, atol=1e-6)


def test_bytes_are_counted_with_the_scale():
    weight = random_weight(0, 10, 250)
    for packing, row in (("2bit", 63), ("base3", 50)):
        quantized = BitNet(packing=packing).quantize(weight)
        assert quantized.nbytes == 10 * row + 4 and quantized.shape == (10, 250)
        assert quantized.bits_per_weight == 8 * quantized.nbytes / 2500
    assert BitNet("row_absmean").quantize(weight).nbytes == 10 * 63 + 10 * 4


# Sums


@given(st.integers(0, 2**16), st.integers(1, 4), st.integers(1, 5), st.integers(1, 40))
def test_additions_and_subtractions_give_the_product(seed, tokens, out, columns):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-127, 128, (tokens, columns), generator=generator).char()
    trits = random_trits(seed, out, columns)
    assert torch.equal(add_subtract(x, trits), int8_matmul(x, trits))


@given(st.integers(0, 2**16), st.sampled_from(PACKINGS), st.sampled_from(list(ROUNDINGS)))
@settings(max_examples=30)
@example(3072, "2bit", "absmean")  # an input half way between two codes in float32, not in float64
def test_integers_compute_what_the_training_layer_computes(seed, packing, rounding):
    method = BitNet(rounding, packing=packing)
    weight, x = random_weight(seed, 8, 100), random_weight(seed + 1, 5, 100, 1.0)
    layer = BitLinear(method, weight)
    integers = method.linear(x, layer.quantized_weight(), None)
    codes, inverse = (part.double() for part in quantize_tokens(x))  # float64 breaks ties otherwise
    exact = F.linear(codes / inverse, layer.quantized_weight().dequantize().double())
    torch.testing.assert_close(integers.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(integers, layer(x), rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 2**16), st.integers(1, 20), st.integers(1, 9), st.sampled_from([32, 96, 256, 40])
)
def test_compiled_and_torch_sums_are_the_same_bits(seed, tokens, out, columns):
    method = BitNet()
    weight = method.quantize(random_weight(seed, out, columns))
    x, found = random_weight(seed + 1, tokens, columns, 1.0), []
    for choice in ("auto", "torch"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COURSE_KERNELS", choice)
            found.append(method.linear(x, weight, None))
    assert torch.equal(*found)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("inputs", ["int8", "float"])
def test_a_trained_model_becomes_integers_with_the_same_logits(packing, inputs, tmp_path):
    found = trained(prepared(BitNet(inputs=inputs, packing=packing)))
    expected = logits(found)
    latent = {
        n: m.weight.detach().clone() for n, m in found.named_modules() if isinstance(m, BitLinear)
    }
    report = convert(found)
    torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-4)
    assert [layer.name for layer in report.layers] == list(latent)
    for name, weight in latent.items():
        module = found.get_submodule(name)
        assert isinstance(module, QuantizedLinear)
        codes, scale = ROUNDINGS["absmean"](weight)
        assert torch.equal(module.quantized_weight.dequantize(), codes * scale)
    found.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(found))


def test_rounding_after_training_is_the_same_method_and_worse():
    """The control: a float model that has learned the text loses it, one trained in ternary has it."""
    twin, ternary = trained(model(), 80), trained(prepared(), 80)
    losses = {}
    for name, found in (("twin", twin), ("ternary", ternary)):
        losses[name] = next_token_loss(found, batches(1000)).item()
    rounded = copy.deepcopy(twin)
    quantize_model(rounded, BitNet())
    assert next_token_loss(rounded, batches(1000)).item() > losses["twin"] + 0.1
    assert losses["ternary"] < 1.5 < np.log(16)


# Training


def test_gradients_go_straight_through_without_a_mask():
    layer = BitLinear(BitNet(), random_weight(0, 4, 6, 1.0))
    x = random_weight(1, 3, 6, 1.0).requires_grad_()
    layer(x).sum().backward()
    codes, inverse = quantize_tokens(x.detach())
    torch.testing.assert_close(layer.weight.grad, (codes / inverse).sum(0).expand(4, 6))
    torch.testing.assert_close(x.grad, layer.quantized_weight().dequantize().sum(0).expand(3, 6))


def test_twins_begin_with_the_same_weights_and_every_layer_has_a_norm_before_it():
    twin, ternary = model(), prepared()
    theirs = dict(ternary.named_parameters())
    assert list(theirs) == [name for name, _ in twin.named_parameters()]
    assert all(torch.equal(p, theirs[name]) for name, p in twin.named_parameters())
    assert twin.num_parameters() == ternary.num_parameters()
    seen = {}
    for name, module in ternary.named_modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.0  # small inputs are normalised like the others
        if isinstance(module, BitLinear):
            module.register_forward_pre_hook(lambda m, a, name=name: seen.update({name: a[0]}))
    logits(ternary)
    assert len(seen) == 28
    for x in seen.values():  # gains are 1 at the start
        torch.testing.assert_close(x.square().mean(-1), torch.ones(x.shape[:-1]))


def test_a_warm_up_goes_from_float_to_ternary():
    ternary, twin = prepared(), model()
    before_step = bitnet_lm.quantization_warmup(ternary, 10)
    before_step(0)
    torch.testing.assert_close(logits(ternary), logits(twin))
    before_step(10)
    assert torch.equal(logits(ternary), logits(prepared()))
    before_step(5)
    half = logits(ternary)
    assert not torch.allclose(half, logits(twin)) and not torch.allclose(half, logits(prepared()))


def test_two_stages_drop_rate_and_weight_decay_midway():
    config = TwoStages(steps=100, lr=1.5e-3, warmup=1)
    rates = [config.lr_at(step) for step in range(100)]
    assert rates[0] == 1.5e-3 and rates[49] == pytest.approx(8e-4, rel=0.01)
    assert rates[50] == pytest.approx(5e-4) and rates[99] < 1e-6 + 1e-3 * 5e-4
    assert rates == sorted(rates, reverse=True)
    assert [config.weight_decay_at(step) for step in (0, 49, 50, 99)] == [0.1, 0.1, 0, 0]


@pytest.fixture
def small_plan(monkeypatch):
    """The real script on a toy: short sequences, small batches, few steps."""
    monkeypatch.setattr(bitnet_lm, "CONTEXT", CONTEXT)
    monkeypatch.setattr(bitnet_lm, "BATCH", 4)
    monkeypatch.setattr(bitnet_lm, "VOCABULARY", 16)
    monkeypatch.setattr(bitnet_lm, "WIDTHS", {"tiny": 16})
    monkeypatch.setattr(bitnet_lm, "SWEEPS", {"tiny": (1e-3, 1e-2)})
    monkeypatch.setattr(bitnet_lm, "SWEEP_TOKENS", 640)
    monkeypatch.setattr(
        bitnet_lm, "held_out_loss", lambda m, tokens: next_token_loss(m, batches(9)).item()
    )


def test_each_twin_takes_the_best_rate_of_its_own_sweep(small_plan, tmp_path):
    stream = torch.arange(600) * 3 % 16
    run = Run("tiny", "ternary", 960)
    with pytest.raises(
        ValueError, match=r"run tiny-ternary-0\.00064M-lr0\.001-seed0 of its sweep first"
    ):
        train_run(run, stream, stream, tmp_path)
    held_out = {}
    for trial in bitnet_lm.sweep("tiny"):
        held_out[trial.kind, trial.lr] = train_run(trial, stream, stream, tmp_path)["held_out"]
    for kind in ("ternary", "float"):
        best = min((1e-3, 1e-2), key=lambda lr: held_out[kind, lr])
        assert best_rate(Run("tiny", kind, 960), tmp_path) == best
        log = train_run(Run("tiny", kind, 960), stream, stream, tmp_path)
        assert log["settings"]["lr"] == best and log["settings"]["steps"] == 30
    saved = tmp_path / run.name
    assert sorted(p.name for p in saved.iterdir()) == ["log.json", "model.safetensors", "run.json"]
    assert json.loads((saved / "log.json").read_text())["run"]["kind"] == "ternary"


def test_the_pair_is_shipped_packed_with_the_logs_of_all(small_plan, tmp_path, monkeypatch):
    stream = torch.arange(600) * 3 % 16
    plan = [
        *bitnet_lm.sweep("tiny"),
        *bitnet_lm.pair("tiny", 960),
        *bitnet_lm.pair("tiny", 960, seed=1),
    ]
    monkeypatch.setattr(bitnet_lm, "WITH_WEIGHTS", plan[4:6])
    for run in plan[:-1]:
        train_run(run, stream, stream, tmp_path / "runs")
    bitnet_lm.ship(tmp_path / "runs", tmp_path / "assets", plan)
    shipped = {p.name for p in (tmp_path / "assets").iterdir()}
    assert shipped == {f"{run.name}.json" for run in plan[:-1]} | {run.name for run in plan[4:6]}
    for run in plan[4:6]:
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "assets" / run.name, dtype=torch.float32
        )
        ours = bitnet_lm.trained_model(run, tmp_path / "runs")
        torch.testing.assert_close(logits(loaded.eval()), logits(ours), rtol=0.02, atol=0.02)
        quantized = [m for m in loaded.modules() if isinstance(m, QuantizedLinear)]
        assert len(quantized) == (28 if run.kind == "ternary" else 0)
    found = bitnet_lm.trained_model(plan[4], tmp_path / "runs")
    held_out = next_token_loss(found, batches(9)).item()
    log = json.loads((tmp_path / "runs" / plan[4].name / "log.json").read_text())
    assert held_out == pytest.approx(log["held_out"], abs=1e-4)


@pytest.mark.parametrize("what", ["settings", "data"])
def test_resuming_with_other_settings_or_other_data_is_refused(
    small_plan, tmp_path, what, monkeypatch
):
    stream = torch.arange(600) * 3 % 16
    run = Run("tiny", "ternary", 960, lr=1e-2)
    train_run(run, stream, stream, tmp_path)
    if what == "settings":
        monkeypatch.setattr(bitnet_lm, "BATCH", 2)
    else:
        stream = stream + 1
    with pytest.raises(
        ValueError, match={"settings": "another settings, batch", "data": "another data"}[what]
    ):
        train_run(run, stream % 16, stream % 16, tmp_path)


def test_an_interrupted_run_goes_on_bit_for_bit(small_plan, tmp_path, monkeypatch):
    stream = torch.arange(600) * 3 % 16
    run = Run("tiny", "ternary", 201 * 32, lr=1e-2, advice="quantization_warmup")
    whole = train_run(run, stream, stream, tmp_path / "whole")

    held_out_loss, calls = bitnet_lm.held_out_loss, []

    def interrupted(found, tokens):
        calls.append(tokens)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return held_out_loss(found, tokens)

    monkeypatch.setattr(bitnet_lm, "held_out_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_run(run, stream, stream, tmp_path / "cut")
    assert (tmp_path / "cut" / run.name / "checkpoint.safetensors").exists()
    resumed = train_run(run, stream, stream, tmp_path / "cut")
    assert len(calls) == 4  # evaluated after 100 and 200 steps, then again after 200 and at the end
    for key in ("step", "loss", "held_out"):
        assert [row[key] for row in resumed["curve"]] == [row[key] for row in whole["curve"]]
    weights = [
        (tmp_path / d / run.name / "model.safetensors").read_bytes() for d in ("whole", "cut")
    ]
    assert weights[0] == weights[1]


def test_finished_runs_are_skipped(tmp_path):
    run = Run("tiny", "float", 960, lr=1e-3)
    (tmp_path / run.name).mkdir()
    (tmp_path / run.name / "log.json").write_text("{}")
    train_plan(tmp_path, [run])
    assert [p.name for p in (tmp_path / run.name).iterdir()] == ["log.json"]


def test_the_plan_has_each_run_once_and_each_sweep_before_what_it_decides():
    names = [run.name for run in bitnet_lm.PLAN]
    assert len(set(names)) == len(names)
    for place, run in enumerate(bitnet_lm.PLAN):
        if run.lr is None:
            assert all(trial.name in names[:place] for trial in bitnet_lm.sweep(run.size))


def test_what_is_shipped_can_be_loaded_and_is_what_the_logs_say():
    logs = bitnet_lm.shipped_logs()
    for name in ("small-ternary-4M-seed0", "small-float-4M-seed0"):
        shipped = bitnet_lm.shipped_model(name)
        log = logs[name]
        assert shipped.config.hidden_size == bitnet_lm.WIDTHS[log["run"]["size"]]
        assert not shipped.training and shipped.dtype == torch.float32
        quantized = [m for m in shipped.modules() if isinstance(m, QuantizedLinear)]
        assert len(quantized) == (28 if log["run"]["kind"] == "ternary" else 0)
        rows = [row["held_out"] for row in log["curve"]]
        assert log["held_out"] == min(rows) and len(rows) == 20
        card = (bitnet_lm.SHIPPED / name / "README.md").read_text("utf-8")
        assert card == bitnet_lm.model_card(log)
    with pytest.raises(
        ValueError, match="no weights of 'small-other' are shipped; there are small-f"
    ):
        bitnet_lm.shipped_model("small-other")


# What is refused, and what is handled


@pytest.mark.parametrize("rounding", list(ROUNDINGS))
def test_zeros_stay_finite(rounding):
    method = BitNet(rounding)
    quantized = method.quantize(torch.zeros(3, 10))
    assert quantized.dequantize().abs().max() <= 1.01 * EPSILON
    if rounding != "binary":
        assert not quantized.trits().any()
    y = method.linear(torch.zeros(2, 10), BitNet(rounding).quantize(random_weight(0, 3, 10)), None)
    assert torch.equal(y, torch.zeros(2, 3))


def test_a_nan_or_an_infinity_makes_its_row_nan():
    x = random_weight(0, 3, 10, 1.0)
    quantized = BitNet().quantize(random_weight(1, 4, 10))
    expected = BitNet().linear(x, quantized, None)
    x[1, 2], x[2, 3] = torch.nan, -torch.inf
    y = BitNet().linear(x, quantized, None)
    assert torch.equal(y[0], expected[0]) and y[1:].isnan().all()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("bad", [2, -2, 127])
def test_other_values_than_trits_are_not_packed(packing, bad):
    with pytest.raises(ValueError, match=f"trit {bad} is none of -1, 0 and 1"):
        pack_trits(torch.tensor([0, 1, bad], dtype=torch.int8), packing)


def test_float_trits_are_not_packed():
    with pytest.raises(TypeError, match=r"got torch.float32: use trits.char\(\)"):
        pack_trits(torch.tensor([0.0, 1.0]), "2bit")


def test_code_3_and_bytes_of_no_trits_are_refused():
    with pytest.raises(ValueError, match="code 3 in packed trits"):
        unpack_trits(torch.tensor([0b11_00_00_00], dtype=torch.uint8), "2bit", 4)
    every = torch.arange(256).byte()[:, None]
    packable = set(
        pack_trits(torch.cartesian_prod(*[torch.arange(-1, 2)] * 5), "base3").flatten().tolist()
    )
    for byte in every:
        if byte.item() not in packable:
            with pytest.raises(ValueError, match=f"byte {byte.item()} stands for no five trits"):
                unpack_trits(byte, "base3", 5)
    with pytest.raises(ValueError, match="code 3 in packed trits"):
        from_transformers(torch.tensor([[3]], dtype=torch.uint8))


@pytest.mark.parametrize(
    ("packed", "packing", "n", "error"),
    [
        (torch.zeros(2, dtype=torch.uint8), "base3", 5, ValueError),
        (torch.zeros(1, dtype=torch.uint8), "base3", -1, ValueError),
        (torch.zeros(1), "base3", 5, TypeError),
        (torch.zeros(1, dtype=torch.uint8), "3bit", 5, ValueError),
    ],
)
def test_what_was_not_packed_is_not_unpacked(packed, packing, n, error):
    with pytest.raises(error):
        unpack_trits(packed, packing, n)


def test_layouts_refuse_widths_that_they_do_not_have():
    trits = torch.zeros(6, 100, dtype=torch.int8)
    for to in (to_tq1_0, to_tq2_0):
        with pytest.raises(ValueError, match="100 columns are no multiple of 256"):
            to(trits, torch.ones(1, 1))
        with pytest.raises(ValueError, match="does not fit into float16"):
            to(torch.ones(1, 256, dtype=torch.int8), torch.tensor([[1e5]]))
    with pytest.raises(ValueError, match="6 rows are no multiple of 4"):
        to_transformers(trits)
    for back in (from_tq1_0, from_tq2_0):
        with pytest.raises(ValueError, match="rows of blocks are"):
            back(torch.zeros(1, 65, dtype=torch.uint8))
        with pytest.raises(TypeError, match="uint8"):
            back(torch.zeros(1, 66))


@pytest.mark.parametrize("setting", ["rounding", "inputs", "packing"])
def test_unknown_settings_are_refused(setting):
    with pytest.raises(ValueError, match=f"{setting} 'other': choose one of"):
        BitNet(**{setting: "other"})


def test_models_that_cannot_be_trained_so_are_refused():
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, attention_bias=True,
    )  # fmt: skip
    biased = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="q_proj has a bias"):
        prepare_bitnet(biased, BitNet())
    assert not any(isinstance(m, BitLinear) for m in biased.modules())
    with pytest.raises(TypeError, match="too coarse for small updates"):
        prepare_bitnet(model().bfloat16(), BitNet())
    with pytest.raises(ValueError, match="no float linear layer left"):
        prepare_bitnet(prepared(), BitNet())
    with pytest.raises(ValueError, match="no layer that trains through codes"):
        convert(model())


def test_heads_and_embeddings_stay_float():
    found = prepared()
    head = found.get_output_embeddings()
    assert isinstance(head, nn.Linear) and head.weight is found.get_input_embeddings().weight
    assert not linear_layers(found)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 700), st.integers(0, 99))
def test_sums_by_table_look_up_are_exact(m, n, k, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (m, k), generator=draw).char()
    trits = torch.randint(-1, 2, (n, k), generator=draw).char()
    packed = pack_trits(trits, "base3")
    assert torch.equal(base3_product(x, packed), int8_matmul(x, trits))


def test_look_up_is_the_same_with_all_numbers_of_threads_and_without_compiled_code(monkeypatch):
    x, packed = random_trits(0, 3, 640) * 100, pack_trits(random_trits(1, 700, 640), "base3")
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found += [base3_product(x, packed)]
    torch.set_num_threads(before)
    monkeypatch.setenv("COURSE_KERNELS", "torch")
    expected = base3_product(x, packed)
    assert all(torch.equal(sums, expected) for sums in found)


def test_look_up_refuses_what_does_not_agree():
    x, packed = random_trits(0, 3, 64), pack_trits(random_trits(1, 5, 64), "base3")
    with pytest.raises(ValueError, match=r"takes int8 and uint8 on one device, got torch.int32"):
        base3_product(x.int(), packed)
    with pytest.raises(
        ValueError, match=r"\[m, k\] and \[n, ceil\(k / 5\)\], got \(3, 60\), \(5, 13\)"
    ):
        base3_product(x[:, :60], packed)
    assert base3_product(x[:0], packed).shape == (0, 5)
