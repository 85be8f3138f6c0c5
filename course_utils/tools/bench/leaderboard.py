"""`course leaderboard`: every method under one protocol, a record a row, so that it can be interrupted.

A row is quantized in a process of its own, as in `bench quantize`, which tells seconds and peak memory and
saves the packed model; another fresh process tells the memory that loading takes. This process then compares
the model with the float one on two texts, lets both fill in the blanks of a cloze task, and times them in
turns. Fresh processes are forked, where the system can, from one that has only imported: that saves seconds a
row. A row is measured again where its method's code, its settings or the protocol changed; `ship` writes the
rows for the notebook.
"""

import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from course_utils.compression.decoding import decode_model
from course_utils.data.tokens import calibration_tokens
from course_utils.evaluation import Protocol as TextProtocol
from course_utils.evaluation import Text, compare, file_bytes, tensor_bytes
from course_utils.evaluation.cloze import Blank, blanks, filled
from course_utils.evaluation.compare import Comparison
from course_utils.evaluation.leaderboard import FLOAT, Row, Score, row_from
from course_utils.evaluation.timing import time_per_token
from course_utils.files import replacing
from course_utils.models import ModelUnavailable, linear_layers, load_model
from course_utils.results.entries import _commit, _versions
from course_utils.tools import CourseError
from course_utils.tools.bench import quantize_once
from course_utils.tools.bench.leaderboard_rows import LARGE, ROWS, Entry
from course_utils.tools.bench.quantize import PACKAGE, key_part, parse_method
from course_utils.tools.notebooks.sources import sources_used
from course_utils.tools.notebooks.stamps import code

KIND = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
PROCESSES = multiprocessing.get_context(KIND)
PROCESSES.set_forkserver_preload(["course_utils.tools.bench.quantize_once"])
T = TypeVar("T")
CORPORA = ("factbook", "wikipedia")  # the second is another domain for course-lm
REMEMBERED = 1e9  # bytes of the float model's logits that are kept for the next row


@dataclass(frozen=True)
class Protocol:
    """What all rows of a leaderboard share."""

    sequences: int = 16  # of the calibration
    window: int = 512  # its length, and the evaluation's window; or as many positions as there are
    tokens: int = 8192  # of each text
    words: int = 200  # of the cloze task
    context: int = 32  # tokens before a word
    generated: int = 32  # tokens, for the speed
    rounds: int = 3  # of generating, in turns with the float model
    threads: int = 1
    corpora: tuple[str, ...] = CORPORA


def loaded_bytes(folder: Path) -> int:
    """By how much this process grows when it loads the model in `folder`, and one of another kind before."""
    load_model("course-lm")  # so that what any model needs (code, buffers) is there before
    before = psutil.Process().memory_info().rss
    for tensor in load_model(str(folder)).model.state_dict().values():
        tensor.sum()  # read every page: files are mapped into memory lazily
    return psutil.Process().memory_info().rss - before


class _Remembering(nn.Module):
    """A model that gives the same logits again without computing them, as far as `REMEMBERED` reaches."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.config = model, model.config
        self.known: dict[bytes, object] = {}
        self.bytes = 0

    def forward(self, input_ids: Tensor):
        key = input_ids.numpy().tobytes()
        if key in self.known:
            return self.known[key]
        output = self.model(input_ids=input_ids, use_cache=False)
        if self.bytes + output.logits.nbytes <= REMEMBERED:
            self.known[key] = output
            self.bytes += output.logits.nbytes
        return output


class Run:
    """A leaderboard's float model, texts and places on disk."""

    def __init__(self, root: Path, model_name: str, protocol: Protocol):
        try:
            self.model, self.tokenizer = load_model(model_name)
        except ModelUnavailable as error:
            raise CourseError(str(error)) from error
        positions = getattr(self.model.config, "max_position_embeddings", protocol.window)
        window = min(protocol.window, positions)
        self.name, self.protocol = model_name, protocol
        self.told = asdict(protocol) | {"window": window, "corpora": list(protocol.corpora)}
        self.folder = root / "runs" / "leaderboard" / key_part(model_name)
        self.reference = _Remembering(self.model).eval()
        try:
            self.texts = {
                corpus: TextProtocol(corpus, protocol.tokens, window).text(self.tokenizer)
                for corpus in protocol.corpora
            }
            self.words = blanks(self.tokenizer, protocol.words, protocol.context)
            calibration = calibration_tokens(self.tokenizer, protocol.sequences, window)
        except ValueError as error:
            raise CourseError(str(error)) from error
        self.model.save_pretrained(self.folder / FLOAT)
        self.tokenizer.save_pretrained(self.folder / FLOAT)
        save_file({"tokens": calibration}, self.folder / FLOAT / "calibration.safetensors")
        torch.set_num_threads(protocol.threads)

    def record_of(self, entry: Entry) -> Path:
        """Where a row is kept."""
        return self.folder / f"{entry.name}.json"

    def stamp(self, entry: Entry) -> str:
        """A hash of what a row depends on: its settings, the protocol, and the code of its method."""
        content = hashlib.sha256(json.dumps([entry.spec, self.told]).encode())
        name = entry.spec.partition(":")[0]
        if entry.spec != FLOAT:
            method = PACKAGE / "quantizers" / f"{name}.py"
            for file in [method, *sources_used(method, PACKAGE)]:
                if file.suffix == ".py":
                    content.update(code(file.read_text("utf-8")).encode())
        return content.hexdigest()

    def finished(self, entry: Entry) -> Row | None:
        """The row that is there and still holds, or None."""
        file = self.record_of(entry)
        kept = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        if kept.get("stamp") != self.stamp(entry):
            return None
        words = {name: getattr(entry, name) for name in ("stored", "kernel", "algorithm")}
        return row_from(kept["row"] | words)

    def measure(self, entry: Entry) -> Row:
        """Measure a row, and keep it."""
        row = self._float_row(entry) if entry.spec == FLOAT else self._row(entry)
        told = {"stamp": self.stamp(entry), "row": asdict(row), "machine": machine(self.protocol)}
        with replacing(self.record_of(entry)) as partial:
            partial.write_text(json.dumps(told), "utf-8")
        return row

    def _row(self, entry: Entry) -> Row:
        method, out = parse_method(entry.spec), self.folder / "out"
        settings = {"name": method.name, **asdict(method)}
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        self._fresh(quantize_once.main, self.folder / FLOAT, settings, out)
        measured = json.loads((out / "measured.json").read_text("utf-8"))
        added = measured["peak_bytes"] - measured["loaded_bytes"]
        packed = load_model(str(out)).model
        sizes = tensor_bytes(packed), file_bytes(out), self._fresh(loaded_bytes, out)
        milliseconds, ratio = self._in_turns(packed)
        with suppress(
            ValueError
        ):  # where weights alone are rounded, their values give the same sooner
            packed = decode_model(packed)
        shutil.rmtree(out)
        return Row(
            entry.name, method.name, _plain(asdict(method)),
            entry.stored, entry.kernel, entry.algorithm, method.needs_calibration,
            measured["bits_per_weight"], *sizes, measured["seconds"], added,
            milliseconds, ratio, *self._quality(packed),
        )  # fmt: skip

    def _float_row(self, entry: Entry) -> Row:
        place = self.folder / FLOAT
        sizes = tensor_bytes(self.model), file_bytes(place), self._fresh(loaded_bytes, place)
        milliseconds, _ = self._in_turns(self.model)
        return Row(
            entry.name, FLOAT, {}, entry.stored, entry.kernel, entry.algorithm, False, 32.0,
            *sizes, 0.0, 0, milliseconds, 1.0, *self._quality(self.reference),
        )  # fmt: skip

    def _fresh(self, function: Callable[..., T], *arguments) -> T:
        """`function(*arguments)` in a process of its own."""
        threads = self.protocol.threads
        with ProcessPoolExecutor(1, PROCESSES, torch.set_num_threads, (threads,)) as fresh:
            return fresh.submit(function, *arguments).result()

    def _in_turns(self, model: nn.Module) -> tuple[float, float]:
        """Milliseconds a token, and how many times as fast as the float model: medians over all rounds."""
        prompt = next(iter(self.texts.values())).tokens[:16]
        own, other = [], []
        for _ in range(self.protocol.rounds):
            for one, times in ((model, own), (self.model, other)):
                timing = time_per_token(one, prompt, new_tokens=self.protocol.generated)
                times += timing.milliseconds
        median = statistics.median(own)
        return median, statistics.median(other) / median

    def _quality(self, model: nn.Module) -> tuple[dict[str, Score], tuple[int, ...]]:
        scores = {
            corpus: _score(compare(model, self.reference, text))
            for corpus, text in self.texts.items()
        }
        return scores, tuple(filled(model, self.words).int().tolist())


REFERENCE = Entry(FLOAT, FLOAT, "float32", "float", "none")


def measure_all(
    root: Path, model_name: str, protocol: Protocol, names: list[str] | None = None
) -> Iterator[str]:
    """Measure the rows called `names` (default: all) that are not finished; says how it goes.

    Raises `CourseError` for a row that there is not, and at the end for rows that failed.
    """
    known = {entry.name: entry for entry in ROWS}
    if unknown := [name for name in names or () if name not in known]:
        raise CourseError(f"no row {', '.join(unknown)}: there are {', '.join(known)}.")
    run = Run(root, model_name, protocol)
    entries = [known[name] for name in names] if names else _fitting(run.model)
    where = machine(protocol)
    yield f"{model_name} on {where['processor']}, {where['cores']} cores, {protocol.threads} threads"
    waiting = [entry for entry in (REFERENCE, *entries) if run.finished(entry) is None]
    yield f"{len(waiting)} of {len(entries) + 1} rows to measure"
    failed, start = [], time.perf_counter()
    for number, entry in enumerate(waiting, 1):
        try:
            row = run.measure(entry)
        except (CourseError, ValueError, RuntimeError) as error:
            failed.append(entry.name)
            yield f"{entry.name}: {error}"
            continue
        left = (time.perf_counter() - start) / number * (len(waiting) - number) / 60
        lost = " ".join(f"{corpus} {_lost(run, row, corpus):+.4f}" for corpus in run.texts)
        yield f"{entry.name}: {row.bits:.3f} bits, nats lost: {lost}; about {left:.0f} min left"
    if failed:
        raise CourseError(f"{len(failed)} rows failed: {', '.join(failed)}. The others are kept.")


def ship(root: Path, model_name: str, protocol: Protocol, out: Path) -> str:
    """Write all finished rows of a model into the folder `out`, for the notebook; says what it wrote.

    Raises `CourseError` if the float model's row, or any row but that, is not there.
    """
    run = Run(root, model_name, protocol)
    fitting = _fitting(run.model)
    rows = [row for entry in (REFERENCE, *fitting) if (row := run.finished(entry))]
    if len(rows) < 2 or rows[0].name != FLOAT:
        raise CourseError(
            f"{len(rows)} rows of {model_name} are measured by this protocol: `course leaderboard "
            f"--model {model_name}` first."
        )
    told = {
        "model": model_name,
        "protocol": run.told,
        "machine": json.loads(run.record_of(REFERENCE).read_text("utf-8"))["machine"],
        "tokens": {corpus: _predicted(text) for corpus, text in run.texts.items()},
        "words": [_document(word, run.words) for word in run.words],
        "rows": [asdict(row) for row in rows],
    }
    file = out / f"{model_name}.json"
    with replacing(file) as partial:
        partial.write_text(_compact(told), "utf-8")
    missing = len(fitting) + 1 - len(rows)
    return f"{len(rows)} rows written to {file}, {missing} not measured yet"


def machine(protocol: Protocol) -> dict:
    """What the measured seconds and bytes depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": protocol.threads,
        "system": platform.system(),
        "versions": _versions(),
        "commit": _commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _fitting(model: nn.Module) -> list[Entry]:
    weights = sum(layer.weight.numel() for layer in linear_layers(model))
    return [entry for entry in ROWS if weights < LARGE or not entry.small]


def _score(found: Comparison) -> Score:
    sums = torch.zeros(len(found.unit.unique()), dtype=torch.float64)
    sums.index_add_(0, found.unit.unique(return_inverse=True)[1], found.nats)
    return Score(
        tuple(round(nats, 4) for nats in sums.tolist()),
        found.divergence.value,
        found.divergence.error,
        found.agreement.value,
        found.agreement.error,
    )


def _predicted(text: Text) -> list[int]:
    """How many tokens of each document are predicted: all but the first of each window."""
    predicted = torch.arange(len(text.tokens)) % text.window != 0
    return text.documents[predicted].unique(return_counts=True)[1].tolist()


def _document(word: Blank, words: list[Blank]) -> int:
    return sorted({w.document for w in words}).index(word.document)


def _lost(run: Run, row: Row, corpus: str) -> float:
    of_float = run.finished(REFERENCE)
    tokens = sum(_predicted(run.texts[corpus]))
    return (sum(row.scores[corpus].nats) - sum(of_float.scores[corpus].nats)) / tokens


def _plain(settings: dict) -> dict:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


def _compact(told: dict) -> str:
    """JSON with a row on a line."""
    head = {key: value for key, value in told.items() if key != "rows"}
    rows = ",\n".join(json.dumps(row) for row in told["rows"])
    return f'{json.dumps(head)[:-1]},\n"rows": [\n{rows}\n]}}\n'
