"""Embedding and LM head in int8: on request, tied ones once, saved and loaded packed."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import some_tokens, tiny_gpt2, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, GPTJConfig, GPTJForCausalLM, LlamaForCausalLM

from course_utils.compression import get_method, quantize_model
from course_utils.data.tokens import evaluation_tokens
from course_utils.evaluation import perplexity, tensor_bytes
from course_utils.models import load_model

INT8 = get_method("llm_int8")


def untied_llama():
    config = copy.deepcopy(tiny_llama().config)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def gptj():
    """Its head has a bias."""
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=99, n_embd=24, n_layer=1, n_head=2, rotary_dim=4, n_positions=32,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPTJForCausalLM(config).eval()
    nn.init.normal_(model.lm_head.bias)
    return model


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama, untied_llama, gptj])
@torch.no_grad()
def test_both_become_int8_rows_and_survive_saving(make, tmp_path):
    model, tokens = make(), some_tokens()
    reference, before = model(tokens).logits, tensor_bytes(model)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    layers_alone = make()
    quantize_model(layers_alone, INT8)
    report = quantize_model(model, INT8, embeddings="int8")
    logits = model(tokens).logits
    assert (logits - reference).norm() < 0.03 * reference.norm()
    rows = 1 if tied else 2
    assert [layer.nbytes for layer in report.embeddings] == rows * [99 * 24 + 4 * 99]
    assert all(0 < layer.weight_error < 1e-4 for layer in report.embeddings)
    assert "embeddings in" in str(report) and report.nbytes < before
    saved = tensor_bytes(layers_alone) - tensor_bytes(model)
    assert saved == rows * (99 * 24 * 3 - 4 * 99)

    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert sum(name.endswith("codes") for name in names) == len(report.layers) + rows
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, logits)
    assert tensor_bytes(loaded) == tensor_bytes(model)
    assert loaded.lm_head.tied == tied
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    for found in (half, nn.Module.half(copy.deepcopy(model))):
        assert found.get_input_embeddings().absmax.dtype == torch.float32
        assert (
            found.get_input_embeddings()(tokens).dtype
            == found(tokens).logits.dtype
            == torch.float16
        )
        assert (found(tokens).logits.float() - logits).norm() < 0.02 * logits.norm()


def test_they_are_left_float_unless_asked_for():
    model = tiny_gpt2()
    report = quantize_model(model, INT8)
    assert type(model.transformer.wte) is nn.Embedding and type(model.lm_head) is nn.Linear
    assert report.embeddings == [] and model.config.tie_word_embeddings


def test_a_tied_head_follows_a_copy_of_the_model_and_passes_gradients():
    model = tiny_llama()
    quantize_model(model, INT8, embeddings="int8")
    copied = copy.deepcopy(model)
    assert copied.lm_head.embedding is copied.model.embed_tokens
    assert copied.lm_head.embedding is not model.model.embed_tokens
    x = torch.randn(3, 24, requires_grad=True)
    model.lm_head(x).sum().backward()
    torch.testing.assert_close(x.grad[0], model.lm_head.embedding.rows.dequantize().sum(0))


def test_layers_may_be_calibrated_at_the_same_time():
    plain, asked = tiny_gpt2(), tiny_gpt2()
    tokens = some_tokens()
    one = quantize_model(plain, INT8, calibration=tokens)
    other = quantize_model(asked, INT8, calibration=tokens, embeddings="int8")
    assert [la.output_error for la in one.layers] == [la.output_error for la in other.layers]


def test_an_altered_byte_is_noticed(tmp_path):
    model = tiny_gpt2()
    quantize_model(model, INT8, embeddings="int8")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    position = content.find(model.transformer.wte.codes[7].numpy().tobytes())
    content[position] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"does not hold layer transformer\.wte as it was saved"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


class Scaled(nn.Embedding):
    """Like Gemma's: its outputs are no rows of its weight."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.set_input_embeddings(Scaled(99, 24)), r"embedding of GPT2LMHeadModel is a Scaled"),
        (lambda m: setattr(m.transformer.wte, "max_norm", 1.0), r"max_norm 1\.0 changes its rows"),
        (lambda m: setattr(m.transformer, "again", m.transformer.wte), r"wte and .*again are one embedding"),
        (lambda m: m.transformer.wte.weight.data.fill_(float("nan")), "are not finite"),
    ],
)  # fmt: skip
def test_what_has_no_such_rows_is_refused_and_the_model_is_whole(change, message):
    model = tiny_gpt2()
    change(model)
    with pytest.raises(ValueError, match=message):
        quantize_model(model, INT8, embeddings="int8")
    assert not any(name.endswith("codes") for name, _ in model.named_buffers())


def test_other_words_are_refused():
    with pytest.raises(ValueError, match=r"embeddings 'int4': choose 'int8', or None"):
        quantize_model(tiny_gpt2(), INT8, embeddings="int4")
    with pytest.raises(ValueError, match="the embedding of Sequential is a NoneType"):
        quantize_model(nn.Sequential(nn.Linear(4, 4)), INT8, embeddings="int8")


def test_course_lm_keeps_its_perplexity():
    model, tokenizer = load_model("course-lm")
    tokens = evaluation_tokens(tokenizer, 1024)
    before = perplexity(model, tokens, window=256).perplexity
    quantize_model(model, INT8, embeddings="int8")
    assert abs(perplexity(model, tokens, window=256).perplexity / before - 1) < 0.005
