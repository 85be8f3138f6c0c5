"""The registry of models, the walker over linear layers, the profiles."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from course_utils import profiles
from course_utils.models import ModelUnavailable, linear_layers, load_model, replace_module, smollm2
from course_utils.profiles import resolve


def test_course_lm_is_small_and_loads_through_transformers():
    model, tokenizer = load_model("course-lm")
    assert isinstance(model, GPT2LMHeadModel) and not model.training
    assert 4e6 < model.num_parameters() < 5e6
    weights = profiles.load_model.__globals__["COURSE_LM"] / "model.safetensors"
    assert weights.stat().st_size < 10e6
    text = "The President of the Republic, elected in 1990, resigned — naïve 中."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    plain = AutoModelForCausalLM.from_pretrained(weights.parent, dtype=torch.float32)
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert torch.equal(plain(ids).logits, model(ids).logits)


def test_walker_hides_conv1d():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    ).eval()
    layers = {layer.name.rpartition("h.0.")[2]: layer for layer in linear_layers(model)}
    assert list(layers) == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    layer, x = layers["mlp.c_fc"], torch.randn(3, 8)
    assert layer.weight.shape == (32, 8)  # [out, in]; Conv1D holds [in, out]
    torch.testing.assert_close(layer.module(x), x @ layer.weight.T + layer.bias)


def test_replace_module_puts_the_new_one_in_its_place():
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 3)))
    new = torch.nn.Identity()
    replace_module(model, "0.0", new)
    assert model[0][0] is new


def test_unknown_names_say_what_there_is():
    with pytest.raises(
        ModelUnavailable, match=r"unknown model 'course-ml'.*course-lm.*owner/name@commit"
    ):
        load_model("course-ml")


def test_smollm2_equals_transformers_own_reading_of_the_file(tmp_path):
    """Weights and token ids exactly; transformers' loader is the oracle."""
    from transformers import GgufConfig

    file = smollm2._gguf_file(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).state_dict()
    model, tokenizer = load_model("smollm2-135m-q4_1")
    ours = model.state_dict()
    assert set(ours) == set(theirs) and len(linear_layers(model)) == 210
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    text = "In 1987 the population was 12,345.\n\nNaïve 中文 — <|im_start|>user"
    their_tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert tokenizer(text).input_ids == their_tokenizer(text).input_ids


def test_dithering_stays_inside_the_cells_and_leaves_the_grid():
    plain, _ = load_model("smollm2-135m-q4_1")
    dithered, _ = load_model("smollm2-135m-dithered")
    difference = power = 0.0
    for before, after in zip(linear_layers(plain), linear_layers(dithered), strict=True):
        blocks = before.weight.reshape(-1, 32)
        assert max(len(block.unique()) for block in blocks[:20]) <= 16  # the 4-bit grid
        difference += (after.weight - before.weight).square().sum().item()
        power += before.weight.square().sum().item()
    blocks = after.weight.reshape(-1, 32)
    assert min(len(block.unique()) for block in blocks[:20]) == 32
    assert difference / power == pytest.approx(0.0068, abs=2e-4)
    assert torch.equal(plain.model.embed_tokens.weight, dithered.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("variables", "cuda", "expected"),
    [
        ({}, False, "cpu"),
        ({}, True, "gpu"),
        ({"COLAB_RELEASE_TAG": "release-colab_20260819"}, True, "colab"),
        ({"COLAB_RELEASE_TAG": "release-colab_20260819"}, False, "colab"),
        ({"COURSE_PROFILE": "quick"}, True, "quick"),
        ({"COURSE_PROFILE": "cpu", "COLAB_RELEASE_TAG": "x"}, True, "cpu"),
    ],
)
def test_auto_profile_follows_the_environment(monkeypatch, variables, cuda, expected):
    for name in ("COURSE_PROFILE", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    profile = resolve()
    assert profile.name == expected
    assert profile.device.type == ("cuda" if cuda and expected in ("gpu", "colab") else "cpu")
    if expected == "colab":
        assert profile.dtype == (torch.float16 if cuda else torch.float32)
        assert profile.models == (("gpt2",) if cuda else profiles.MODELS["cpu"])


def test_profiles_refuse_what_they_cannot_be(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="unknown profile 'fast'"):
        resolve("fast")
    with pytest.raises(ValueError, match="needs a CUDA device"):
        resolve("gpu")


def test_a_missing_model_is_left_out_but_one_that_was_named_is_an_error(monkeypatch, capsys):
    def load(name, **_):
        if name != "course-lm":
            raise ModelUnavailable(f"{name!r} could not be fetched")
        return "the embedded model"

    monkeypatch.setattr(profiles, "load_model", load)
    assert resolve("cpu").load_models() == {"course-lm": "the embedded model"}
    assert "Using course-lm only: 'smollm2-135m-q4_1'" in capsys.readouterr().out
    with pytest.raises(ModelUnavailable, match="smollm2"):
        resolve("cpu", "smollm2-135m-dithered").load_models()


def test_loading_course_lm_opens_no_connection():
    code = """
import socket
def refuse(*args, **kwargs): raise AssertionError("a connection was attempted")
socket.socket.connect = socket.getaddrinfo = refuse
from course_utils.models import load_model
print(load_model("course-lm").model.num_parameters())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 4e6
