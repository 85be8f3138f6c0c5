"""`course bench quantize`: what quantizing a whole model takes, and how good it is, beside a library.

Every run is a process of its own, so that its peak memory is its own, and the contenders take turns,
so that a machine that gets slower slows down all of them. All get the same float model and the same
calibration, from a folder. What is timed goes from the float model in memory to the quantized one:
calibration and packing are in it, loading and saving are not.
"""

import ast
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import psutil
import torch
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from course_utils.build import CourseError
from course_utils.build.environments import python_of
from course_utils.build.oracles import environment, is_made
from course_utils.data.tokens import calibration_tokens, evaluation_tokens
from course_utils.evaluation import perplexity
from course_utils.models import ModelUnavailable, load_model
from course_utils.models.walk import linear_layers
from course_utils.quantizers import METHODS, Method, get_method
from course_utils.results import record, set_context


@dataclass(frozen=True)
class Protocol:
    """What all contenders share."""

    sequences: int  # of the calibration
    length: int  # of a sequence, and the window of the perplexity
    evaluated: int  # tokens of the perplexity; 0 if none is asked for
    repeats: int
    threads: int


# What a run measures: unit, and how far another may lie from it (a share), if they are compared.
MEASURED = {
    "seconds": ("s", None),
    "peak_bytes": ("bytes", None),
    "added_bytes": ("bytes", None),
    "bits_per_weight": ("bits", 0),
    "perplexity": ("", 0.01),
}


@dataclass
class Contender:
    """A method, who runs it (the course or a library), and what its runs measured."""

    spec: str
    method: Method
    who: str
    command: list
    runs: list[dict] = field(default_factory=list)

    def values(self, name: str) -> list[float]:
        """A measured value of every run that has it."""
        return [run[name] for run in self.runs if run.get(name) is not None]

    def median(self, name: str) -> float:
        return statistics.median(self.values(name))


def parse_method(spec: str) -> Method:
    """A method by its name and settings, as `gptq:n_bits=4,group_size=64`."""
    name, _, rest = spec.partition(":")
    settings = {}
    for setting in filter(None, rest.split(",")):
        key, equals, value = setting.partition("=")
        if not equals:
            raise CourseError(f"{spec}: a setting is KEY=VALUE, got {setting!r}.")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = value  # text, as in group_size=row
    if name in METHODS:
        known = [known.name for known in fields(METHODS[name])]
        if unknown := [key for key in settings if key not in known]:
            raise CourseError(
                f"{spec}: {name} has no setting {', '.join(unknown)}. It has {', '.join(known)}."
            )
    try:
        return get_method(name, **settings)
    except (ValueError, TypeError) as error:
        raise CourseError(f"{spec}: {error}.") from error


def bench(
    root: Path, specs: list[str], model_name: str, protocol: Protocol
) -> Iterator[str | Table]:
    """Quantize with every method, by the course and by each library that has it and is installed.

    Yields what is going on, line by line, and at last the table; its values are recorded. Raises
    `CourseError` for a method, a setting or a model that is not there, and for a run that fails.
    """
    contenders, absent = _contenders(root, specs)
    for library in absent:
        yield f"{library} is not installed: `make oracles` (`course oracles`) does it."
    folder = root / "runs" / "bench" / _label(model_name)
    evaluation = _prepare(folder / "float", model_name, protocol)
    yield machine(protocol)
    torch.set_num_threads(protocol.threads)
    reference = None
    if protocol.evaluated:
        model = load_model(str(folder / "float")).model
        reference = perplexity(model, evaluation, window=protocol.length).perplexity
        _record("float.perplexity", reference, model_name, protocol)
    for repeat in range(protocol.repeats):
        for one in contenders[:: -1 if repeat % 2 else 1]:  # a copy, which allows to remove
            out = folder / f"{_label(one.spec)}_{one.who}"
            measured = run_once(one, folder / "float", out, protocol.threads)
            if "refused" in measured:
                yield f"{one.spec}, {one.who}: {measured['refused']}"
                contenders.remove(one)
                continue
            if protocol.evaluated and not repeat:  # the same in each
                model = _quantized(folder / "float", out)
                found = perplexity(model, evaluation, window=protocol.length)
                measured["perplexity"] = found.perplexity
            shutil.rmtree(out)
            one.runs.append(measured)
            yield f"{one.spec}, {one.who}: {measured['seconds']:.1f} s ({repeat + 1}/{protocol.repeats})"
    for one in contenders:
        for name in filter(one.values, MEASURED):
            key = f"{_label(one.spec)}.{one.who}.{name}"
            _record(key, one.median(name), model_name, protocol, one)
    yield table(contenders, reference, model_name, protocol)


def run_once(one: Contender, model: Path, out: Path, threads: int) -> dict:
    """What one run measured; `out` holds the quantized model then."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    settings = json.dumps({"name": one.method.name, **asdict(one.method)})
    variables = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    log = out.with_suffix(".log")
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [*one.command, model, settings, out],
            env=os.environ | variables,
            cwd=out.parent,  # where libraries may leave their logs
            stdout=file,
            stderr=file,
        )
    if done.returncode:
        last = log.read_text("utf-8", "replace").strip().splitlines()[-1:]
        raise CourseError(f"{one.spec}, {one.who}: {' '.join(last)} All of it is in {log}.")
    measured = json.loads((out / "measured.json").read_text("utf-8"))
    if "refused" not in measured:
        measured["added_bytes"] = measured["peak_bytes"] - measured["loaded_bytes"]
    return measured


def machine(protocol: Protocol) -> str:
    """What the measured seconds depend on."""
    load = ", ".join(f"{value:.1f}" for value in psutil.getloadavg())
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {protocol.threads} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}; load before: {load}"
    )


def table(
    contenders: list[Contender], reference: float | None, model_name: str, protocol: Protocol
) -> Table:
    """A row for each contender: medians, and the seconds' smallest and largest."""
    shown = Table(
        title=f"{model_name}: {protocol.sequences} x {protocol.length} tokens of calibration, "
        f"{protocol.repeats} runs each, perplexity on {protocol.evaluated:,} tokens",
        caption="Seconds: median (smallest to largest) of quantizing, with calibration and without loading; "
        "all of them over the course's. MB: the process at its largest, and by how much that is over the "
        "loaded float model.",
    )
    for title in ("method", "by"):
        shown.add_column(title)
    for title in ("seconds", "ratio", "peak MB", "added MB", "bits/weight", "perplexity"):
        shown.add_column(title, justify="right")
    if reference is not None:
        shown.add_row("float", *[""] * 6, f"{reference:.3f}")
    course = {one.spec: one.median("seconds") for one in contenders if one.who == "course"}
    for one in contenders:
        seconds = one.values("seconds")
        shown.add_row(
            one.spec,
            one.who,
            f"{one.median('seconds'):.1f} ({min(seconds):.1f} to {max(seconds):.1f})",
            f"{one.median('seconds') / course[one.spec]:.2f}",
            *(f"{one.median(name) / 1e6:,.0f}" for name in ("peak_bytes", "added_bytes")),
            *(
                f"{one.median(name):.3f}" if one.values(name) else "-"
                for name in ("bits_per_weight", "perplexity")
            ),
        )
    return shown


def _contenders(root: Path, specs: list[str]) -> tuple[list[Contender], list[str]]:
    """Who quantizes; and the libraries that would, were they installed."""
    contenders, absent = [], {}
    for spec in specs:
        method = parse_method(spec)
        command = [sys.executable, "-m", "course_utils.build.quantize_once"]
        contenders.append(Contender(spec, method, "course", command))
        for script in sorted(root.glob(f"tests/oracles/*/model/{method.name}.py")):
            library = script.parents[1]
            made = environment(root, library)
            if is_made(library / "requirements.txt", made):
                command = [python_of(made), script]
                contenders.append(Contender(spec, method, library.name, command))
            else:
                absent[library.name] = None
    return contenders, list(absent)


def _prepare(folder: Path, model_name: str, protocol: Protocol) -> Tensor:
    """Save float model and calibration into `folder`; returns the tokens of the perplexity."""
    try:
        model, tokenizer = load_model(model_name)
        positions = getattr(model.config, "max_position_embeddings", protocol.length)
        if protocol.length > positions:
            raise ValueError(f"{model_name} has {positions} positions: choose a length up to that.")
        evaluation = evaluation_tokens(tokenizer, protocol.evaluated or 1)
        calibration = calibration_tokens(tokenizer, protocol.sequences, protocol.length)
    except (ModelUnavailable, ValueError) as error:
        raise CourseError(str(error)) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file({"tokens": calibration}, folder / "calibration.safetensors")
    return evaluation


@torch.no_grad()
def _quantized(model: Path, out: Path) -> PreTrainedModel:
    """The model that a run left in `out`; a library leaves weights for the float one."""
    weights = out / "weights.safetensors"
    if not weights.is_file():
        return load_model(str(out)).model
    filled, of_layer = load_model(str(model)).model, load_file(weights)
    for layer in linear_layers(filled):
        layer.weight.copy_(of_layer.pop(layer.name))
    if of_layer:
        raise CourseError(f"{weights} holds what are no linear layers: {', '.join(of_layer)}.")
    return filled


def _record(
    key: str, value: float, model_name: str, protocol: Protocol, one: Contender | None = None
) -> None:
    unit, share = MEASURED[key.rpartition(".")[2]]
    by = {"settings": repr(one.method), **one.runs[0]["versions"]} if one else {}
    set_context(profile="bench", device="cpu")
    record(
        f"bench.{_label(model_name)}.{key}", value, unit, None if share is None else share * value,
        model=model_name, corpus="factbook", **asdict(protocol), **by,
    )  # fmt: skip


def _label(text: str) -> str:
    """As a folder and a part of a key may be called."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")
