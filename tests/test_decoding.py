"""A packed model decoded into a float one."""

import pytest
import torch
from tiny_models import some_tokens, tiny_gpt2, tiny_llama

from course_utils.compression import QuantizedLinear, get_method, quantize_model
from course_utils.compression.decoding import decode_model


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_a_decoded_model_computes_what_the_packed_one_does(make):
    model, tokens = make().eval(), some_tokens()
    quantize_model(model, get_method("affine", n_bits=3, group_size="row"))
    expected = model(tokens).logits
    assert decode_model(model) is model
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_decoding_draws_no_random_numbers():
    model = tiny_gpt2().eval()
    quantize_model(model, get_method("affine", n_bits=4, group_size="row"))
    before = torch.get_rng_state()
    decode_model(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_method_that_rounds_inputs_is_refused_and_the_model_is_whole():
    model = tiny_llama().eval()
    quantize_model(model, get_method("llm_int8"))
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.\S+ by .*inputs are rounded"):
        decode_model(model)
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_a_float_model_is_refused():
    with pytest.raises(ValueError, match="no quantized layer: quantize it first"):
        decode_model(tiny_gpt2())
