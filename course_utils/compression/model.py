"""Quantizing a whole model."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm.std import tqdm

from course_utils.compression.base import LayerReport, Method, check_weight
from course_utils.compression.checks import check_reads, check_replaceable, checked_calibration
from course_utils.compression.driver import naming, quantize_blocks, quantize_layer
from course_utils.compression.embedding import check_embeddings, quantize_embeddings
from course_utils.compression.saving import mark_quantized
from course_utils.evaluation import tensor_bytes
from course_utils.models.walk import linear_layers, replace_module

NOTABLE = 0.1  # share of the blocks' weights that stay float, from which on the report says so


@dataclass(frozen=True)
class FloatPart:
    """What stays float under one name, the numbers of blocks in it written as `*`."""

    name: str
    nbytes: int
    share: float  # of all bytes of the model, once quantized
    weights: int  # entries of matrices within blocks; 0 for embeddings, head, norms and biases


@dataclass(frozen=True)
class Report:
    """What `quantize_model` did, and what stays float, the largest part first."""

    method: Method | Mapping[str, Method]
    layers: list[LayerReport]
    # the embedding and, where it is not tied, the LM head, if they were asked for; not in the sums below
    embeddings: list[LayerReport] = field(default_factory=list)
    float_parts: list[FloatPart] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all quantized weights."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def weights(self) -> int:
        """Number of weights quantized."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Measured bits per quantized weight, over all layers."""
        return 8 * self.nbytes / self.weights

    @property
    def blocks_float_share(self) -> float:
        """Share of the weights of all blocks (matrices, and stacks of them) that stays float."""
        left = sum(part.weights for part in self.float_parts)
        return left / (left + self.weights)

    @property
    def seconds(self) -> float:
        return sum(layer.seconds for layer in self.layers)

    def __str__(self) -> str:
        method = self.method
        if isinstance(method, Mapping):
            method = ", ".join(f"{n} x {m}" for m, n in Counter(method.values()).items())
        errors = [layer.output_error for layer in self.layers if layer.output_error is not None]
        output = f", output error up to {max(errors):.1e}" if errors else ""
        if errors and (unmeasured := len(self.layers) - len(errors)):
            output += f" ({unmeasured} layers never ran: not measured)"
        if self.embeddings:
            output += f", embeddings in {sum(e.nbytes for e in self.embeddings):,} bytes"
        largest = ", ".join(f"{part.name} {part.share:.1%}" for part in self.float_parts[:3])
        share = sum(part.share for part in self.float_parts)
        left = f"\nfloat stay {share:.1%} of the bytes: {largest}" if self.float_parts else ""
        if len(self.float_parts) > 3:
            left += f", {len(self.float_parts) - 3} more"
        if self.blocks_float_share > NOTABLE:
            left += f"\n{self.blocks_float_share:.0%} of the blocks' weights stay float"
            parts = [part.name for part in self.float_parts if part.weights]
            left += f": {', '.join(parts)}"
        return (
            f"{method}: {len(self.layers)} layers, {self.weights:,} weights in {self.nbytes:,} bytes "
            f"= {self.bits_per_weight:.3f} bits per weight{output}, {self.seconds:.1f} s{left}"
        )


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    method: Method | Mapping[str, Method],
    *,
    calibration: Tensor | None = None,
    embeddings: Literal["int8"] | None = None,
    checkpoint: Path | str | None = None,
    progress: bool = False,
) -> Report:
    """Replace the linear layers of `model`, in place, by `QuantizedLinear`; returns the report.

    All of them by one `method`, or those that a mapping names, each by its own; layers that it does not
    name stay float. So do embedding and LM head, unless `embeddings` is "int8": then both become rows of
    int8 codes when all layers are done, tied ones once (`compression.embedding`). With `calibration`
    `[sequences, length]` token ids, layers are quantized block by block (`driver.quantize_blocks`), and the
    report holds each layer's relative output error. Each block that is finished goes into the folder
    `checkpoint` if one is given, and the same call takes those that it holds from there: it goes on where
    it was stopped. The result is saved by `model.save_pretrained` and loaded by `from_pretrained`, packed.

    Raises `ValueError` or `TypeError` for weights that no method takes or that its settings do not fit
    (groups that do not divide the columns), for calibration that the model cannot read, for names that
    are no float linear layer of the model, for a layer that stands in two places, carries hooks, or whose
    weight is computed, offloaded or read by other code, for a method that looks at inputs without
    calibration, and for a model that does not run block by block (`compression.checks`); the model is whole
    then. Should something be wrong first in a
    later block (NaN in its inputs), the blocks before are quantized already: load the model again.
    """
    if embeddings not in (None, "int8"):
        raise ValueError(f"embeddings {embeddings!r}: choose 'int8', or None to leave them float")
    methods = _by_layer(model, method)
    if embeddings:
        check_embeddings(model)
    if checkpoint is not None and calibration is None:
        raise ValueError(
            f"checkpoint {str(checkpoint)!r} without calibration: blocks are kept one by one only where "
            "the model is walked block by block. Give calibration= too, or leave checkpoint out."
        )
    if calibration is None:
        reports = _quantize_layers(model, methods, progress=progress)
    else:
        calibration = checked_calibration(model, calibration)
        folder = None if checkpoint is None else Path(checkpoint)
        reports = quantize_blocks(model, methods, calibration, checkpoint=folder, progress=progress)
    embedding_reports = quantize_embeddings(model) if embeddings else []
    mark_quantized(model)
    used = {report.name: model.get_submodule(report.name).method for report in reports}
    return Report(
        method if all(m == method for m in used.values()) else used,
        reports,
        embedding_reports,
        float_parts(model),
    )


def float_parts(model: nn.Module) -> list[FloatPart]:
    """The float parameters of a quantized `model`, alike ones of all blocks together; tied ones once."""
    total = tensor_bytes(model)
    nbytes: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        nbytes[pattern] += parameter.nbytes
        weights[pattern] += parameter.numel() if "*" in pattern and parameter.ndim > 1 else 0
    return [FloatPart(name, n, n / total, weights[name]) for name, n in nbytes.most_common()]


def _by_layer(model: nn.Module, method: Method | Mapping[str, Method]) -> Mapping[str, Method]:
    """The method of each layer that is to be quantized, by its name; their weights are sound."""
    layers = {layer.name: layer for layer in linear_layers(model)}
    if not layers:
        raise ValueError("the model has no float linear layer left: is it quantized already?")
    methods = dict.fromkeys(layers, method) if isinstance(method, Method) else method
    if not methods:
        raise ValueError("the mapping of layers to methods is empty: name at least one layer.")
    names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, chosen in methods.items():
        if head is not None and name in names.get(head, ()):
            raise ValueError(
                f"{name} is the LM head, which stays float as in the methods' papers, and in many models is "
                "the embedding as well: leave it out of the mapping."
            )
        if name not in layers:
            near = get_close_matches(name, layers, cutoff=0)
            raise ValueError(
                f"the model has no float linear layer {name!r}. Near are {', '.join(near)}; "
                "linear_layers(model) lists all."
            )
        if not isinstance(chosen, Method):
            raise TypeError(f"layer {name} is mapped to {chosen!r}, which is no method.")
        if len(shared := names[layers[name].module]) > 1:
            raise ValueError(
                f"{' and '.join(shared)} are one module: only the first would be quantized. Give each place "
                "a copy of its own, or take a mapping that does not name it."
            )
        with naming(f"layer {name}"):
            check_replaceable(layers[name])
            check_weight(layers[name].weight)
            chosen.for_layer(name).check_shape(*layers[name].weight.shape)
    return methods


def _quantize_layers(
    model: nn.Module, methods: Mapping[str, Method], *, progress: bool
) -> list[LayerReport]:
    """Replace the layers without looking at any inputs; all of them, or none if one is refused."""
    for name, method in methods.items():
        if method.needs_calibration or method.for_layer(name).needs_calibration:
            raise ValueError(
                f"layer {name}: {method} looks at the layer's inputs. Give quantize_model "
                "calibration=calibration_tokens(tokenizer, sequences, length)."
            )
    layers = [layer for layer in linear_layers(model) if layer.name in methods]
    check_reads(model, layers)
    quantized = [
        quantize_layer(layer, methods[layer.name])
        for layer in tqdm(layers, disable=not progress, desc="layers")
    ]
    for module, report in quantized:
        replace_module(model, report.name, module)
    return [report for _, report in quantized]
