"""Quantizing block by block, so that a method sees the inputs that it asks for.

A decoder block's inputs on the calibration sequences are kept, and nothing else of what the model
computes on the way. From them the block's linear layers get their statistics, and the layers become
quantized ones; then the inputs move on through the block, to those of the next. Which form of the block
they pass, the float one or the quantized one, is the method's `prefix`. So memory holds the model, and
of a single block its activations, its statistics, and its weights in both forms.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm.std import tqdm

from course_utils.compression.base import (
    LayerReport,
    Method,
    QuantizedLinear,
    Statistics,
    all_finite,
)
from course_utils.compression.checkpoint import Checkpoint
from course_utils.compression.checks import (
    check_calibrated,
    check_unshared,
    checked_calibration,
)
from course_utils.models.walk import (
    BlockInputs,
    LinearLayer,
    blocks,
    layer_input,
    linear_layers,
    replace_module,
)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Let errors about values say of `what` they speak."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"{what}: {error}") from error


def quantize_layer(
    layer: LinearLayer, method: Method, statistics: Statistics | None = None
) -> tuple[QuantizedLinear, LayerReport]:
    """The layer that takes the place of `layer`, and its report, with an output error if statistics tell.

    `method` is the one that was asked for: the layer gets `method.for_layer`.
    """
    method = method.for_layer(layer.name)
    start = time.perf_counter()
    with naming(f"layer {layer.name}"):
        weight = method.quantize(layer.weight, statistics)
    seconds = time.perf_counter() - start
    decoded = weight.dequantize()
    error = _Error()
    error.add(layer.weight, decoded)
    report = LayerReport(
        layer.name,
        weight.shape,
        weight.bits_per_weight,
        weight.nbytes,
        error.relative,
        None if statistics is None else method.output_error(layer.weight, decoded, statistics),
        seconds,
    )
    return QuantizedLinear(method, weight, layer.bias), report


@torch.no_grad()
def gather(
    block: nn.Module, inputs: BlockInputs, statistics: Mapping[LinearLayer, Statistics]
) -> None:
    """Run `block` on its `inputs`; the inputs `[tokens, in]` of each layer go to its statistics.

    Raises `ValueError` with the layer's name where they are NaN or infinite.
    """
    updates = {layer: lambda x, _, s=s: s.update(x) for layer, s in statistics.items()}
    with _watched(inputs, updates):
        for _ in inputs.outputs(block):
            pass


@torch.no_grad()
def quantize_blocks(
    model: nn.Module,
    methods: Mapping[str, Method],
    tokens: Tensor,
    *,
    checkpoint: Path | None = None,
    progress: bool = False,
) -> list[LayerReport]:
    """Replace the linear layers of `model` that `methods` names, block by block; reports in order.

    `tokens` `[sequences, length]` are the calibration. Output errors are measured on the inputs that the
    statistics come from: those of the float model, or of the model quantized up to this block; where
    no method looks at inputs, those of the float model. Blocks that the folder `checkpoint` holds are
    taken from there, and it gets the others. Raises `ValueError` if a layer lies in no block, if methods
    ask for what cannot be had together, or if the folder's blocks are of another run.
    """
    prefix = _prefix(methods)
    last = _check_blocks(model, methods, tokens)
    inputs = BlockInputs.of_first_block(model, tokens)
    kept = Checkpoint.of_run(checkpoint, model, methods, tokens) if checkpoint else None
    finished = kept.finished(inputs) if kept else 0
    reports = []
    for number, (name, block) in enumerate(
        tqdm(blocks(model)[: last + 1], disable=not progress, desc="blocks")
    ):
        if number < finished:
            reports += kept.restore(name, block)
            continue
        advance = None if number == last else prefix
        new = _quantize_block(name, block, methods, inputs, advance)
        if kept:
            kept.save(name, block, new, number + 1, inputs)
        reports += new
    return reports


@torch.no_grad()
def prepare_model(model: nn.Module, method: Method, calibration: Tensor) -> None:
    """Rewrite every block of `model` in place as `method` prepares it, and quantize nothing.

    The float function stays as it is, so that another method can quantize the model then, as
    `quantize_model(model, GPTQ(), ...)` after `prepare_model(model, AWQ(), calibration)`. `calibration`
    `[sequences, length]` are token ids. Raises `ValueError` for a model or block that `method` cannot
    rewrite, before any is touched.
    """
    if not method.rewrites_blocks:
        raise ValueError(f"{method} rewrites no blocks: there is nothing to prepare.")
    tokens = checked_calibration(model, calibration)
    _check_blocks(model, {layer.name: method for layer in linear_layers(model)}, tokens)
    inputs = BlockInputs.of_first_block(model, tokens)
    for name, block in blocks(model):
        with naming(f"block {name}"):
            method.prepare(block, inputs)
        inputs.advance(block)


def _quantize_block(
    name: str,
    block: nn.Module,
    methods: Mapping[str, Method],
    inputs: BlockInputs,
    advance: Literal["quantized", "float"] | None,
) -> list[LayerReport]:
    """Replace the layers of one block; `inputs` become those of the next, by the block in that form."""
    own = _own(name, block, methods)
    if method := _rewriting(name, own):
        with naming(f"block {name}"):
            method.prepare(block, inputs)
    statistics = _statistics(block, inputs, own)
    quantized = {
        layer: quantize_layer(layer, method, statistics.get(layer)) for layer, method in own.items()
    }
    reports = _output_errors(block, inputs, quantized, advance=advance == "float")
    for layer, (module, _) in quantized.items():
        replace_module(block, layer.name.removeprefix(f"{name}."), module)
    if advance == "quantized":
        inputs.advance(block)
    return reports


def _statistics(
    block: nn.Module, inputs: BlockInputs, own: Mapping[LinearLayer, Method]
) -> dict[LinearLayer, Statistics]:
    """The statistics that the methods want of their layers' inputs.

    Layers that read the same tensor, as queries, keys and values do, have one together if their
    method is the same.
    """
    own = {layer: method.for_layer(layer.name) for layer, method in own.items()}
    wanting = [layer for layer, method in own.items() if method.wants_statistics]
    statistics: dict[LinearLayer, Statistics] = {}
    if not wanting:
        return statistics
    to_gather = {}
    for layers in _reading_the_same(block, inputs, wanting):
        of_method: dict[Method, Statistics] = {}
        for layer in layers:
            method = own[layer]
            if method not in of_method:
                columns, device = layer.weight.shape[1], layer.weight.device
                of_method[method] = to_gather[layer] = method.new_statistics(columns, device)
            statistics[layer] = of_method[method]
    gather(block, inputs, to_gather)
    return statistics


def _reading_the_same(
    block: nn.Module, inputs: BlockInputs, layers: list[LinearLayer]
) -> list[list[LinearLayer]]:
    """The layers in groups whose input is one tensor, as running the first sequence shows."""
    read: dict[LinearLayer, list[Tensor]] = {layer: [] for layer in layers}
    handles = [
        layer.module.register_forward_pre_hook(
            lambda _, args, kwargs, of=tensors: of.append(layer_input(args, kwargs)),
            with_kwargs=True,
        )
        for layer, tensors in read.items()
    ]
    try:
        next(inputs.outputs(block))
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple, list[LinearLayer]] = {}
    for layer, tensors in read.items():
        same = tuple(map(id, tensors)) or (layer,)  # what did not run now shares with none
        groups.setdefault(same, []).append(layer)
    return list(groups.values())


def _own(name: str, block: nn.Module, methods: Mapping[str, Method]) -> dict[LinearLayer, Method]:
    """The layers of the block `name` that are to be quantized, under their names in the model."""
    layers = [LinearLayer(f"{name}.{layer.name}", layer.module) for layer in linear_layers(block)]
    return {layer: methods[layer.name] for layer in layers if layer.name in methods}


def _check_blocks(model: nn.Module, methods: Mapping[str, Method], tokens: Tensor) -> int:
    """Refuse now what would fail halfway through, or be passed over; returns the last block to quantize."""
    layers: dict[LinearLayer, Method] = {}
    last = 0
    for number, (name, block) in enumerate(blocks(model)):
        own = _own(name, block, methods)
        if method := _rewriting(name, own):
            check_unshared(name, block, model)
            with naming(f"block {name}"):
                method.check_block(block)
        layers |= own
        last = number if own else last
    inside = {layer.name for layer in layers}
    if outside := [name for name in methods if name not in inside]:
        raise ValueError(
            "these layers lie in none of the decoder blocks, so no calibration reaches them: "
            f"{', '.join(outside)}. Name the layers to quantize in a mapping, without these."
        )
    wanting = [
        layer for layer, asked in layers.items() if asked.for_layer(layer.name).wants_statistics
    ]
    check_calibrated(model, tokens, list(layers), wanting)
    return last


def _prefix(methods: Mapping[str, Method]) -> Literal["quantized", "float"]:
    """The prefix that the methods agree on; the float one if they look at no inputs."""
    wanted = {
        method.prefix: method
        for name, asked in methods.items()
        for method in (asked, asked.for_layer(name))
        if method.needs_calibration
    }
    if len(wanted) > 1:
        raise ValueError(
            "these methods cannot be calibrated in one pass, since the blocks before are float for one and "
            f"quantized for the other: {', '.join(map(str, wanted.values()))}. Take one of them."
        )
    return next(iter(wanted), "float")


def _rewriting(block: str, methods: Mapping[LinearLayer, Method]) -> Method | None:
    """The method that rewrites this block, if there is one."""
    found = dict.fromkeys(method for method in methods.values() if method.rewrites_blocks)
    if len(found) > 1:
        raise ValueError(
            f"block {block} would be rewritten by several methods: {', '.join(map(str, found))}. "
            "Give its layers one of them."
        )
    return next(iter(found), None)


def _output_errors(
    block: nn.Module,
    inputs: BlockInputs,
    quantized: Mapping[LinearLayer, tuple[QuantizedLinear, LayerReport]],
    *,
    advance: bool,
) -> list[LayerReport]:
    """The reports, all with output errors; `advance`: and the inputs become those of the next block."""
    errors = {
        layer: _Error() for layer, (_, report) in quantized.items() if report.output_error is None
    }

    def compare(layer: LinearLayer) -> Callable[[Tensor, Tensor], None]:
        module, _ = quantized[layer]
        bias = 0 if layer.bias is None else layer.bias
        return lambda x, y: errors[layer].add(y - bias, module(x) - bias)

    with _watched(inputs, {layer: compare(layer) for layer in errors}):
        if advance:
            inputs.advance(block)
        elif errors:
            for _ in inputs.outputs(block):
                pass
    return [
        replace(report, output_error=errors[layer].relative) if layer in errors else report
        for layer, (_, report) in quantized.items()
    ]


@contextmanager
def _watched(
    inputs: BlockInputs, watchers: Mapping[LinearLayer, Callable[[Tensor, Tensor], None]]
) -> Iterator[None]:
    """While this is open, a layer's watcher gets its inputs `[tokens, in]` and outputs, each time it runs."""

    def hook_for(layer: LinearLayer, watch: Callable[[Tensor, Tensor], None]) -> Callable:
        def hook(_, args: tuple, kwargs: dict, output: Tensor):
            x = layer_input(args, kwargs)
            if not all_finite(x):
                raise ValueError(
                    f"layer {layer.name}: {int((~x.isfinite()).sum())} of its {x.numel()} inputs are NaN or "
                    f"infinite in {x.dtype} on calibration sequence {inputs.sequence}. Repair the "
                    "checkpoint, or load the model in a wider dtype."
                )
            if x.numel():
                watch(x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1]))

        return hook

    handles = [
        layer.module.register_forward_hook(hook_for(layer, watch), with_kwargs=True)
        for layer, watch in watchers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Error:
    """Relative squared error, summed up over parts."""

    def __init__(self):
        self.difference = self.power = 0.0
        self.measured = False

    def add(self, exact: Tensor, approximate: Tensor) -> None:
        self.measured = True
        self.difference += _sum_of_squares(exact.float() - approximate.float())
        self.power += _sum_of_squares(exact)

    @property
    def relative(self) -> float | None:
        """|exact - approximate|^2 / |exact|^2; 0 where all that is exact is zero, None if there was none."""
        if not self.measured:
            return None
        return self.difference / self.power if self.power else 0.0


def _sum_of_squares(x: Tensor) -> float:
    """In float64, since the square of a large weight may be too large for float32."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2
