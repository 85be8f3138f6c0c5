"""Saving and loading through `transformers`: `save_pretrained` and `from_pretrained`, packed.

The configuration that is saved with a model describes every quantized layer: its method with its
settings, shape and dtype of each stored tensor, and their hash. From that the empty layers are made on
the meta device before any weight is read, so loading never builds a float weight. What was
read is compared with the hash: codes that are missing, cut or altered would still be codes, and
nothing but the answers of the model would tell. The description has a hash of its own, since the
same codes with other settings are another model.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import MethodType

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from course_utils.compression.base import Method, QuantizedLinear
from course_utils.compression.embedding import describe_embeddings, place_empty_embeddings
from course_utils.compression.methods import get_method
from course_utils.digest import digest
from course_utils.models.walk import LinearLayer, replace_module

FORMAT = "course_utils"
IMPORT = "import course_utils.compression"
CARD = """\
---
library_name: transformers
---
# A quantized {model}

Its weights are packed in the format of `course_utils`. Nothing but the first line below tells transformers
how to read them: without it, transformers makes up random weights, and only warns.

```python
{line}
from transformers import {model}

model = {model}.from_pretrained("the path of this folder")
```
"""


@register_quantization_config(FORMAT)
class CourseQuantizationConfig(QuantizationConfigMixin):
    """The quantized layers by name: method, settings and layout of each (`describe`); all of it JSON.

    `embeddings` are described likewise (`describe_embeddings`), if they are quantized. `sha256` is that of
    all the descriptions.
    """

    def __init__(
        self,
        layers: dict,
        embeddings: dict | None = None,
        sha256: str = "",
        quant_method: str = FORMAT,
        **_,
    ):
        self.quant_method = quant_method
        self.layers = layers
        self.embeddings = embeddings or {}
        self.sha256 = sha256


@register_quantizer(FORMAT)
class CourseQuantizer(HfQuantizer):
    """Lets `from_pretrained` load what `quantize_model` made."""

    requires_calibration = True  # transformers: only models that are quantized already are loaded

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs
    ) -> nn.Module:
        self._stored = _names_in(checkpoint_files or ())
        for name, entry in self.quantization_config.layers.items():
            method = _method(name, entry)
            try:
                original = model.get_submodule(name)
                module = empty_layer(method, entry)
                shape = tuple(LinearLayer(name, original).weight.shape)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"config.json does not describe layer {name} as this model and method have it: "
                    f"{type(error).__name__}: {error}. {_remedy(model)}"
                ) from error
            if module.quantized_weight.shape != shape:
                raise ValueError(
                    f"config.json disagrees with itself: layer {name} of this model is {shape}, its codes "
                    f"are {module.quantized_weight.shape}. Save the quantized model again."
                )
            module._is_hf_initialized = True
            # Some models initialise the weights of their modules' children (GPT-2: of attention's and MLP's
            # projections), and have to find one, which says that there is nothing to do.
            module.weight = original.weight.detach()
            module.weight._is_hf_initialized = True
            replace_module(model, name, module)
        place_empty_embeddings(model, self.quantization_config.embeddings)
        if self.quantization_config.sha256 != _hash_of(
            self.quantization_config.layers, self.quantization_config.embeddings
        ):
            raise ValueError(
                "config.json does not describe the quantized layers as they were saved: settings or layers "
                "were altered. Save the quantized model again."
            )
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        for name, entry in self.quantization_config.layers.items():
            module = model.get_submodule(name)
            del module.weight
            # What is missing would stay memory that nothing has written to. It can hold anything, the right
            # bytes of a model that was just freed included, so no hash can tell. A file may have other names
            # than the model: then transformers 5, which renames them, marks what it has read.
            self._check_read(name, module)
            _restore_dtypes(module, entry)
            if digest(dict(module.named_buffers())) != entry.get("sha256"):
                raise _altered(name)
        for name, entry in self.quantization_config.embeddings.items():
            module = model.get_submodule(name)
            self._check_read(name, module)
            for key, dtype in entry["dtypes"].items():
                owner, _, attribute = key.rpartition(".")
                tensor = module.get_buffer(key).to(getattr(torch, dtype))
                setattr(module.get_submodule(owner), attribute, tensor)
            if digest(dict(module.named_buffers())) != entry.get("sha256"):
                raise _altered(name)
        _save_with_card(model)
        return model

    def _check_read(self, name: str, module: nn.Module) -> None:
        for key, tensor in module.named_buffers():
            read = getattr(tensor, "_is_hf_initialized", False)
            if not read and f"{name}.{key}" not in self._stored:
                raise _altered(name)

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


def _remedy(model: nn.Module) -> str:
    saved = getattr(model.config, "architectures", None) or []
    if saved and type(model).__name__ not in saved:
        return (
            f"The folder holds a {saved[0]}, not a {type(model).__name__}: load it by that class."
        )
    return "Save the quantized model again."


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
    embeddings = describe_embeddings(model)
    for name, entry in embeddings.items():
        entry["sha256"] = digest(dict(model.get_submodule(name).named_buffers()))
    config = CourseQuantizationConfig(layers, embeddings, _hash_of(layers, embeddings))
    model.config.quantization_config = config
    model.hf_quantizer = CourseQuantizer(config)
    model.is_quantized = True
    _save_with_card(model)


def _save_with_card(model: nn.Module) -> None:
    """Let `model.save_pretrained` also write how to load what it writes; transformers has no hook for it."""
    model.save_pretrained = MethodType(_save_pretrained, model)


def _save_pretrained(model: nn.Module, save_directory: Path | str, *args, **kwargs) -> None:
    """`save_pretrained` of the model's class; the folder's README gets `CARD` unless it has its line."""
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    readme = Path(save_directory) / "README.md"
    card = CARD.format(model=type(model).__name__, line=IMPORT)
    if not readme.exists():
        readme.write_text(card, "utf-8")
    elif IMPORT not in (text := readme.read_text("utf-8")):
        readme.write_text(f"{text.rstrip()}\n\n{card.split('---')[-1].lstrip()}", "utf-8")


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


def _hash_of(layers: dict, embeddings: dict) -> str:
    """SHA-256 of the descriptions."""
    described = json.dumps([layers, embeddings], sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()


def _spec(tensor: torch.Tensor) -> list:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _empty(spec: list) -> torch.Tensor:
    dtype, shape = spec
    return torch.empty(shape, dtype=getattr(torch, dtype))
