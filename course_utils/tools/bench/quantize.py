"""`course bench quantize`: what quantizing a whole model takes, and how good it is, beside a library.

Every run is a process of its own, so that its peak memory is its own, and the contenders take turns,
so that a machine that gets slower slows down all of them. All get the same float model, and in each
round the same calibration, from a folder. Every round cuts another calibration from the text: one cut
alone can favour anybody by some percent of perplexity. What is timed goes from the float model in
memory to the quantized one: calibration is in it, and packing where it is not left to saving (as
llm-compressor does), but neither loading nor saving.
"""

import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import course_utils
from course_utils.compression import Method, get_method, method_names
from course_utils.compression.methods import method_class
from course_utils.data.tokens import calibration_tokens, evaluation_tokens
from course_utils.evaluation import perplexity
from course_utils.models import ModelUnavailable, load_model
from course_utils.models.walk import LinearLayer, linear_layers
from course_utils.results import record, set_context
from course_utils.tools import CourseError
from course_utils.tools.environments import python_of
from course_utils.tools.golden import environment, is_made
from course_utils.tools.parameters import key_and_value

PACKAGE = Path(course_utils.__file__).parent


@dataclass(frozen=True)
class Protocol:
    """What all contenders share."""

    sequences: int  # of the calibration
    length: int  # of a sequence, and the window of the perplexity
    evaluated: int  # tokens of the perplexity; 0 if none is asked for
    repeats: int  # rounds, each with a calibration of its own
    threads: int


COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal
ERROR = re.compile(r"[A-Za-z_][\w.]*(: |$)")  # the line of a traceback that names the error

# What is recorded of a contender, and its unit.
UNITS = {
    "seconds": "s",
    "least_seconds": "s",
    "most_seconds": "s",
    "seconds_ratio": "",
    "peak_bytes": "bytes",
    "added_bytes": "bytes",
    "bits_per_weight": "bits",
    "perplexity": "",
    "perplexity_ratio": "",
    "perplexity_ratio_error": "",
}


@dataclass
class Contender:
    """A method, who runs it (the course or a library), and what its runs measured."""

    spec: str
    method: Method
    who: str
    command: list
    path: Path  # where its command finds modules, beside those that are installed
    runs: list[dict] = field(default_factory=list)

    def values(self, name: str) -> list[float]:
        """A measured value of every run that has it."""
        return [run[name] for run in self.runs if run.get(name) is not None]

    def summary(self, course: "Contender") -> dict[str, float]:
        """By the names of `UNITS`, those that were measured; ratios are to `course`.

        Medians over the runs, but for perplexity, whose mean is geometric, as that of a mean loss is.
        Its ratio to the course's goes from run to run, and so does the ratio's standard error, which
        takes two runs.
        """
        names = ("seconds", "peak_bytes", "added_bytes", "bits_per_weight")
        found = {name: statistics.median(self.values(name)) for name in names if self.values(name)}
        found["least_seconds"] = min(self.values("seconds"))
        found["most_seconds"] = max(self.values("seconds"))
        found["seconds_ratio"] = found["seconds"] / statistics.median(course.values("seconds"))
        if perplexities := self.values("perplexity"):
            found["perplexity"] = statistics.geometric_mean(perplexities)
            pairs = zip(perplexities, course.values("perplexity"), strict=True)
            logs = [math.log(own / other) for own, other in pairs]
            found["perplexity_ratio"] = math.exp(statistics.fmean(logs))
            if len(logs) > 1:
                error = statistics.stdev(logs) / math.sqrt(len(logs))
                found["perplexity_ratio_error"] = found["perplexity_ratio"] * error
        return found


def parse_method(spec: str) -> Method:
    """A method by its name and settings, as `gptq:n_bits=4,group_size=64`."""
    name, _, rest = spec.partition(":")
    settings = dict(key_and_value(setting) for setting in filter(None, rest.split(",")))
    if name in method_names():
        known = [known.name for known in fields(method_class(name))]
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
    for library, remedy in absent.items():
        yield f"{library} is not installed: {remedy} does it."
    runs = root / "runs" / "bench"
    folder = runs / key_part(model_name)
    calibrations, evaluation = _prepare(folder / "float", model_name, protocol)
    yield machine(protocol)
    torch.set_num_threads(protocol.threads)
    reference = None
    if protocol.evaluated:
        model = load_model(str(folder / "float")).model
        reference = perplexity(model, evaluation, window=protocol.length).perplexity
        _record(runs, "float.perplexity", reference, model_name, protocol)
    for repeat, calibration in enumerate(calibrations):
        save_file({"tokens": calibration}, folder / "float" / "calibration.safetensors")
        for one in contenders[:: -1 if repeat % 2 else 1]:  # a copy, which allows to remove
            out = folder / f"{key_part(one.spec)}_{one.who}"
            measured = run_once(one, folder / "float", out, protocol.threads)
            if "refused" in measured:
                yield f"{one.spec}, {one.who}: {measured['refused']}"
                contenders.remove(one)
                continue
            if protocol.evaluated:
                model = _quantized(folder / "float", out)
                found = perplexity(model, evaluation, window=protocol.length)
                measured["perplexity"] = found.perplexity
            shutil.rmtree(out)
            one.runs.append(measured)
            quality = f", perplexity {measured['perplexity']:.3f}" if protocol.evaluated else ""
            yield (
                f"{one.spec}, {one.who}: {measured['seconds']:.1f} s{quality} "
                f"({repeat + 1}/{protocol.repeats})"
            )
    course = {one.spec: one for one in contenders if one.who == "course"}
    summaries = [(one, one.summary(course[one.spec])) for one in contenders]
    for one, summary in summaries:
        for name, value in summary.items():
            _record(
                runs, f"{key_part(one.spec)}.{one.who}.{name}", value, model_name, protocol, one
            )
    yield table(summaries, reference, model_name, protocol)


def run_once(one: Contender, model: Path, out: Path, threads: int) -> dict:
    """What one run measured, with the quantized model in `out`; or why a library "refused".

    Raises `CourseError` if a run of the course fails.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    settings = json.dumps({"name": one.method.name, **asdict(one.method)})
    command = [*one.command, model, settings, out]
    if reason := run_logged(command, out.with_suffix(".log"), one.path, threads):
        if one.who == "course":
            raise CourseError(f"{one.spec}, course: {reason}")
        return {"refused": reason}  # of the others' runs there is still a table
    measured = json.loads((out / "measured.json").read_text("utf-8"))
    if "refused" not in measured:
        measured["added_bytes"] = measured["peak_bytes"] - measured["loaded_bytes"]
    return measured


def run_logged(command: list, log: Path, modules: Path, threads: int) -> str | None:
    """Run a program that finds `modules`, and `log` what it says; why it failed, or None."""
    variables = {
        "PYTHONPATH": str(modules),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
    }
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command,
            env=os.environ | variables,
            cwd=log.parent,  # where libraries may leave their logs
            stdout=file,
            stderr=file,
        )
    if not done.returncode:
        return None
    cause = cause_of_failure(log.read_text("utf-8", "replace"))
    return f"the run failed: {cause} All of it is in {log}."


def cause_of_failure(log: str) -> str:
    """Why a program failed, in one line: the error that ends its last traceback, or else its last line.

    A library that compiles something ends with all that the compiler said.
    """
    lines = [line.strip("\r") for line in COLOUR.sub("", log).splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call")]
    for line in lines[starts[-1] :] if starts else ():
        if ERROR.match(line):
            return line if len(line) <= 200 else f"{line[:200]}..."
    return lines[-1].strip() if lines else "it said nothing."


def machine(protocol: Protocol) -> str:
    """What the measured seconds depend on."""
    load = ", ".join(f"{value:.1f}" for value in psutil.getloadavg())
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {protocol.threads} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}; load before: {load}"
    )


def table(
    summaries: list[tuple[Contender, dict]],
    reference: float | None,
    model_name: str,
    protocol: Protocol,
) -> Table:
    """A row for each contender: medians, spread, and ratios to the course."""
    shown = Table(
        title=f"{model_name}: {protocol.sequences} x {protocol.length} tokens of calibration, "
        f"{protocol.repeats} runs each, perplexity on {protocol.evaluated:,} tokens",
        caption="Seconds: median (smallest to largest) of quantizing, with calibration and without loading; "
        "over the course's: the ratio of the medians. "
        "MB: the process at its largest, and by how much that is over the loaded float model. "
        "Perplexity: geometric mean over the runs, each with a calibration of its own; over the course's: "
        "the ratio in pairs of runs with one calibration, +- its standard error over calibrations. "
        "The text that it is measured on is one.",
    )
    shown.add_column("method", overflow="fold")  # settings are long, and all of them count
    shown.add_column("by")
    for title in (
        *("seconds", "over the course's", "peak MB", "added MB", "bits/weight"),
        *("perplexity", "over the course's"),
    ):
        shown.add_column(title, justify="right")
    if reference is not None:
        shown.add_row("float", *[""] * 6, f"{reference:.3f}")
    for one, summary in summaries:
        ratio = _cell(summary, "perplexity_ratio", ".4f")
        if "perplexity_ratio_error" in summary:
            ratio += f" +- {summary['perplexity_ratio_error']:.4f}"
        shown.add_row(
            one.spec,
            one.who,
            "{seconds:.1f} ({least_seconds:.1f} to {most_seconds:.1f})".format(**summary),
            _cell(summary, "seconds_ratio", ".2f"),
            *(f"{summary[name] / 1e6:,.0f}" for name in ("peak_bytes", "added_bytes")),
            *(_cell(summary, name, ".3f") for name in ("bits_per_weight", "perplexity")),
            ratio,
        )
    return shown


def _cell(summary: dict, name: str, form: str) -> str:
    return format(summary[name], form) if name in summary else "-"


def _contenders(root: Path, specs: list[str]) -> tuple[list[Contender], dict[str, str]]:
    """Who quantizes; and the libraries that would, were they installed, with what installs them.

    A library without `requirements.txt` is one that goes into the course's own Python.
    """
    contenders, absent = [], {}
    for spec in specs:
        method = parse_method(spec)
        command = [sys.executable, "-m", "course_utils.tools.bench.quantize_once"]
        contenders.append(Contender(spec, method, "course", command, PACKAGE.parent))
        for script in sorted(root.glob(f"course_utils/tools/oracles/*/model/{method.name}.py")):
            library = script.parents[1]
            made, requirements = environment(library), library / "requirements.txt"
            beside = not requirements.exists()  # one that goes into the course's own Python
            if find_spec(library.name) if beside else is_made(requirements, made):
                command = [sys.executable if beside else python_of(made), script]
                memory = PACKAGE / "tools" / "bench" / "memory"
                contenders.append(Contender(spec, method, library.name, command, memory))
            else:
                absent[library.name] = (
                    f"`pip install {library.name}`"
                    if beside
                    else "`make oracles` (`course oracles`)"
                )
    return contenders, absent


def _prepare(folder: Path, model_name: str, protocol: Protocol) -> tuple[list[Tensor], Tensor]:
    """Save the float model into `folder`; returns the rounds' calibrations, and tokens for perplexity."""
    try:
        model, tokenizer = load_model(model_name)
        positions = getattr(model.config, "max_position_embeddings", protocol.length)
        if not 2 <= protocol.length <= positions:
            raise ValueError(f"length {protocol.length}: {model_name} takes 2 to {positions}.")
        if protocol.evaluated == 1 or protocol.evaluated < 0:
            raise ValueError(
                f"evaluated {protocol.evaluated}: choose 0 (no perplexity), or 2 or more."
            )
        evaluation = evaluation_tokens(tokenizer, protocol.evaluated or 1)
        calibrations = [
            calibration_tokens(tokenizer, protocol.sequences, protocol.length, seed=seed)
            for seed in range(protocol.repeats)
        ]
    except (ModelUnavailable, ValueError) as error:
        raise CourseError(str(error)) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return calibrations, evaluation


@torch.no_grad()
def _quantized(model: Path, out: Path) -> PreTrainedModel:
    """The model that a run left in `out`; a library leaves weights for the float one."""
    weights = out / "weights.safetensors"
    if not weights.is_file():
        return load_model(str(out)).model
    filled, of_layer = load_model(str(model)).model, load_file(weights)
    modules = {name: m for name, m in filled.named_modules() if hasattr(m, "weight")}
    layers = {layer.name for layer in linear_layers(filled)}
    if apart := (layers - of_layer.keys()) | (of_layer.keys() - modules.keys()):
        raise CourseError(
            f"{weights} and the model differ in these layers: {', '.join(sorted(apart))}."
        )
    for name, weight in of_layer.items():  # norms, too, where scales were folded into them
        LinearLayer(name, modules[name]).weight.copy_(weight)
    return filled


def _record(
    runs: Path,
    key: str,
    value: float,
    model_name: str,
    protocol: Protocol,
    one: Contender | None = None,
) -> None:
    unit = UNITS[key.rpartition(".")[2]]
    settings = {"settings": repr(one.method)} if one else {}
    set_context(profile="bench", device="cpu")
    record(
        f"bench.{key_part(model_name)}.{key}", value, unit, None,
        model=model_name, versions=one.runs[0]["versions"] if one else None, runs=runs,
        corpus="factbook", **asdict(protocol), **settings,
    )  # fmt: skip


def key_part(text: str) -> str:
    """As a folder and a part of a key may be called."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")
