"""Saving and loading through `transformers`: `save_pretrained` and `from_pretrained`, packed.

The configuration that is saved with a model describes every quantized layer: its method with its
settings, shape and dtype of each stored tensor, and their hash. From that the empty layers are made on
the meta device before any weight is read, so loading never builds a float weight. What was
read is compared with the hash: codes that are missing, cut or altered would still be codes, and
nothing but the answers of the model would tell.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from course_utils.compression.base import Method, QuantizedLinear
from course_utils.compression.methods import get_method
from course_utils.digest import digest
from course_utils.models.walk import LinearLayer, replace_module

FORMAT = "course_utils"


@register_quantization_config(FORMAT)
class CourseQuantizationConfig(QuantizationConfigMixin):
    """The quantized layers by name: method, settings and layout of each (`describe`); all of it JSON."""

    def __init__(self, layers: dict, quant_method: str = FORMAT, **_):
        self.quant_method = quant_method
        self.layers = layers


@register_quantizer(FORMAT)
class CourseQuantizer(HfQuantizer):
    """Lets `from_pretrained` load what `quantize_model` made."""

    requires_calibration = True  # transformers: only models that are quantized already are loaded

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs
    ) -> nn.Module:
        stored = _names_in(checkpoint_files or ())
        for name, entry in self.quantization_config.layers.items():
            method = _method(name, entry)
            try:
                module = empty_layer(method, entry)
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
            # What is missing would stay memory that nothing has written to. It can hold anything, the right
            # bytes of a model that was just freed included, so no hash can tell.
            if checkpoint_files and not stored >= {f"{name}.{key}" for key in module.state_dict()}:
                raise _altered(name)
            replace_module(model, name, module)
            # GPT-2 would draw fresh weights for the children of its attention and MLP modules.
            for loaded in (module, model.get_submodule(name.rpartition(".")[0])):
                loaded._is_hf_initialized = True
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        for name, entry in self.quantization_config.layers.items():
            module = model.get_submodule(name)
            _restore_dtypes(module, entry)
            if digest(dict(module.named_buffers())) != entry.get("sha256"):
                raise _altered(name)
        return model

    def is_serializable(self, **_) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _altered(layer: str) -> ValueError:
    return ValueError(
        f"the file of the weights does not hold layer {layer} as it was saved: it is not whole, or was "
        "altered. Save the quantized model again."
    )


def _names_in(files: Sequence[str]) -> set[str]:
    """Names of all tensors in safetensors files."""
    names = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    return names


def mark_quantized(model: nn.Module) -> None:
    """Write the format into the model's configuration, so that `save_pretrained` stores it."""
    if not hasattr(model, "config"):
        return
    layers = {
        name: describe(module)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    config = CourseQuantizationConfig(layers)
    model.config.quantization_config = config
    model.hf_quantizer = CourseQuantizer(config)
    model.is_quantized = True


def _method(layer: str, entry: dict) -> Method:
    method, settings = entry.get("method"), entry.get("settings", {})
    try:
        return get_method(method, **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"config.json asks for method {method!r} with {settings} in layer {layer}: {error}. "
            "Load it with the version of course_utils that saved it."
        ) from error


def empty_layer(method: Method, entry: dict) -> QuantizedLinear:
    """The layer that `describe` wrote `entry` of, its tensors on the meta device."""
    with torch.device("meta"):
        tensors = {key: _empty(spec) for key, spec in entry["tensors"].items()}
        bias = _empty(entry["bias"]) if entry["bias"] else None
    return QuantizedLinear(method, method.weight_type(**{**entry["values"], **tensors}), bias)


def _restore_dtypes(module: QuantizedLinear, entry: dict) -> None:
    """Give tensors the dtype that they were saved in.

    transformers 4.57 reads all that is float in the model's dtype. What this widened gets back its
    bytes, and what it rounded does not: the hash tells.
    """
    for name, tensor in module.named_buffers():
        dtype, _ = entry["bias"] if name == "bias" else entry["tensors"][name]
        setattr(module, name, tensor.to(getattr(torch, dtype)))


def describe(module: QuantizedLinear) -> dict:
    """What is written down of a layer beside its tensors; all of it JSON."""
    weight = module.quantized_weight
    tensors = weight.tensors()
    return {
        "method": module.method.name,
        "settings": asdict(module.method),
        "tensors": {name: _spec(tensor) for name, tensor in tensors.items()},
        "values": {
            f.name: getattr(weight, f.name) for f in fields(weight) if f.name not in tensors
        },
        "bias": None if module.bias is None else _spec(module.bias),
        "sha256": digest(dict(module.named_buffers())),
    }


def _spec(tensor: torch.Tensor) -> list:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _empty(spec: list) -> torch.Tensor:
    dtype, shape = spec
    return torch.empty(shape, dtype=getattr(torch, dtype))
