"""Kinds of models and inputs that were quantized wrongly or half; now they are refused, and stay whole."""

import copy
import re

import pytest
import torch
import transformers
from tiny_models import some_tokens, tiny_gpt2, tiny_llama
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from course_utils.compression import QuantizedLinear, get_method, quantize_model
from course_utils.compression.sensitivity import sensitivity
from course_utils.data.tokens import calibration_tokens
from course_utils.finetuning.qat import prepare_qat
from course_utils.models import linear_layers, load_model

INT8 = get_method("llm_int8")
GPTQ = get_method("gptq", group_size=8)
GPTQ_ROWS = get_method("gptq", group_size="row")
STATIC = get_method("affine", n_bits=8, group_size="row", inputs="static")
SMALL = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
MIXTRAL = {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4}
MAMBA = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
ALBERT = {**SMALL, "embedding_size": 16}
GPT1 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}


def made(name: str, config: str, settings: dict) -> PreTrainedModel:
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()


def refused(model: nn.Module, message: str, *args, error: type = ValueError, **kwargs) -> None:
    """`quantize_model` refuses this, and the model computes and holds what it did."""
    state = {name: t.clone() for name, t in model.state_dict().items() if not t.is_meta}
    kinds = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=message):
        quantize_model(model, *args, **kwargs)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    after = model.state_dict()
    assert all(torch.equal(after[name], t) for name, t in state.items())


# Layers that are not, or whose weight other code reads


@torch.no_grad()
def test_a_subclass_with_a_forward_of_its_own_is_no_layer():
    """Llama 4's router was replaced, and the model could not run."""
    settings = {**MIXTRAL, "num_local_experts": 2, "head_dim": 8, "intermediate_size_mlp": 48}
    model, tokens = made("Llama4ForCausalLM", "Llama4TextConfig", settings), some_tokens()
    before = model(tokens).logits
    quantize_model(model, INT8)
    assert (model(tokens).logits - before).norm() < 0.1 * before.norm()
    assert not [name for name, m in model.named_modules()
                if "router" in name and isinstance(m, QuantizedLinear)]  # fmt: skip


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    ("name", "config", "settings", "reader"),
    [
        ("T5EncoderModel", "T5Config", T5, r"encoder\.block\.0\..*wo by T5DenseActDense\.forward"),
        ("MambaForCausalLM", "MambaConfig", MAMBA, r"layers\.0\.mixer\.dt_proj by MambaMixer"),
    ],
)
def test_a_weight_that_other_code_reads_is_found_before_anything_is_touched(
    name, config, settings, reader, calibrated
):
    """T5 asks the dtype of one, Mamba multiplies by one: AttributeError with 6 layers replaced."""
    model, method = made(name, config, settings), GPTQ_ROWS if calibrated else INT8
    tokens = some_tokens(8, 24) if calibrated else None
    if "T5" in name and calibrated:  # whose blocks also share positions that the first computes
        reader = "block .* makes something else within|reads that of"
    refused(model, reader, method, calibration=tokens)


def test_a_weight_that_the_decoder_reads_is_found_without_calibration():
    model = made("T5ForConditionalGeneration", "T5Config", T5).train()
    refused(model, r"decoder\.block\.1\..*wo by T5DenseActDense", INT8)
    assert all(module.training for module in model.modules())


def test_a_branch_that_never_runs_reads_nothing():
    """Bloom's attention reads a weight in a branch for tensor parallel training."""
    model = made("BloomForCausalLM", "BloomConfig", {
        "vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4})  # fmt: skip
    assert len(quantize_model(model, INT8, calibration=some_tokens()).layers) == 8


def test_reading_the_weight_of_a_quantized_layer_says_what_to_do():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).train()
    quantize_model(layer, INT8)
    with pytest.raises(AttributeError, match=r"holds no float weight, .*leave the layer float"):
        layer(torch.randn(1, 3, 16))
    assert not hasattr(layer.linear1, "weight")


# Blocks that are not run one after the other


class Scaled(nn.Module):
    """A block that the model gives a factor of its own, by keyword."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, width)

    def forward(self, hidden, factor=1.0):
        return hidden + factor * self.proj(hidden)


class Sided(nn.Module):
    def __init__(self, factors: tuple[float, ...]):
        super().__init__()
        self.embedding, self.factors = nn.Embedding(99, 16), factors
        self.blocks = nn.ModuleList(Scaled(16) for _ in factors)

    def forward(self, input_ids, use_cache=False):
        hidden = self.embedding(input_ids)
        for block, factor in zip(self.blocks, self.factors, strict=True):
            hidden = block(hidden, factor=factor)
        return hidden


@pytest.mark.parametrize("method", [INT8, GPTQ, STATIC], ids=lambda method: method.name)
def test_a_block_that_runs_many_times_is_not_calibrated_block_by_block(method):
    """ALBERT's one block was calibrated on its first pass only."""
    model = made("AlbertModel", "AlbertConfig", ALBERT)
    methods = {la.name: method for la in linear_layers(model) if "albert_layers" in la.name}
    refused(model, "ran|something else", methods, calibration=some_tokens(8, 24))


def test_blocks_whose_side_inputs_differ_are_not_calibrated_block_by_block():
    refused(Sided((1.0, 2.0)).eval(), r"block blocks\.1 makes something else within Sided",
            GPTQ, calibration=some_tokens(8, 24))  # fmt: skip
    report = quantize_model(Sided((2.0, 2.0)).eval(), GPTQ, calibration=some_tokens(8, 24))
    assert all(layer.output_error < 0.1 for layer in report.layers)


# What stays float, and what was not measured


def test_the_report_names_what_stays_float_with_its_share():
    """Of Mixtral 8 layers, 16% of the blocks' weights, were quantized without a word of the rest."""
    model = made("MixtralForCausalLM", "MixtralConfig", MIXTRAL)
    report = quantize_model(model, INT8)
    parts = {part.name: part for part in report.float_parts}
    experts = parts["model.layers.*.mlp.experts.gate_up_proj"]
    assert experts.weights == 2 * 4 * 2 * 48 * 32 and experts.nbytes == 4 * experts.weights
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= parts.keys()
    assert sum(p.share for p in parts.values()) == pytest.approx(
        sum(p.nbytes for p in parts.values()) / sum(
            t.nbytes for t in (*model.parameters(), *model.buffers())), rel=1e-6)  # fmt: skip
    assert report.blocks_float_share > 0.8
    text = str(report)
    assert "of the blocks' weights stay float: model.layers.*.mlp.experts.gate_up_proj" in text
    assert "blocks' weights" not in str(quantize_model(tiny_llama(), INT8))


class Routed(nn.Module):
    """A block with two experts, of which tokens choose by their first feature, and one never called."""

    def __init__(self, width: int):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.unused = nn.Linear(width, width)

    def forward(self, hidden):
        flat, new = hidden.flatten(0, 1), torch.zeros_like(hidden.flatten(0, 1))
        for number, expert in enumerate(self.experts):
            chosen = flat[:, 0] > 1e9 if number else flat[:, 0] <= 1e9
            if chosen.any():
                new[chosen] = expert(flat[chosen])
        return new.view_as(hidden)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(99, 16), nn.ModuleList([Routed(16)])

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, use_cache=False):
        return self.blocks[0](self.embedding(input_ids))


def test_a_layer_that_never_ran_is_not_measured_or_refused():
    """Its output error was reported as 0."""
    report = quantize_model(Experts().eval(), INT8, calibration=some_tokens(8, 24))
    errors = {layer.name: layer.output_error for layer in report.layers}
    assert errors.pop("blocks.0.experts.0") > 0 and set(errors.values()) == {None}
    assert "2 layers never ran: not measured" in str(report)
    for method in (GPTQ, STATIC):
        refused(Experts().eval(), r"layer blocks\.0\.experts\.1: it never ran on the calibration",
                method, calibration=some_tokens(8, 24))  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [GPTQ, STATIC, get_method("smoothquant", inputs="static"),
     get_method("affine", n_bits=8, group_size="row", inputs="static", symmetric=True,
                input_range="entropy")],
    ids=["gptq", "affine", "smoothquant", "entropy"],
)  # fmt: skip
def test_inputs_that_are_all_zero_are_refused(method):
    """A static range of nothing clipped all later inputs away."""
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data.zero_()  # what down_proj reads
    refused(model, r"layer model\.layers\.1\.mlp\.down_proj: all calibration inputs are zero",
            method, calibration=some_tokens(8, 24))  # fmt: skip


# Weights that are shared or computed


@pytest.mark.parametrize("what", ["norm", "weight", "memory"])
def test_smoothing_refuses_parameters_that_two_blocks_share(what):
    """Each block divided the norm that both have: a relative error of 0.89."""
    model = tiny_llama()
    first, second = model.model.layers
    if what == "norm":
        second.input_layernorm.weight = first.input_layernorm.weight
    elif what == "weight":
        second.mlp.up_proj.weight = first.mlp.up_proj.weight
    else:
        second.input_layernorm.weight = nn.Parameter(first.input_layernorm.weight.data)
    refused(model, r"layers\.0\..* and model\.layers\.1\..* are one parameter",
            get_method("smoothquant"), calibration=some_tokens())  # fmt: skip


@pytest.mark.parametrize("wrap", [weight_norm, parametrizations.weight_norm,
                                  parametrizations.orthogonal])  # fmt: skip
def test_computed_weights_are_refused(wrap):
    model = tiny_llama()
    wrap(model.model.layers[1].mlp.up_proj)
    message = r"layers\.1\.mlp\.up_proj: its weight is computed anew"
    refused(model, message, INT8)
    with pytest.raises(ValueError, match=message):
        prepare_qat(model, get_method("affine", group_size=8, symmetric=True))
    with pytest.raises(ValueError, match=message):
        sensitivity(model, INT8, some_tokens()[0], window=8)


def test_smoothing_refuses_a_norm_whose_weight_is_computed():
    model = tiny_gpt2()
    parametrizations.weight_norm(model.transformer.h[1].ln_1, dim=None)
    refused(model, r"block transformer\.h\.1 cannot be rewritten: the weight of ln_1 is computed",
            get_method("smoothquant"), calibration=some_tokens())  # fmt: skip


# Calibration that says little


def test_calibration_tokens_that_the_text_does_not_hold_are_refused_or_told():
    tokenizer = load_model("course-lm").tokenizer
    with pytest.raises(ValueError, match=r"has only 1 different windows of 70518, not 128"):
        calibration_tokens(tokenizer, 128, 70_518)
    with pytest.warns(UserWarning, match=r"1200000, but they hold only \d+ different ones"):
        calibration_tokens(tokenizer, 20, 60_000)


@pytest.mark.filterwarnings("error::UserWarning")
def test_calibration_of_different_sequences_is_not_warned_of():
    tokenizer = load_model("course-lm").tokenizer
    calibration_tokens(tokenizer, 128, 256)
    quantize_model(tiny_gpt2(), INT8, calibration=some_tokens(16, 20))


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (some_tokens(1, 20).repeat(200, 1), "only 1 of the 200 "),
        (some_tokens(4, 20).repeat(5, 1), "only 4 of the 20 "),
        (torch.full((2, 20), 7), "only 1 of the 2 .* 1 different token ids"),
    ],
)
def test_repeated_calibration_is_told(tokens, told):
    with pytest.warns(UserWarning, match=told):
        quantize_model(tiny_gpt2(), INT8, calibration=tokens)


# Inputs and states of models that failed without a clear word


@pytest.mark.parametrize("calibration", [[[1, 2, 3]], {"input_ids": some_tokens()}, "text"])
def test_calibration_that_is_no_tensor_is_refused(calibration):
    message = rf"\[sequences, length\] token ids, got a {type(calibration).__name__}: give one"
    refused(tiny_gpt2(), message, INT8, calibration=calibration, error=TypeError)


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.float32])
def test_calibration_of_no_integers_is_refused(dtype):
    refused(tiny_gpt2(), rf"got {dtype} \(2, 20\)", INT8, calibration=some_tokens().to(dtype))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "uint32", "uint64"])
def test_token_ids_of_any_integer_dtype_calibrate_alike(dtype):
    reports = [
        quantize_model(tiny_gpt2(), GPTQ, calibration=some_tokens(4, 20).to(kind))
        for kind in (torch.int64, getattr(torch, dtype))
    ]
    first, second = ([layer.output_error for layer in report.layers] for report in reports)
    assert first == second


@torch.no_grad()
def test_blocks_may_return_a_list():
    """GPT-1's do: an error came with 4 layers replaced."""
    model, tokens = made("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT1), some_tokens(8, 24)
    before = model(tokens).logits
    report = quantize_model(model, get_method("gptq", n_bits=8, group_size=8), calibration=tokens)
    assert len(report.layers) == 8
    assert (model(tokens).logits - before).norm() < 0.05 * before.norm()


class Named(Scaled):
    """A block that calls its layer by keyword, on one token after the other."""

    def forward(self, hidden, factor=1.0):
        return torch.stack([self.proj(input=token) for token in hidden[0]])[None]


@pytest.mark.parametrize("method", [INT8, GPTQ, STATIC], ids=lambda method: method.name)
@torch.no_grad()
def test_layers_may_be_called_by_keyword_and_with_one_token(method):
    model = Sided((1.0, 1.0)).eval()
    model.blocks = nn.ModuleList(Named(16) for _ in range(2))
    before = model(some_tokens(1))
    report = quantize_model(model, method, calibration=some_tokens(4, 24))
    assert all(layer.output_error < 0.1 for layer in report.layers)
    assert (model(some_tokens(1)) - before).norm() < 0.3 * before.norm()


@torch.no_grad()
def test_a_quantized_conv1d_is_called_by_its_own_keyword():
    model = nn.Sequential(Conv1D(4, 8))
    quantize_model(model, INT8)
    x = torch.randn(3, 8)
    assert torch.equal(model[0](x=x), model[0](x))


@pytest.mark.parametrize("calibrated", [False, True])
def test_weights_on_the_meta_device_are_refused(calibrated):
    with torch.device("meta"):
        model = tiny_gpt2()
    message = r"layer transformer\.h\.0\.attn\.c_attn: its weight is on the meta device"
    refused(model, message, INT8, calibration=some_tokens() if calibrated else None)
    model = tiny_gpt2()
    model.transformer.wte.to("meta")
    refused(model, "some of the model's weights are on the meta", INT8, calibration=some_tokens())


def test_offloaded_weights_are_refused(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.disk_offload(tiny_gpt2(), tmp_path, execution_device="cpu")
    refused(model, r"c_attn: its forward was replaced .*offloaded", INT8)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook",
                                      "register_full_backward_hook"])  # fmt: skip
def test_hooks_on_a_layer_are_refused_not_lost(register):
    model = tiny_gpt2()
    layer = model.transformer.h[1].mlp.c_fc
    handle = getattr(layer, register)(lambda *_: None)
    refused(model, r"h\.1\.mlp\.c_fc: it has hooks, which would vanish", INT8)
    handle.remove()
    quantize_model(model, INT8)


def test_the_checks_leave_classes_and_hooks_as_they_were():
    model = tiny_llama()
    untouched = copy.deepcopy(model)
    name = "model.layers.1.mlp.down_proj"
    quantize_model(model, {name: GPTQ}, calibration=some_tokens(8, 24))
    for other, module in untouched.named_modules():
        if other != name:
            assert type(model.get_submodule(other)) is type(module), other
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert re.fullmatch(r"model\.layers\.\d\..*", name)


@torch.no_grad()
def test_falcons_class_is_a_layer_though_it_has_a_forward_of_its_own():
    settings = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
    model, tokens = made("FalconForCausalLM", "FalconConfig", settings), some_tokens()
    before = model(tokens).logits
    assert len(quantize_model(model, INT8, calibration=tokens).layers) == 8
    assert (model(tokens).logits - before).norm() < 0.1 * before.norm()
