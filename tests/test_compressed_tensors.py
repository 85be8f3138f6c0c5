"""compressed-tensors: what is written, the library itself reads, layer by layer and as a model."""

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import some_tokens, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from course_utils.compression import quantize_model
from course_utils.formats.compressed_tensors import pack_quantized, save_compressed_tensors
from course_utils.models import linear_layers
from course_utils.quantizers.affine import Affine
from course_utils.quantizers.awq import AWQ
from course_utils.quantizers.gptq import GPTQ
from course_utils.quantizers.llm_int8 import LLMInt8

LIBRARY = BaseCompressor.get_value_from_registry("pack-quantized")


def load(folder):
    """The model with the weights that the library decodes while loading."""
    config = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**31),
    st.integers(2, 8),
    st.integers(1, 40),
    st.sampled_from([(24, 8), (40, 8), (64, 32), (36, "row"), (33, "row")]),
    st.booleans(),
)
def test_the_library_decodes_each_layer_to_our_values(seed, n_bits, out, shape, symmetric):
    columns, size = shape
    W = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))
    stored = Affine(n_bits=n_bits, group_size=size, symmetric=symmetric).quantize(W)
    zero_point = None if symmetric else stored.zero_points()
    tensors = pack_quantized(stored.integer_codes(), stored.scale, zero_point, n_bits)
    arguments = QuantizationArgs(
        num_bits=n_bits, type="int", symmetric=symmetric,
        strategy="channel" if size == "row" else "group", group_size=None if size == "row" else size,
    )  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    assert torch.equal(LIBRARY.decompress(tensors, scheme)["weight"], stored.dequantize())


IGNORED = pytest.mark.filterwarnings("ignore:the Hessian of", "ignore:You passed")
METHODS = {
    "awq": AWQ(n_bits=4, group_size=8),
    "gptq": GPTQ(n_bits=4, group_size=8, act_order=True, static_groups=True),
    "gptq, rows": GPTQ(n_bits=8, group_size="row"),
    "gptq, symmetric, 3 bits": GPTQ(n_bits=3, group_size=8, symmetric=True),
    "nearest": Affine(n_bits=4, group_size=8),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@IGNORED
@torch.no_grad()
def test_transformers_loads_the_model_with_the_library(method, tmp_path):
    """Logits of the loaded model, whose weights the library decodes, are those of the float weights."""
    model, tokens = tiny_llama(), some_tokens()
    calibration = tokens if method.needs_calibration else None
    quantize_model(model, method, calibration=calibration)
    save_compressed_tensors(model, tmp_path)
    decoded = {
        name: module.quantized_weight.dequantize()
        for name, module in model.named_modules()
        if hasattr(module, "quantized_weight")
    }
    loaded = load(tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    layers = {layer.name: layer.weight for layer in linear_layers(loaded)}
    assert layers.keys() == decoded.keys()
    assert all(torch.equal(layers[name], weight) for name, weight in decoded.items())


def test_a_symmetric_grid_needs_no_configuration(tmp_path):
    """The library decodes the weights when the model runs first."""
    model, tokens = tiny_llama(), some_tokens()
    quantize_model(model, Affine(n_bits=4, group_size=8, symmetric=True))
    save_compressed_tensors(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


def test_the_configuration_says_what_stays_float(tmp_path):
    model = tiny_llama()
    names = [layer.name for layer in linear_layers(model) if "down_proj" not in layer.name]
    quantize_model(model, dict.fromkeys(names, Affine(n_bits=4, group_size=8)))
    save_compressed_tensors(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))["quantization_config"]
    down = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert sorted(config["ignore"]) == ["lm_head", *down]
    tokens = some_tokens()
    loaded = load(tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


REFUSED = {
    "not quantized": (None, "has no quantized layer"),
    "no uniform grid": (LLMInt8(), r"layer model\.layers\.0\.self_attn\.q_proj: codes of llm_int8"),
    "inputs": (Affine(n_bits=8, group_size="row", inputs="per_token"), "its inputs are quantized"),
    "one scale": (Affine(group_size="tensor"), "one scale for the whole weight"),
    "another order": (GPTQ(group_size=8, act_order=True), "columns in another order"),
}


@pytest.mark.parametrize(("method", "message"), REFUSED.values(), ids=REFUSED)
@IGNORED
def test_what_the_format_does_not_hold_is_refused(method, message, tmp_path):
    model = tiny_llama()
    if method is not None:
        calibration = some_tokens() if method.needs_calibration else None
        quantize_model(model, method, calibration=calibration)
    with pytest.raises(ValueError, match=message):
        save_compressed_tensors(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_several_grids_are_refused(tmp_path):
    model = tiny_llama()
    names = [layer.name for layer in linear_layers(model)]
    methods = dict.fromkeys(names, Affine(group_size=8)) | {
        names[0]: Affine(n_bits=8, group_size=8)
    }
    quantize_model(model, methods)
    with pytest.raises(ValueError, match="the layers are on several grids"):
        save_compressed_tensors(model, tmp_path)


def test_gpt2_is_refused(tmp_path):
    """Its layers are Conv1D, which the library does not know."""
    model = tiny_gpt2()
    quantize_model(model, Affine(group_size=8))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel.*Conv1D"):
        save_compressed_tensors(model, tmp_path)
