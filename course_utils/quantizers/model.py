"""Quantizing a whole model, layer by layer."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.std import tqdm

from course_utils.models.walk import linear_layers, replace_module
from course_utils.quantizers.base import Method, QuantizedLinear
from course_utils.quantizers.saving import mark_quantized


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer."""

    name: str
    shape: tuple[int, int]
    bits_per_weight: float
    nbytes: int
    weight_error: float  # |W - Q(W)|^2 / |W|^2
    output_error: float | None  # |y - Q(y)|^2 / |y|^2 on the calibration tokens, if there were any
    seconds: float


@dataclass(frozen=True)
class Report:
    """What `quantize_model` did."""

    method: Method
    layers: list[LayerReport]

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
    def seconds(self) -> float:
        return sum(layer.seconds for layer in self.layers)

    def __str__(self) -> str:
        errors = [layer.output_error for layer in self.layers if layer.output_error is not None]
        output = f", output error up to {max(errors):.1e}" if errors else ""
        return (
            f"{self.method}: {len(self.layers)} layers, {self.weights:,} weights in {self.nbytes:,} bytes "
            f"= {self.bits_per_weight:.3f} bits per weight{output}, {self.seconds:.1f} s"
        )


@torch.no_grad()
def quantize_model(
    model: nn.Module, method: Method, *, calibration: Tensor | None = None, progress: bool = False
) -> Report:
    """Replace every linear layer of `model`, in place, by a `QuantizedLinear`; returns the report.

    Embeddings and LM head stay as they are. With `calibration` `[sequences, length]` token ids, the
    report holds each layer's relative output error on the float model's inputs. The result is saved by
    `model.save_pretrained` and loaded by `from_pretrained`, packed.
    """
    layers = linear_layers(model)
    if not layers:
        raise ValueError("the model has no float linear layer left: is it quantized already?")
    quantized, rows = {}, []
    output_errors = {}
    for layer in tqdm(layers, disable=not progress, desc=method.name):
        start = time.perf_counter()
        try:
            weight = method.quantize(layer.weight)
        except (ValueError, TypeError) as error:
            raise type(error)(f"layer {layer.name}: {error}") from error
        seconds = time.perf_counter() - start
        difference = (layer.weight.float() - weight.dequantize()).square().sum()
        power = layer.weight.float().square().sum()
        rows.append((layer.name, weight, (difference / power).item() if power else 0.0, seconds))
        quantized[layer.name] = QuantizedLinear(method, weight, layer.bias)
    if calibration is not None:
        output_errors = _output_errors(model, layers, quantized, calibration)
    for name, module in quantized.items():
        replace_module(model, name, module)
    mark_quantized(model, method)
    return Report(
        method,
        [
            LayerReport(
                name, w.shape, w.bits_per_weight, w.nbytes, error, output_errors.get(name), s
            )
            for name, w, error, s in rows
        ],
    )


def _output_errors(model, layers, quantized, calibration: Tensor) -> dict[str, float]:
    """Relative squared output error of each quantized layer, on the inputs of the float model."""
    if calibration.ndim != 2 or calibration.numel() == 0 or calibration.is_floating_point():
        raise ValueError(
            "calibration is [sequences, length] token ids, "
            f"got {calibration.dtype} {tuple(calibration.shape)}"
        )
    sums = {layer.name: [0.0, 0.0] for layer in layers}

    def hook_for(name):
        def hook(_, inputs, output):
            difference = (output - quantized[name](inputs[0])).float()
            sums[name][0] += difference.square().sum().item()
            sums[name][1] += output.float().square().sum().item()

        return hook

    handles = [layer.module.register_forward_hook(hook_for(layer.name)) for layer in layers]
    try:
        for sequence in calibration:
            model(input_ids=sequence[None].to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: difference / power if power else 0.0 for name, (difference, power) in sums.items()
    }
