"""Block by block: what reaches a block and its layers, what is kept meanwhile, and what is refused."""

import copy
import itertools
import os
import subprocess
import sys
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tiny_models import some_tokens, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from course_utils.compression import Method, get_method, quantize_model
from course_utils.models import BlockInputs, blocks, linear_layers
from course_utils.quantizers.affine import Affine
from course_utils.quantizers.gptq import GPTQ
from course_utils.quantizers.llm_int8 import Int8Weight, LLMInt8
from course_utils.quantizers.smoothquant import SmoothQuant

INT8 = LLMInt8(threshold=0.0)


class Seen:
    """Statistics that keep all inputs."""

    def __init__(self):
        self.inputs: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        self.inputs.append(x.clone())


@dataclass
class Record:
    """What a probe was shown: block inputs by `prepare`, statistics and weights by `quantize`."""

    hidden: list[Tensor] = field(default_factory=list)
    layers: list[tuple[list[Tensor], Tensor]] = field(default_factory=list)
    alive: list[int] = field(default_factory=list)  # statistics and float layers at each `prepare`
    held: list[weakref.ref] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Probe(Method):
    """Plain int8 that records all that the driver gives it."""

    record: Record
    name: ClassVar[str] = "probe"
    weight_type: ClassVar[type] = Int8Weight
    prefix: ClassVar[str] = "quantized"
    wants_statistics: ClassVar[bool] = True

    def prepare(self, block: nn.Module, inputs: BlockInputs) -> None:
        self.record.hidden.append(inputs.hidden.clone())
        self.record.alive.append(sum(ref() is not None for ref in self.record.held))
        self.record.held += [weakref.ref(layer.module) for layer in linear_layers(block)]

    def new_statistics(self, in_features: int, device: torch.device) -> Seen:
        seen = Seen()
        self.record.held.append(weakref.ref(seen))
        return seen

    def quantize(self, weight: Tensor, statistics: Seen | None = None) -> Int8Weight:
        self.record.layers.append((statistics.inputs, weight.clone()))
        return INT8.quantize(weight)

    def linear(self, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        return INT8.linear(x, weight, bias)


@dataclass(frozen=True, eq=False)
class FloatProbe(Probe):
    """The same on the float model's inputs."""

    prefix: ClassVar[str] = "float"


@torch.no_grad()
def inputs_in_forward(model: nn.Module, names: list[str], tokens: Tensor) -> dict[str, Tensor]:
    """Inputs `[sequences, length, in]` of the modules, in forward passes of the whole model."""
    found = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args[0])
        )
        for name in names
    ]
    for sequence in tokens:
        model(input_ids=sequence[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(inputs) for name, inputs in found.items()}


def quantized_before(model: nn.Module, block: str) -> nn.Module:
    """A copy of `model` whose blocks before `block` are in int8."""
    copied = copy.deepcopy(model)
    names = [name for name, _ in blocks(model)]
    before = tuple(f"{name}." for name in names[: names.index(block)])
    layers = [layer.name for layer in linear_layers(model) if layer.name.startswith(before)]
    if layers:
        quantize_model(copied, dict.fromkeys(layers, INT8))
    return copied


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("probe", [Probe, FloatProbe])
def test_inputs_are_exactly_those_of_a_forward_pass(make, probe):
    model, tokens, record = make(), some_tokens(3, 17), Record()
    original = copy.deepcopy(model)
    quantize_model(model, probe(record), calibration=tokens)
    names = [name for name, _ in blocks(original)]
    layers = [layer.name for layer in linear_layers(original)]
    assert len(record.hidden) == len(names) == 2 and len(record.layers) == len(layers)

    seen = dict(zip(layers, record.layers, strict=True))
    for name, hidden in zip(names, record.hidden, strict=True):
        reference = quantized_before(original, name) if probe is Probe else original
        inside = [layer for layer in layers if layer.startswith(f"{name}.")]
        expected = inputs_in_forward(reference, [name, *inside], tokens)
        assert torch.equal(hidden, expected[name])
        for layer in inside:
            inputs, _ = seen[layer]
            assert [len(x) for x in inputs] == [17, 17, 17]
            assert torch.equal(torch.cat(inputs), expected[layer].flatten(0, 1))


def test_the_two_prefixes_differ_from_the_second_block_on():
    records = [Record(), Record()]
    quantize_model(tiny_gpt2(), Probe(records[0]), calibration=some_tokens())
    quantize_model(tiny_gpt2(), FloatProbe(records[1]), calibration=some_tokens())
    first, second = (torch.equal(a, b) for a, b in zip(*(r.hidden for r in records), strict=True))
    assert first and not second


@pytest.mark.parametrize("probe", [Probe, FloatProbe])
def test_output_errors_are_those_of_the_layer_on_the_inputs_it_was_calibrated_with(probe):
    model, record = tiny_llama(), Record()
    report = quantize_model(model, probe(record), calibration=some_tokens())
    for layer, (inputs, weight) in zip(report.layers, record.layers, strict=True):
        x = torch.cat(inputs)
        y = x @ weight.T
        error = (INT8.linear(x, INT8.quantize(weight), None) - y).square().sum() / y.square().sum()
        assert layer.output_error == pytest.approx(error.item(), rel=1e-4)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_output_errors_that_statistics_tell_are_those_that_are_measured(make, monkeypatch):
    """Without the layers' biases, which GPT-2 has."""
    told = quantize_model(make(), GPTQ(group_size=8), calibration=some_tokens(8, 20))
    monkeypatch.setattr(GPTQ, "output_error", Method.output_error)
    measured = quantize_model(make(), GPTQ(group_size=8), calibration=some_tokens(8, 20))
    for one, other in zip(told.layers, measured.layers, strict=True):
        assert one.output_error == pytest.approx(other.output_error, rel=1e-4)


@dataclass(frozen=True, eq=False)
class Watcher(Probe):
    """A probe that leaves blocks as they are."""

    prepare = Method.prepare


def test_only_layers_of_one_method_share_statistics():
    record = Record()
    model, one, other = tiny_llama(), Watcher(record), Watcher(record)
    attention = "model.layers.0.self_attn"
    methods = {f"{attention}.q_proj": one, f"{attention}.k_proj": other, f"{attention}.v_proj": one}
    quantize_model(model, methods, calibration=some_tokens())
    query, key, value = (inputs for inputs, _ in record.layers)
    assert query is value and query is not key
    assert all(torch.equal(a, b) for a, b in zip(query, key, strict=True))


# What a method may ask of the walk


@dataclass(frozen=True, eq=False)
class AttentionProbe(Probe):
    """Looks at what a whole attention gets and returns, as AWQ does to choose its scales."""

    module: str = "self_attn"
    calls: list = field(default_factory=list)

    def prepare(self, block: nn.Module, inputs: BlockInputs) -> None:
        attention = block.get_submodule(self.module)
        for call in inputs.calls(block, self.module):
            again = attention(*call.args, **call.kwargs)
            outputs = [o[0] if isinstance(o, tuple) else o for o in (call.output, again)]
            self.calls.append((call.args, call.kwargs, *outputs, inputs.sequence))
        assert not attention._forward_hooks


@pytest.mark.parametrize(
    ("make", "module"), [(tiny_llama, "self_attn"), (tiny_gpt2, "attn"), (tiny_llama, "mlp.down_proj")]
)  # fmt: skip
def test_a_method_sees_the_calls_of_any_submodule_by_position_and_by_name(make, module):
    model, probe = make(), AttentionProbe(Record(), module)
    quantize_model(model, probe, calibration=some_tokens(3, 17))
    assert [sequence for *_, sequence in probe.calls] == [1, 2, 3, 1, 2, 3]
    for args, kwargs, output, again, _ in probe.calls:
        assert torch.equal(output, again) and output.shape == (1, 17, 24)
        assert args or "hidden_states" in kwargs
    if module == "self_attn":
        assert all("position_embeddings" in kwargs for _, kwargs, *_ in probe.calls)


def test_calls_hold_no_more_than_one_sequence_and_leave_no_hook():
    model = tiny_llama()
    _, block = blocks(model)[0]
    inputs = BlockInputs.of_first_block(model, some_tokens(4, 17))
    alive = []
    for call in inputs.calls(block, "self_attn"):
        alive.append(weakref.ref(call.output[0]))
        del call
        assert sum(ref() is not None for ref in alive) <= 1
    next(inputs.calls(block, "mlp"))  # and the rest is left
    assert not any(m._forward_hooks for m in block.modules())


@dataclass(frozen=True, eq=False)
class QueriesOtherwise(Probe):
    """One rewriting method that keeps more bits of the queries."""

    n_bits: int = 4

    def for_layer(self, name: str) -> Method:
        return Affine(n_bits=8 if "q_proj" in name else self.n_bits, group_size=8)


def test_a_rewriting_method_may_treat_its_layers_otherwise(tmp_path):
    model, record = tiny_llama(), Record()
    report = quantize_model(model, QueriesOtherwise(record), calibration=some_tokens())
    assert len(record.hidden) == 2 and not record.layers  # it rewrote, and others quantized
    for layer in report.layers:
        assert report.method[layer.name].n_bits == (8 if "q_proj" in layer.name else 4)
        assert model.get_submodule(layer.name).method == report.method[layer.name]
    assert "2 x Affine(n_bits=8" in str(report) and "12 x Affine(n_bits=4" in str(report)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(some_tokens()).logits, model(some_tokens()).logits)


def test_settings_for_a_layer_that_do_not_fit_it_leave_the_model_whole():
    model, record = tiny_llama(), Record()

    class Wide(QueriesOtherwise):
        def for_layer(self, name: str) -> Method:
            return Affine(group_size=16 if "1.mlp.down_proj" in name else 8)

    with pytest.raises(
        ValueError, match=r"1\.mlp\.down_proj: group_size 16 does not divide the 40"
    ):
        quantize_model(model, Wide(record), calibration=some_tokens())
    assert len(linear_layers(model)) == 14 and not record.hidden


@pytest.mark.parametrize("method", [INT8, GPTQ(group_size=8), SmoothQuant()], ids=lambda m: m.name)
def test_what_the_last_block_puts_out_is_not_computed_for_nobody(method, monkeypatch):
    """The inputs moved on through it too; and through blocks behind the last with a layer to quantize."""
    model, moved = tiny_gpt2(), []
    original = BlockInputs.advance

    def advance(self, block: nn.Module) -> None:
        moved.append(block)
        original(self, block)

    monkeypatch.setattr(BlockInputs, "advance", advance)
    whole = quantize_model(model, method, calibration=some_tokens(8, 20))
    assert moved == [model.transformer.h[0]]
    assert all(layer.output_error > 0 for layer in whole.layers)
    first = [la.name for la in whole.layers if ".h.0." in la.name]
    moved.clear()
    part = quantize_model(tiny_gpt2(), dict.fromkeys(first, method), calibration=some_tokens(8, 20))
    assert not moved
    errors = {layer.name: layer.output_error for layer in whole.layers}
    assert all(layer.output_error == errors[layer.name] for layer in part.layers)


class TwiceModel(nn.Module):
    """One block, whose layer `twice` reads what `once` reads, and then what `once` wrote."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.once, self.twice = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, hidden: Tensor) -> Tensor:
            y = self.once(hidden)
            return self.twice(hidden) + self.twice(y)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.blocks = nn.Embedding(99, 16), nn.ModuleList([self.Block()])

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        return self.blocks[0](self.embedding(input_ids))


def test_a_layer_that_runs_twice_shares_no_statistics_with_one_that_runs_once():
    tokens, method = some_tokens(4, 20), GPTQ(group_size=16)
    both = TwiceModel().eval()
    quantize_model(both, method, calibration=tokens)
    for name in ("once", "twice"):
        alone = TwiceModel().eval()
        quantize_model(alone, {f"blocks.0.{name}": method}, calibration=tokens)
        expected = alone.get_submodule(f"blocks.0.{name}").quantized_weight
        found = both.get_submodule(f"blocks.0.{name}").quantized_weight
        assert torch.equal(found.codes, expected.codes)


def test_methods_that_look_at_no_inputs_are_measured_on_the_float_model():
    tokens, record = some_tokens(), Record()
    by_probe = quantize_model(tiny_gpt2(), FloatProbe(record), calibration=tokens)
    plain = quantize_model(tiny_gpt2(), INT8, calibration=tokens)
    assert [r.output_error for r in plain.layers] == [r.output_error for r in by_probe.layers]


def test_a_mapping_calibrates_the_layers_it_names_in_their_blocks():
    model, tokens, record = tiny_gpt2(), some_tokens(), Record()
    name = "transformer.h.1.mlp.c_proj"
    expected = inputs_in_forward(model, ["transformer.h.1", name], tokens)
    quantize_model(model, {name: Probe(record)}, calibration=tokens)
    [(inputs, _)], [hidden] = record.layers, record.hidden
    assert torch.equal(torch.cat(inputs), expected[name].flatten(0, 1))
    assert torch.equal(hidden, expected["transformer.h.1"])


class Wrapping(nn.Module):
    """A model whose block returns what `wrap` makes of its hidden states."""

    def __init__(self, wrap):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.blocks = nn.Embedding(99, 24), nn.ModuleList([nn.Module()])
        self.blocks[0].proj = nn.Linear(24, 24)
        self.blocks[0].forward = lambda hidden: wrap(self.blocks[0].proj(hidden))

    def forward(self, input_ids, use_cache=False):
        return self.blocks[0](self.embedding(input_ids))


@pytest.mark.parametrize("wrap", [lambda h: (h, None), lambda h: [h]])
def test_blocks_may_return_a_tensor_a_tuple_or_a_list(wrap):
    """GPT-2's return a tuple in transformers 4.57, and a tensor in 5; GPT-1's return a list."""
    plain, wrapped = (
        quantize_model(Wrapping(w).eval(), Probe(Record()), calibration=some_tokens())
        for w in (lambda h: h, wrap)
    )
    assert [layer.output_error for layer in wrapped.layers] == [
        layer.output_error for layer in plain.layers
    ]


def test_blocks_that_return_no_hidden_states_are_refused():
    model = Wrapping(lambda h: {"hidden": h}).eval()
    with pytest.raises(ValueError, match="a block returned a dict: hidden states are a tensor"):
        quantize_model(model, Probe(Record()), calibration=some_tokens())
    assert len(linear_layers(model)) == 1


@pytest.mark.parametrize("probe", [Probe, FloatProbe])
def test_no_more_than_one_block_is_held(probe):
    """When the next block begins, float layers and statistics of the one before are gone.

    Of seven layers three read one tensor, and two another: they share their statistics.
    """
    record = Record()
    quantize_model(tiny_llama(), probe(record), calibration=some_tokens())
    assert record.alive == [0, 0] and len(record.held) == 2 * (7 + 4)


def test_half_precision_is_kept():
    model, record = tiny_llama().half(), Record()
    quantize_model(model, Probe(record), calibration=some_tokens())
    assert all(hidden.dtype == torch.float16 for hidden in record.hidden)


def test_the_model_keeps_no_hook_and_no_cache():
    model = tiny_gpt2()
    quantize_model(model, Probe(Record()), calibration=some_tokens())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.config.use_cache


# A run that was cut off


class PlugPulled(Exception):
    """What stops the runs below."""


def stop_at_layer(number: int, monkeypatch, method: type) -> None:
    """Let the `number`-th layer that is quantized from now on raise `PlugPulled`."""
    original, calls = method.quantize, itertools.count(1)

    def quantize(self, *args):
        if next(calls) == number:
            raise PlugPulled
        return original(self, *args)

    monkeypatch.setattr(method, "quantize", quantize)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize(
    "method",
    [GPTQ(group_size=8, act_order=True), SmoothQuant(), Affine(group_size="row", inputs="static")],
    ids=lambda method: method.name,
)
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(make, method, tmp_path, monkeypatch):
    tokens, whole = some_tokens(3, 17), make()
    expected = quantize_model(whole, method, calibration=tokens)
    layers = len(expected.layers)
    with monkeypatch.context() as patch:
        stop_at_layer(layers, patch, type(method))  # the very last one
        with pytest.raises(PlugPulled):
            quantize_model(make(), method, calibration=tokens, checkpoint=tmp_path / "new" / "run")
    resumed = make()
    with monkeypatch.context() as patch:
        stop_at_layer(layers // 2 + 1, patch, type(method))  # those of the first block are there
        report = quantize_model(
            resumed, method, calibration=tokens, checkpoint=tmp_path / "new" / "run"
        )
    assert all(
        replace(one, seconds=0) == replace(other, seconds=0)
        for one, other in zip(report.layers, expected.layers, strict=True)
    )
    state, resumed_state = whole.state_dict(), resumed.state_dict()
    assert state.keys() == resumed_state.keys()
    assert all(torch.equal(state[name], resumed_state[name]) for name in state)
    resumed.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, whole(tokens).logits)


@pytest.mark.parametrize("other", ["model", "method", "tokens"])
def test_blocks_of_another_run_are_refused(other, tmp_path):
    method, tokens = GPTQ(group_size=8), some_tokens(3, 17)
    quantize_model(tiny_llama(), method, calibration=tokens, checkpoint=tmp_path)
    model = tiny_llama(seed=1 if other == "model" else 0)
    method = GPTQ(group_size=8, n_bits=3) if other == "method" else method
    tokens = some_tokens(3, 17, seed=1) if other == "tokens" else tokens
    with pytest.raises(ValueError, match=r"holds blocks of another run: .* an empty folder"):
        quantize_model(model, method, calibration=tokens, checkpoint=tmp_path)


def test_blocks_of_another_configuration_are_refused(tmp_path):
    """Its weights are the same, and so nothing but the configuration tells."""
    method, tokens = GPTQ(group_size=8), some_tokens(3, 17)
    quantize_model(tiny_llama(), method, calibration=tokens, checkpoint=tmp_path)
    model = tiny_llama()
    model.config.rms_norm_eps *= 10
    with pytest.raises(ValueError, match="holds blocks of another run"):
        quantize_model(model, method, calibration=tokens, checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"model": 1}, "model"), ({"bits": 3}, "methods and settings"), ({"tokens": 1}, "calibration"),
        ({"bits": 3, "tokens": 1}, "methods and settings, calibration"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_differs(other, named, tmp_path):
    tokens = some_tokens(3, 17)
    quantize_model(tiny_llama(), GPTQ(group_size=8), calibration=tokens, checkpoint=tmp_path)
    method = GPTQ(group_size=8, n_bits=other.get("bits", 4))
    tokens = some_tokens(3, 17, seed=other.get("tokens", 0))
    with pytest.raises(ValueError, match=rf"another run: it differs in {named}\. Give"):
        model = tiny_llama(seed=other.get("model", 0))
        quantize_model(model, method, calibration=tokens, checkpoint=tmp_path)


@pytest.mark.parametrize("file", ["quantizers/gptq.py", "compression/compensation.py"])
def test_a_checkpoint_of_other_code_is_refused(file, tmp_path, monkeypatch):
    """It went on, with blocks that this code would not have made."""
    method, tokens = GPTQ(group_size=8), some_tokens(3, 17)
    quantize_model(tiny_llama(), method, calibration=tokens, checkpoint=tmp_path)
    read = Path.read_text

    def changed(self: Path, *args, **kwargs) -> str:
        text = read(self, *args, **kwargs)
        return f"{text}\nx = 1" if self.as_posix().endswith(file) else text

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", changed)
        with pytest.raises(ValueError, match=r"it differs in code of course_utils\. Give"):
            quantize_model(tiny_llama(), method, calibration=tokens, checkpoint=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("course_utils.compression.checkpoint.version", lambda name: f"{name} 0.1")
        with pytest.raises(ValueError, match=r"it differs in torch, transformers\. Give"):
            quantize_model(tiny_llama(), method, calibration=tokens, checkpoint=tmp_path)
    quantize_model(tiny_llama(), method, calibration=tokens, checkpoint=tmp_path)


@pytest.mark.parametrize("name", ["progress", "model.layers.1"])
def test_an_altered_byte_of_a_checkpoint_is_noticed(name, tmp_path):
    """It was once loaded as it was, and then signed as right when the model was saved."""
    method, tokens = GPTQ(group_size=8), some_tokens(3, 17)
    quantize_model(tiny_llama(), method, calibration=tokens, checkpoint=tmp_path)
    file = tmp_path / f"{name}.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}\.safetensors .*not those that were written"):
        quantize_model(tiny_llama(), method, calibration=tokens, checkpoint=tmp_path)


def test_an_altered_setting_of_a_checkpoint_is_noticed(tmp_path):
    """The same codes with other bits are another weight."""
    method, tokens = GPTQ(group_size=8), some_tokens(3, 17)
    quantize_model(tiny_llama(), method, calibration=tokens, checkpoint=tmp_path)
    file = tmp_path / "model.layers.1.safetensors"
    content = file.read_bytes()
    altered = content.replace(b'n_bits\\": 4', b'n_bits\\": 8')
    assert altered != content
    file.write_bytes(altered)
    with pytest.raises(ValueError, match=r"layers\.1\.safetensors .*not those that were written"):
        quantize_model(tiny_llama(), method, calibration=tokens, checkpoint=tmp_path)


@pytest.mark.parametrize("name", ["progress", "model.layers.1"])
def test_a_damaged_checkpoint_is_refused(name, tmp_path):
    method, tokens = GPTQ(group_size=8), some_tokens(3, 17)
    quantize_model(tiny_llama(), method, calibration=tokens, checkpoint=tmp_path)
    file = tmp_path / f"{name}.safetensors"
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], content[:4], b""):
        file.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=rf"{name}\.safetensors cannot be read .*an empty folder"
        ):
            quantize_model(tiny_llama(), method, calibration=tokens, checkpoint=tmp_path)
    file.write_bytes(content)
    quantize_model(tiny_llama(), method, calibration=tokens, checkpoint=tmp_path)


def test_a_checkpoint_without_calibration_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"checkpoint '.*' without calibration: .*Give calibration="
    ):
        quantize_model(tiny_gpt2(), INT8, checkpoint=tmp_path)
    assert not list(tmp_path.iterdir())


# Memory

LIMITED = """
import resource, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from course_utils.models import blocks
from course_utils.compression import get_method, quantize_model
from course_utils.compression.hessian import Hessian

torch.set_num_threads(1)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=99, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
)
models = [LlamaForCausalLM(config).eval() for _ in range(2)]
tokens = torch.randint(0, 99, (64, 128))
method = get_method("gptq", group_size=64)
# Once without a limit, so that all libraries have what they need.
quantize_model(models.pop(), method, calibration=tokens[:2])

[model] = models
_, block = blocks(model)[0]
activations = 4 * tokens.numel() * 256
largest = 8 * 512**2
statistics = 8 * 3 * 256**2 + largest  # of queries, keys, values together; of gate and up together
weights = sum(4 * p.numel() for p in block.parameters())
with open("/proc/self/status") as file:
    used = next(1024 * int(line.split()[1]) for line in file if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + int({room}), resource.RLIM_INFINITY))
kept, update = [], Hessian.update
if {careless}:
    Hessian.update = lambda self, x: (kept.append(x), update(self, x))
quantize_model(model, method, calibration=tokens)
print("done")
"""


def run_limited(room: str, careless: bool = False) -> subprocess.CompletedProcess:
    """Quantize four blocks with so much memory beside the float model; `careless`: and keep what was seen."""
    # glibc: one arena, and what is freed goes back at once, so that none of it hides what is taken.
    arenas = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | arenas
    script = LIMITED.replace("{room}", room).replace("{careless}", str(careless))
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts all memory on Linux only")
def test_memory_stays_within_one_blocks_activations_statistics_and_weights():
    """Beside the float model. Hessians are float64, and solving takes up to five more of the largest."""
    room = "1.1 * activations + statistics + 5 * largest + 2 * weights"
    enough = run_limited(room)
    assert enough.stdout == "done\n", enough.stderr
    for too_much in (run_limited("0.9 * activations"), run_limited(room, careless=True)):
        assert "can't allocate memory" in too_much.stderr and not too_much.stdout


# What is refused


def test_a_method_that_looks_at_inputs_needs_calibration():
    model = tiny_gpt2()
    with pytest.raises(
        ValueError, match=r"layer transformer\.h\.0\.attn\.c_attn: Probe.*calibration="
    ):
        quantize_model(model, Probe(Record()))
    assert len(linear_layers(model)) == 8


@pytest.mark.parametrize("shape", [(0, 8), (2, 0), (8,)])
def test_empty_calibration_is_refused(shape):
    with pytest.raises(ValueError, match=r"\[sequences, length\] token ids, got torch\.int64"):
        tokens = torch.zeros(shape, dtype=torch.int64)
        quantize_model(tiny_gpt2(), Probe(Record()), calibration=tokens)


@pytest.mark.parametrize("method", [INT8, Probe(Record())])
def test_nan_inputs_name_the_first_layer_that_gets_them_and_the_sequence(method):
    model, tokens = tiny_gpt2(), some_tokens(3, 20)
    tokens[tokens == 98] = 0
    tokens[1, 4:] = 98  # in the second sequence only
    model.transformer.wte.weight.data[98] = float("nan")
    layer = r"layer transformer\.h\.0\.attn\.c_attn: 384 of its 480 inputs are NaN"
    message = layer + r".*float32 on calibration sequence 2\. Repair"
    with pytest.raises(ValueError, match=message):
        quantize_model(model, method, calibration=tokens)
    assert not any(m._forward_hooks for m in model.modules())


def test_progress_is_shown_if_it_is_asked_for(capfd):
    quantize_model(tiny_gpt2(), INT8, calibration=some_tokens())
    assert not capfd.readouterr().err
    quantize_model(tiny_gpt2(), INT8, calibration=some_tokens(), progress=True)
    assert "blocks: 100%" in (told := capfd.readouterr().err) and "2/2" in told


def test_settings_that_do_not_fit_a_later_layer_leave_the_model_whole():
    """They were once found only when the walk came to that layer, after the blocks before it."""
    model = tiny_llama()
    names = [layer.name for layer in linear_layers(model)]
    methods = {name: GPTQ(group_size=12) for name in names if "layers.0.mlp.down" not in name}
    methods[names[-1]] = GPTQ(group_size=12)  # 40 columns
    down = r"layer model\.layers\.1\.mlp\.down_proj: group_size 12 does not divide the 40"
    with pytest.raises(ValueError, match=down):
        quantize_model(model, methods, calibration=some_tokens(8, 20))
    assert [layer.name for layer in linear_layers(model)] == names


def test_calibration_that_the_model_cannot_read_is_refused():
    with pytest.raises(ValueError, match=r"sequences of 33 tokens, but the model has 32 positions"):
        quantize_model(tiny_gpt2(), INT8, calibration=some_tokens(2, 33))
    for wrong in (99, -1):
        tokens = some_tokens()
        tokens[1, 3] = wrong
        with pytest.raises(ValueError, match=rf"token id {wrong} in the .* has ids 0 to 98: take"):
            quantize_model(tiny_gpt2(), INT8, calibration=tokens)


def test_a_layer_outside_the_blocks_is_refused_not_skipped():
    model = tiny_gpt2()
    model.transformer.projection = Conv1D(24, 24)
    with pytest.raises(
        ValueError, match=r"in none of the decoder blocks.*: transformer\.projection"
    ):
        quantize_model(model, INT8, calibration=some_tokens())
    assert len(linear_layers(model)) == 9
    inside = [layer.name for layer in linear_layers(model) if "projection" not in layer.name]
    quantize_model(model, dict.fromkeys(inside, INT8), calibration=some_tokens())
    assert [layer.name for layer in linear_layers(model)] == ["transformer.projection"]


def test_methods_with_different_prefixes_are_refused_together():
    c_fc, c_proj = "transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_proj"
    with pytest.raises(ValueError, match=r"cannot be calibrated in one pass.*FloatProbe"):
        methods = {c_fc: Probe(Record()), c_proj: FloatProbe(Record())}
        quantize_model(tiny_gpt2(), methods, calibration=some_tokens())


def test_two_methods_that_rewrite_one_block_are_refused():
    c_fc, c_proj = "transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"
    with pytest.raises(ValueError, match=r"block transformer\.h\.1 would be rewritten by several"):
        methods = {c_fc: Probe(Record()), c_proj: Probe(Record())}
        quantize_model(tiny_gpt2(), methods, calibration=some_tokens())


def test_models_without_one_list_of_like_blocks_are_refused():
    with pytest.raises(ValueError, match=r"Sequential holds 0 lists of modules"):
        quantize_model(nn.Sequential(nn.Linear(4, 4)).eval(), INT8, calibration=some_tokens())
    model = tiny_llama()
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match=r"several kinds \(full_attention, sliding_attention\)"):
        blocks(model)
    two_lists = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(4, 4)]), "b": nn.ModuleList()})
    with pytest.raises(ValueError, match=r"holds 2 lists of modules \(a, b\)"):
        blocks(two_lists)


def test_a_method_that_needs_no_inputs_takes_any_model():
    model = nn.Sequential(nn.Linear(8, 4))
    assert quantize_model(model, get_method("llm_int8")).weights == 32
