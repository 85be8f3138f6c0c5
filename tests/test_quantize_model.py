"""Whole models: replaced layers, reports, saving and loading."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import some_tokens, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM

from course_utils.compression import QuantizedLinear, get_method, quantize_model
from course_utils.data.tokens import calibration_tokens, evaluation_tokens
from course_utils.evaluation import file_bytes, perplexity, process_bytes, tensor_bytes
from course_utils.models import linear_layers, load_model


@pytest.fixture(scope="module")
def tokens():
    return some_tokens()


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


def test_process_bytes_loads_packed_weights_as_they_are(tmp_path):
    model, tokenizer = load_model("course-lm")
    quantize_model(model, get_method("llm_int8"))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert process_bytes(tmp_path) < 2 * file_bytes(tmp_path)  # float weights would take 2.4 times


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


@pytest.mark.parametrize("name", ["affine", "gguf"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_bias_joins_in_when_the_model_changes_its_dtype(name, dtype, tokens, tmp_path):
    """The bias stayed float32, as it is stored, and the product of the float weight refused it."""
    model = tiny_gpt2(width=64)
    quantize_model(model, get_method(name))
    exact = model(tokens).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for half in (model.to(dtype), loaded):
        logits = half(tokens).logits
        assert logits.dtype == dtype
        assert (logits.float() - exact).norm() < 0.02 * exact.norm()


def test_a_module_in_two_places_is_refused_not_replaced_in_one():
    """The second place kept the float module, and the report did not say so."""
    model = tiny_gpt2()
    first, second = model.transformer.h
    second.mlp.c_fc = first.mlp.c_fc
    with pytest.raises(ValueError, match=r"h\.0\.mlp\.c_fc and .*h\.1\.mlp\.c_fc are one module"):
        quantize_model(model, get_method("affine", group_size="row"))
    rest = [layer.name for layer in linear_layers(model) if "c_fc" not in layer.name]
    quantize_model(model, dict.fromkeys(rest, get_method("affine", group_size="row")))
    assert [layer.name for layer in linear_layers(model)] == ["transformer.h.0.mlp.c_fc"]


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


def test_calibration_in_training_mode_is_refused(tokens):
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        quantize_model(tiny_gpt2().train(), get_method("llm_int8"), calibration=tokens)


# A method for each layer

C_FC, C_ATTN = "transformer.h.1.mlp.c_fc", "transformer.h.0.attn.c_attn"
MIXED = {
    C_FC: get_method("llm_int8", threshold=0.0),
    C_ATTN: get_method("llm_int8", outlier_weights="original"),
}


@pytest.mark.parametrize("calibrated", [False, True])
@torch.no_grad()
def test_a_mapping_quantizes_the_layers_it_names_and_is_saved_layer_by_layer(
    calibrated, tokens, tmp_path
):
    model, untouched = tiny_gpt2(), tiny_gpt2()
    report = quantize_model(model, MIXED, calibration=tokens if calibrated else None)
    assert [layer.name for layer in report.layers] == [C_ATTN, C_FC]
    assert all((layer.output_error is not None) == calibrated for layer in report.layers)
    assert "1 x LLMInt8(threshold=0.0" in str(report) and "outlier_weights='original'" in str(
        report
    )
    kept = {layer.name: layer.weight for layer in linear_layers(model)}
    assert kept.keys() == {layer.name for layer in linear_layers(untouched)} - MIXED.keys()
    assert all(
        torch.equal(kept[la.name], la.weight) for la in linear_layers(untouched) if la.name in kept
    )

    model.save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"]
    assert {name: entry["settings"]["threshold"] for name, entry in entries.items()} == {
        C_FC: 0.0,
        C_ATTN: 6.0,
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name: loaded.get_submodule(name).method for name in MIXED} == MIXED
    assert loaded.get_submodule(C_ATTN).original.dtype == torch.float16
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_what_a_loader_widened_is_stored_as_it_was_again(tmp_path):
    """transformers 4.57 reads float16 tensors into a float32 model as float32."""
    model = tiny_gpt2()
    quantize_model(model, MIXED)
    model.save_pretrained(tmp_path)
    model, quantizer = tiny_gpt2(), model.hf_quantizer
    tensors = load_file(tmp_path / "model.safetensors")

    def load(**changed: torch.Tensor) -> QuantizedLinear:
        """The steps of a loader that reads the tensors of one layer as `changed`."""
        quantizer._process_model_before_weight_loading(model, [tmp_path / "model.safetensors"])
        for name in MIXED:
            layer = model.get_submodule(name)
            for key, _ in list(layer.named_buffers()):
                setattr(layer, key, tensors[f"{name}.{key}"])
        layer = model.get_submodule(C_ATTN)
        for key, tensor in changed.items():
            setattr(layer, key, tensor)
        quantizer._process_model_after_weight_loading(model)
        return layer

    layer = load(original=tensors[f"{C_ATTN}.original"].float())
    assert layer.original.dtype == torch.float16
    model = tiny_gpt2()
    with pytest.raises(ValueError, match=f"layer {C_ATTN} as it was saved"):
        load(absmax=tensors[f"{C_ATTN}.absmax"].half())  # what it rounded is refused


def test_layers_can_be_quantized_one_after_the_other(tokens):
    together, one_by_one = tiny_gpt2(), tiny_gpt2()
    quantize_model(together, MIXED)
    for name, method in MIXED.items():
        quantize_model(one_by_one, {name: method})
    configs = (m.config.quantization_config.layers for m in (together, one_by_one))
    assert next(configs) == next(configs)


def test_a_mapping_with_a_wrong_name_names_near_ones_and_changes_nothing():
    model, method = tiny_gpt2(), get_method("llm_int8")
    with pytest.raises(
        ValueError, match=r"'transformer\.h\.1\.mlp\.fc'\. Near are .*h\.1\.mlp\.c_fc"
    ):
        quantize_model(model, {C_ATTN: method, "transformer.h.1.mlp.fc": method})
    with pytest.raises(ValueError, match=r"mapping .* is empty"):
        quantize_model(model, {})
    with pytest.raises(TypeError, match=r"c_fc is mapped to 'llm_int8', which is no method"):
        quantize_model(model, {C_FC: "llm_int8"})
    assert len(linear_layers(model)) == 8


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_the_lm_head_is_left_float_and_refused_by_name(make):
    """Both models tie it to the embedding, which quantizing it would change as well."""
    model = make()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    quantize_model(model, get_method("affine", group_size=8))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with pytest.raises(
        ValueError, match=r"lm_head is the LM head, which stays float .* leave it out"
    ):
        quantize_model(make(), {"lm_head": get_method("affine", group_size=8)})


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
