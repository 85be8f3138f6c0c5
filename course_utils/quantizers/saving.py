"""Saving and loading through `transformers`: `save_pretrained` and `from_pretrained`, packed.

The configuration that is saved with a model names the method, its settings, and the layout of every
quantized layer: shape and dtype of each stored tensor, and their hash. From that the empty layers are
made on the meta device before any weight is read, so loading never builds a float weight. What was
read is compared with the hash: codes that are missing, cut or altered would still be codes, and
nothing but the answers of the model would tell.
"""

import hashlib
from dataclasses import asdict, fields

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from course_utils.models.walk import LinearLayer, replace_module
from course_utils.quantizers.base import Method, QuantizedLinear, get_method

FORMAT = "course_utils"


@register_quantization_config(FORMAT)
class CourseQuantizationConfig(QuantizationConfigMixin):
    """Method, settings, and the layout of each quantized layer; all of it JSON."""

    def __init__(self, method: str, settings: dict, layers: dict, quant_method: str = FORMAT, **_):
        self.quant_method = quant_method
        self.method, self.settings, self.layers = method, settings, layers


@register_quantizer(FORMAT)
class CourseQuantizer(HfQuantizer):
    """Lets `from_pretrained` load what `quantize_model` made."""

    requires_calibration = True  # transformers: only models that are quantized already are loaded

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        config = self.quantization_config
        try:
            method = get_method(config.method, **config.settings)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"config.json asks for method {config.method!r} with {config.settings}: {error}. "
                "Load it with the version of course_utils that saved it."
            ) from error
        for name, layout in config.layers.items():
            try:
                module = _empty_layer(method, layout)
                shape = tuple(LinearLayer(name, model.get_submodule(name)).weight.shape)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"config.json does not describe layer {name} as this model and method have it: "
                    f"{type(error).__name__}: {error}. Save the quantized model again."
                ) from error
            if module.quantized_weight.shape != shape:
                raise ValueError(
                    f"config.json disagrees with itself: layer {name} of this model is {shape}, its codes "
                    f"are {module.quantized_weight.shape}. Save the quantized model again."
                )
            replace_module(model, name, module)
            # GPT-2 would draw fresh weights for the children of its attention and MLP modules.
            for loaded in (module, model.get_submodule(name.rpartition(".")[0])):
                loaded._is_hf_initialized = True
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        for name, layout in self.quantization_config.layers.items():
            if _digest(model.get_submodule(name)) != layout.get("sha256"):
                raise ValueError(
                    f"the file of the weights does not hold layer {name} as it was saved: it is not whole, "
                    "or was altered. Save the quantized model again."
                )
        return model

    def is_serializable(self, **_) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def mark_quantized(model: nn.Module, method: Method) -> None:
    """Write the format into the model's configuration, so that `save_pretrained` stores it."""
    if not hasattr(model, "config"):
        return
    layers = {
        name: _layout(module)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    config = CourseQuantizationConfig(method.name, asdict(method), layers)
    model.config.quantization_config = config
    model.hf_quantizer = CourseQuantizer(config)
    model.is_quantized = True


def _empty_layer(method: Method, layout: dict) -> QuantizedLinear:
    with torch.device("meta"):
        tensors = {key: _empty(spec) for key, spec in layout["tensors"].items()}
        bias = _empty(layout["bias"]) if layout["bias"] else None
    return QuantizedLinear(method, method.weight_type(**{**layout["values"], **tensors}), bias)


def _layout(module: QuantizedLinear) -> dict:
    weight = module.quantized_weight
    tensors = weight.tensors()
    return {
        "tensors": {name: _spec(tensor) for name, tensor in tensors.items()},
        "values": {
            f.name: getattr(weight, f.name) for f in fields(weight) if f.name not in tensors
        },
        "bias": None if module.bias is None else _spec(module.bias),
        "sha256": _digest(module),
    }


def _digest(module: QuantizedLinear) -> str:
    """SHA-256 of the bytes of all the layer's tensors, in their order."""
    digest = hashlib.sha256()
    for tensor in module.buffers():
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _spec(tensor: torch.Tensor) -> list:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _empty(spec: list) -> torch.Tensor:
    dtype, shape = spec
    return torch.empty(shape, dtype=getattr(torch, dtype))
