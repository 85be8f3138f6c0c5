"""GGUF blocks: bytes and values exactly as the gguf package makes them."""

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course_utils.compression import QuantizedLinear, get_method, quantize_model
from course_utils.models import load_model

KINDS = ["Q8_0", "Q4_0", "Q4_1"]


def theirs(weight: torch.Tensor, kind: str):
    return gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(0, 2**31), st.sampled_from((-4, 0, 3)))
@settings(max_examples=40, deadline=None)
def test_bytes_and_values_are_those_of_gguf(kind, rows, blocks, seed, magnitude):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 32 * blocks, generator=generator) * 10**magnitude
    ours, expected = get_method("gguf", kind=kind).quantize(weight), theirs(weight, kind)
    assert torch.equal(ours.blocks, torch.from_numpy(expected))
    decoded = gguf.quants.dequantize(expected, gguf.GGMLQuantizationType[kind])
    assert torch.equal(ours.dequantize(), torch.from_numpy(decoded))
    assert ours.shape == weight.shape
    assert ours.bits_per_weight == {"Q8_0": 8.5, "Q4_0": 4.5, "Q4_1": 5.0}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_ties_and_constant_blocks_are_those_of_gguf(kind):
    weight = torch.zeros(4, 64)
    weight[1, :32] = torch.arange(32) - 15.5
    weight[1, 32:] = -0.25
    weight[2, :32] = torch.arange(32).remainder(3) - 1.0  # largest magnitude with both signs
    weight[3, :32] = torch.arange(32) * 8 - 127.5
    weight[3, 32], weight[3, 33:] = 127, torch.arange(31) - 15.5  # halves at Q8_0's step 1
    ours = get_method("gguf", kind=kind).quantize(weight)
    assert torch.equal(ours.blocks, torch.from_numpy(theirs(weight, kind)))
    assert (ours.dequantize()[0] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_too_small_for_its_inverse_decodes_to_zero(kind):
    assert (
        get_method("gguf", kind=kind).quantize(torch.full((1, 32), 1e-42)).dequantize() == 0
    ).all()


def test_refusals():
    with pytest.raises(ValueError, match="kind 'Q5_0': choose one of Q8_0, Q4_0, Q4_1"):
        get_method("gguf", kind="Q5_0")
    method = get_method("gguf")
    with pytest.raises(ValueError, match="40 columns are not a multiple of 32, the block of Q4_1"):
        method.quantize(torch.zeros(2, 40))
    with pytest.raises(ValueError, match=r"magnitude 100000 does not fit into float16"):
        method.quantize(torch.full((1, 32), 1e5))
    with pytest.raises(ValueError, match="1 of 32 weights are not finite"):
        method.quantize(torch.zeros(1, 32).index_fill(1, torch.tensor(3), torch.nan))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_quantized_saved_and_loaded(kind, tmp_path):
    model, _ = load_model("course-lm")
    ids = torch.arange(20)[None]
    quantize_model(model, get_method("gguf", kind=kind))
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    x = torch.randn(3, layers[0].in_features, generator=torch.Generator().manual_seed(0))
    expected = x @ layers[0].quantized_weight.dequantize().T + layers[0].bias
    torch.testing.assert_close(layers[0](x), expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
