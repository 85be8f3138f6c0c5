"""Whole models: replaced layers, reports, saving and loading."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from course_utils.data.tokens import calibration_tokens, evaluation_tokens
from course_utils.evaluation import file_bytes, perplexity, process_bytes, tensor_bytes
from course_utils.models import linear_layers, load_model
from course_utils.quantizers import QuantizedLinear, get_method, quantize_model


def tiny_gpt2(seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=99, n_positions=32, n_embd=24, n_layer=2, n_head=2)
    ).eval()


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=99, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 99, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@torch.no_grad()
def test_quantized_model_is_close_small_and_survives_saving(make, tokens, tmp_path):
    model = make()
    reference = model(tokens).logits
    before, weights = tensor_bytes(model), [layer.weight for layer in linear_layers(model)]
    report = quantize_model(model, get_method("llm_int8"), calibration=tokens)
    logits = model(tokens).logits
    assert ((logits - reference).norm() / reference.norm()).item() < 0.05
    saved = sum(3 * w.numel() - 4 * len(w) for w in weights)  # 4 bytes become 1; a scale per row
    assert before - tensor_bytes(model) == saved
    assert report.nbytes == sum(w.numel() + 4 * len(w) for w in weights)

    model.save_pretrained(tmp_path)
    assert file_bytes(tmp_path) < before
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, logits)
    assert all(
        isinstance(m, QuantizedLinear) for n, m in loaded.named_modules() if n.endswith("_proj")
    )
    assert tensor_bytes(loaded) == tensor_bytes(model)


def test_no_float_weight_is_left_and_the_head_is_kept():
    model = tiny_gpt2()
    quantize_model(model, get_method("llm_int8"))
    assert linear_layers(model) == []
    floats = {name for name, p in model.named_parameters() if p.ndim == 2}
    assert floats == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert model.lm_head.weight is model.transformer.wte.weight


def test_report_holds_every_layer_with_its_errors(tokens):
    model = tiny_llama()
    names = [layer.name for layer in linear_layers(model)]
    report = quantize_model(model, get_method("llm_int8"), calibration=tokens)
    assert [layer.name for layer in report.layers] == names and len(names) == 14
    for layer in report.layers:
        assert 0 < layer.weight_error < 1e-3 and 0 < layer.output_error < 1e-2 and layer.seconds > 0
    assert report.bits_per_weight == 8 * report.nbytes / report.weights


def test_a_half_precision_model_can_be_quantized(tokens):
    model = tiny_llama().half()
    quantize_model(model, get_method("llm_int8"))
    assert model(tokens).logits.dtype == torch.float16


@torch.no_grad()
def test_scales_keep_their_dtype_when_the_model_changes_its_own(tokens, tmp_path):
    model = tiny_gpt2()
    quantize_model(model, get_method("llm_int8"))
    before = {n: b.clone() for n, b in model.named_buffers() if n.endswith(("absmax", "codes"))}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    for half in (torch.nn.Module.half(model), loaded):  # transformers refuses model.half()
        assert half.transformer.wte.weight.dtype == torch.float16
        after = dict(half.named_buffers())
        assert all(
            after[n].dtype == b.dtype and torch.equal(after[n], b) for n, b in before.items()
        )
        assert half(tokens).logits.isfinite().all()


def test_quantizing_twice_is_refused():
    model = tiny_gpt2()
    quantize_model(model, get_method("llm_int8"))
    with pytest.raises(ValueError, match="quantized already"):
        quantize_model(model, get_method("llm_int8"))


def test_a_bad_weight_is_named_with_its_layer_and_the_model_is_left_whole():
    model = tiny_gpt2()
    model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.c_fc: 1 of .* nan at \[0, 0\]"):
        quantize_model(model, get_method("llm_int8"))
    assert len(linear_layers(model)) == 8


def test_empty_calibration_is_refused():
    with pytest.raises(ValueError, match=r"\(0, 8\)"):
        quantize_model(
            tiny_gpt2(), get_method("llm_int8"), calibration=torch.zeros(0, 8, dtype=torch.int64)
        )


def test_course_lm_in_int8_keeps_its_perplexity():
    model, tokenizer = load_model("course-lm")
    tokens = evaluation_tokens(tokenizer, 2048)
    before = perplexity(model, tokens, window=256).perplexity
    report = quantize_model(model, get_method("llm_int8"))
    after = perplexity(model, tokens, window=256).perplexity
    assert abs(after / before - 1) < 0.005
    assert 8 < report.bits_per_weight < 8.2


def test_smollm2_float_and_int8_perplexity(tmp_path):
    """One run on a real pretrained model: 512 tokens, window 512, float, plain int8, LLM.int8()."""
    model, tokenizer = load_model("smollm2-135m-q4_1")
    tokens = evaluation_tokens(tokenizer, 512)
    calibration = calibration_tokens(tokenizer, 1, 256)
    found = {"float": perplexity(model, tokens, window=512).perplexity}
    errors = {}
    for name, threshold in (("int8", 0.0), ("llm_int8", 6.0)):
        quantized = copy.deepcopy(model)
        method = get_method("llm_int8", threshold=threshold)
        report = quantize_model(quantized, method, calibration=calibration)
        errors[name] = {layer.name: layer.output_error for layer in report.layers}
        found[name] = perplexity(quantized, tokens, window=512).perplexity
    print({name: round(value, 2) for name, value in found.items()})
    assert found["float"] < 40
    assert found["int8"] == pytest.approx(found["float"], rel=0.05)
    assert found["llm_int8"] == pytest.approx(found["float"], rel=0.05)
    # So few tokens do not rank the two by perplexity. The layer that int8 hurts most does.
    worst = max(errors["int8"], key=errors["int8"].get)
    assert errors["llm_int8"][worst] < errors["int8"][worst] / 4

    quantized.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # 135 M parameters: 28 M of the embedding stay in float32, 106 M become bytes.
    assert file_bytes(tmp_path) == pytest.approx(4 * 28.3e6 + 106.8e6, rel=0.01)
    assert process_bytes(tmp_path) < 1.5 * file_bytes(tmp_path)
