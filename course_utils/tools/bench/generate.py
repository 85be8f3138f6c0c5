"""`course bench generate`: milliseconds a token, and what a process holds, float and packed.

Each model is quantized once and saved. Every run is a process of its own, which loads what was saved: so its
memory holds no float weights that were there before. Contenders take turns, round by round.
"""

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from course_utils.compression import quantize_model
from course_utils.data.tokens import calibration_tokens
from course_utils.models import ModelUnavailable, load_model
from course_utils.results import record, set_context
from course_utils.tools import CourseError
from course_utils.tools.bench.quantize import PACKAGE, key_part, parse_method, run_logged

CALIBRATION = 4, 256  # sequences, tokens: quality is not measured here
FLOAT = "float"
ONCE = "course_utils.tools.bench.generate_once"


@dataclass
class Saved:
    """A model in a folder, and what its runs measured."""

    spec: str
    folder: Path
    bits_per_weight: float
    milliseconds: list[float] = field(default_factory=list)
    resident_bytes: list[int] = field(default_factory=list)


def bench_generate(
    root: Path,
    specs: list[str],
    model_name: str,
    *,
    tokens: int,
    rounds: int,
    threads: int,
    head: bool,
) -> Iterator[str | Table]:
    """Generate `tokens` with the float model and with each method's, one at a time, on `threads` threads.

    With `head`, embeddings and LM head of the packed models are int8 as well. Yields what is going on, and at
    last the table; its values are recorded. Raises `CourseError` for what is not there, and for a run that
    fails.
    """
    runs = root / "runs" / "bench"
    folder = runs / f"{model_name.replace('/', '_')}_generate"
    methods = {spec: parse_method(spec) for spec in specs}
    saved = []
    for spec in (FLOAT, *specs):
        try:
            model, tokenizer = load_model(model_name)
        except ModelUnavailable as error:
            raise CourseError(str(error)) from error
        bits = 32.0
        if spec != FLOAT:
            method, text = methods[spec], None
            if method.needs_calibration:
                length = min(CALIBRATION[1], model.config.max_position_embeddings)
                text = calibration_tokens(tokenizer, CALIBRATION[0], length)
            report = quantize_model(
                model, method, calibration=text, embeddings="int8" if head else None
            )
            bits = report.bits_per_weight
        place = folder / f"model-{len(saved)}"
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        saved.append(Saved(spec, place, bits))
        yield f"{spec}: saved"
    del model
    for turn in range(rounds):
        for one in saved[:: -1 if turn % 2 else 1]:
            _run(one, tokens, threads)
        yield f"round {turn + 1} of {rounds}"
    set_context(profile="bench", device="cpu")
    protocol = {"tokens": tokens, "rounds": rounds, "threads": threads, "int8_head": head}
    for one in saved:
        for name, value, unit in _measured(one, saved[0]):
            key = f"bench.generate.{model_name}.{key_part(one.spec)}.{name}"
            record(key, value, unit, model=model_name, runs=runs, **protocol)
    yield _table(saved, model_name, threads, head)


def _run(one: Saved, tokens: int, threads: int) -> None:
    out, log = one.folder / "measured.json", one.folder.with_suffix(".log")
    command = [sys.executable, "-m", ONCE, one.folder, str(tokens), out]
    if reason := run_logged(command, log, PACKAGE.parent, threads):
        raise CourseError(f"{one.spec}: {reason}")
    measured = json.loads(out.read_text("utf-8"))
    one.milliseconds += measured["milliseconds"]
    one.resident_bytes.append(measured["resident_bytes"])


def _measured(one: Saved, of_float: Saved) -> list[tuple[str, float, str]]:
    """Name, value and unit: medians over all tokens of all rounds."""
    median = statistics.median(one.milliseconds)
    return [
        ("milliseconds", median, "ms"),
        ("times_as_fast", statistics.median(of_float.milliseconds) / median, ""),
        ("resident_bytes", statistics.median(one.resident_bytes), "bytes"),
        ("bits_per_weight", one.bits_per_weight, "bits"),
    ]


def _table(saved: list[Saved], model_name: str, threads: int, head: bool) -> Table:
    table = Table(
        title=f"{model_name}, {threads} threads, {'int8' if head else 'float'} head of packed models",
        caption="Milliseconds a token: median and quartiles over all rounds. MB: the whole process, with "
        "Python and torch.",
    )
    table.add_column("method", overflow="fold")
    for title in ("bits/weight", "MB", "ms a token", "quartiles", "tokens/s", "x float"):
        table.add_column(title, justify="right")
    for one in saved:
        (_, median, _), (_, ratio, _), (_, resident, _), (_, bits, _) = _measured(one, saved[0])
        low, _, high = statistics.quantiles(one.milliseconds, n=4)
        cells = f"{bits:.3f}", f"{resident / 1e6:,.0f}", f"{median:.2f}", f"{low:.2f}-{high:.2f}"
        table.add_row(one.spec, *cells, f"{1e3 / median:.1f}", f"{ratio:.2f}")
    return table
