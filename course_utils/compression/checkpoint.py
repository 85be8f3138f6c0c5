"""Finished blocks, kept on disk: a run that was cut off goes on where it stopped.

A file for each block holds all its tensors as quantization left them, what describes its quantized
layers, and their reports. `progress.safetensors`, written after it, says how many blocks are finished, and
holds the inputs of the next one. It also holds the run's fingerprint, a hash of the float model with its
configuration, of the methods, of the calibration tokens and of the code, so that no block of another run
gets in. Each file holds a hash of its tensors and of their description: altered, they would still be a
model. Writing and reading the inputs takes their memory once more for that moment.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from course_utils.compression.base import LayerReport, Method, QuantizedLinear
from course_utils.compression.methods import get_method
from course_utils.compression.saving import describe, empty_layer
from course_utils.digest import digest
from course_utils.files import replacing
from course_utils.models.walk import BlockInputs, replace_module

# Folders of code that all methods run through
SHARED = ("compression", "grids", "kernels", "models")
LIBRARIES = ("torch", "transformers")


@dataclass(frozen=True)
class Checkpoint:
    """The finished blocks of one run, in a folder."""

    folder: Path
    run: dict[str, str]  # what makes it this run: a hash or version of each, by a name for people

    @classmethod
    def of_run(
        cls, folder: Path, model: nn.Module, methods: Mapping[str, Method], tokens: Tensor
    ) -> "Checkpoint":
        """For quantizing the float `model` by `methods`, calibrated on `tokens`, into `folder`."""
        config = model.config.to_dict() if hasattr(model, "config") else {}
        for of_the_place in ("_name_or_path", "transformers_version"):
            config.pop(of_the_place, None)
        run = {
            "methods and settings": repr(sorted(methods.items(), key=lambda item: item[0])),
            "model": digest(model.state_dict()),
            "configuration": json.dumps(config, sort_keys=True, default=str),
            "calibration": digest({"tokens": tokens}),
            "code of course_utils": _code(methods),
        }
        run = {part: hashlib.sha256(value.encode()).hexdigest() for part, value in run.items()}
        return cls(folder, run | {library: version(library) for library in LIBRARIES})

    def finished(self, inputs: BlockInputs) -> int:
        """How many blocks are finished; if there are any, `inputs` become those of the next block.

        Raises `ValueError` if the folder's blocks are of another run, or damaged.
        """
        file = self.folder / "progress.safetensors"
        if not file.is_file():
            return 0
        tensors, made = _read(file, inputs.hidden.device)
        before = made["run"]
        if differing := [part for part, value in self.run.items() if before.get(part) != value]:
            raise ValueError(
                f"{self.folder} holds blocks of another run: it differs in {', '.join(differing)}. Give "
                "checkpoint= an empty folder"
            )
        inputs.hidden.copy_(tensors["hidden"])
        return made["finished"]

    def save(
        self,
        name: str,
        block: nn.Module,
        reports: list[LayerReport],
        finished: int,
        inputs: BlockInputs,
    ) -> None:
        """Keep `block`, called `name` in the model: so many are `finished`, and the next gets `inputs`."""
        layers = {
            layer: describe(module)
            for layer, module in block.named_modules()
            if isinstance(module, QuantizedLinear)
        }
        made = {"layers": layers, "reports": [asdict(report) for report in reports]}
        _write(self.folder / f"{name}.safetensors", block.state_dict(), made)
        made = {"run": self.run, "finished": finished}
        _write(self.folder / "progress.safetensors", {"hidden": inputs.hidden}, made)

    def restore(self, name: str, block: nn.Module) -> list[LayerReport]:
        """Make of the float `block`, called `name`, the finished one; returns its reports."""
        tensors, made = _read(self.folder / f"{name}.safetensors", next(block.parameters()).device)
        for layer, entry in made["layers"].items():
            method = get_method(entry["method"], **entry["settings"])
            replace_module(block, layer, empty_layer(method, entry))
        block.load_state_dict(tensors, assign=True)
        reports = [{**report, "shape": tuple(report["shape"])} for report in made["reports"]]
        return [LayerReport(**report) for report in reports]


def _code(methods: Mapping[str, Method]) -> str:
    """The sources that the blocks are made by: what all methods share, and the modules of these."""
    package = Path(__file__).parent.parent
    files = {file for folder in SHARED for file in (package / folder).rglob("*.py")}
    for name, asked in methods.items():
        for method in (asked, asked.for_layer(name)):
            for kind in (*type(method).__mro__, *method.weight_type.__mro__):
                if file := getattr(
                    sys.modules[kind.__module__], "__file__", None
                ):  # a notebook: none
                    files.add(Path(file))
    return "".join(f"{file}\n{file.read_text('utf-8')}" for file in sorted(files))


def _signature(tensors: Mapping[str, Tensor], described: str) -> str:
    return hashlib.sha256((described + digest(tensors)).encode()).hexdigest()


def _write(file: Path, tensors: Mapping[str, Tensor], made: dict) -> None:
    with replacing(file) as partial:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        described = json.dumps(made)
        sha256 = _signature(contiguous, described)
        save_file(contiguous, partial, metadata={"made": described, "sha256": sha256})


def _read(file: Path, device: torch.device) -> tuple[dict[str, Tensor], dict]:
    try:
        with safe_open(file, "pt", device=str(device)) as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata()
        if metadata["sha256"] != _signature(tensors, metadata["made"]):
            raise ValueError("its tensors are not those that were written")
        return tensors, json.loads(metadata["made"])
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}): give checkpoint= an empty folder, and start again"
        ) from error
