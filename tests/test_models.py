"""The registry of models, the walker over linear layers, the profiles."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from tiny_models import some_tokens, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from course_utils import profiles
from course_utils.models import ModelUnavailable, linear_layers, load_model, replace_module, smollm2
from course_utils.profiles import resolve
from course_utils.tools.dither import GRIDS, input_power, largest, relative_error


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


@pytest.fixture(scope="module")
def plain_and_dithered():
    return load_model("smollm2-135m-q4_1").model, load_model("smollm2-135m-dithered").model


def test_dithering_leaves_the_exempt_columns_and_moves_all_others(plain_and_dithered):
    """5% of each layer's columns: noise there is most of what noise everywhere costs."""
    exempt = json.loads(smollm2.EXEMPT.read_text("utf-8"))
    pairs = list(zip(*map(linear_layers, plain_and_dithered), strict=True))
    assert list(exempt) == [before.name for before, _ in pairs]
    difference = power = 0.0
    for before, after in pairs:
        columns = before.weight.shape[1]
        same = (before.weight == after.weight).all(0).nonzero().flatten().tolist()
        assert same == exempt[before.name] and len(same) == round(0.05 * columns)
        difference += (after.weight - before.weight).square().sum().item()
        power += before.weight.square().sum().item()
    assert difference / power == pytest.approx(0.0064, abs=2e-4)
    plain, dithered = plain_and_dithered
    assert torch.equal(plain.model.embed_tokens.weight, dithered.model.embed_tokens.weight)


def test_dithering_stays_inside_the_cells(plain_and_dithered):
    plain, dithered = (linear_layers(model)[100].weight for model in plain_and_dithered)
    cells = plain.reshape(-1, 32)  # [blocks, 32]: at most 16 values each, a step apart
    assert max(len(block.unique()) for block in cells[:50]) <= 16
    low, high = cells.aminmax(dim=1, keepdim=True)
    noise = (dithered - plain).reshape(-1, 32)
    full = torch.tensor([len(block.unique()) == 16 for block in cells[:500]])
    steps = ((high - low) / 15)[:500][full]
    assert noise[:500][full].abs().le(steps / 2 * 1.001).all()


def test_the_dithered_weights_are_the_same_bits_everywhere(plain_and_dithered):
    weight = linear_layers(plain_and_dithered[1])[100].weight
    digest = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
    assert digest == "c9de4b05ea7667aafaedcbe93f91946ca8c39a3e7058cc81bdc0afb21b771314"


@pytest.mark.parametrize("grid", GRIDS)
def test_rounding_dithered_weights_errs_as_on_gaussian_ones(plain_and_dithered, grid):
    """On every 4-bit grid; the plain weights lie on that of groups of 32 with a float minimum."""
    plain, dithered = (linear_layers(model)[101].weight for model in plain_and_dithered)
    gaussian = torch.randn(dithered.shape, generator=torch.Generator().manual_seed(0))
    errors = [relative_error([weight], GRIDS[grid]) for weight in (plain, dithered, gaussian)]
    assert errors[1] == pytest.approx(errors[2], rel=0.06)
    if grid == "groups of 32, float minimum":
        assert errors[0] < 1e-10
    if grid == "groups of 64, float minimum":
        assert errors[0] < 0.8 * errors[2]


def test_the_old_dithered_model_in_a_cache_is_not_taken_for_the_new(monkeypatch, tmp_path):
    """The list of exempt columns is part of the folder's name."""
    names = []
    monkeypatch.setattr(smollm2, "cached", lambda name, build: names.append(name))
    smollm2.dithered_folder()
    other = tmp_path / "columns.json"
    other.write_text("{}", "utf-8")
    monkeypatch.setattr(smollm2, "EXEMPT", other)
    smollm2.dithered_folder()
    assert len(set(names)) == 2 and "models/smollm2-135m-dithered" not in names


def test_exempt_columns_are_those_of_the_largest_inputs():
    model = tiny_llama()
    tokens = some_tokens(3, 20)
    power = input_power(model, tokens)
    assert list(power) == [layer.name for layer in linear_layers(model)]
    seen = []
    first = linear_layers(model)[0]
    handle = first.module.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    for sequence in tokens:
        model(sequence[None])
    handle.remove()
    expected = torch.cat(seen).flatten(0, 1).square().mean(0)
    torch.testing.assert_close(power[first.name].float(), expected)
    assert largest(torch.tensor([3.0, 1.0, 5.0, 4.0]), 0.5) == [2, 3]


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
