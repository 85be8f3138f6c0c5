"""Entries of measured values: one JSON object each, written by runs, merged by `accept`.

An entry is known by its key, profile, model and protocol together: the same quantity measured in two
profiles, or on windows of two lengths, is two entries, and measuring it again in one replaces it.
"""

import functools
import hashlib
import json
import math
import numbers
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import course_utils
from course_utils.files import replacing

KEY = re.compile(r"[a-z][a-z0-9_]*(\.[A-Za-z0-9_-]+)+")
FIELDS = (
    "key", "value", "unit", "tolerance", "profile", "model", "device", "versions", "commit", "protocol"
)  # fmt: skip
_context: dict[str, str | None] = {"profile": None, "model": None, "device": "cpu"}


def set_context(
    *, profile: str | None = None, model: str | None = None, device: str | None = None
) -> None:
    """Say where the values recorded from now on come from; what is not given stays as it was.

    `profiles.resolve` sets profile and device.
    """
    given = {"profile": profile, "model": model, "device": device}
    _context.update({name: value for name, value in given.items() if value is not None})


def record(
    key: str,
    value: float,
    unit: str = "",
    tolerance: float | None = None,
    *,
    model: str | None = None,
    versions: dict[str, str] | None = None,
    runs: Path | None = None,
    **protocol: str | float | bool | None,
) -> None:
    """Write one measured value to the folder `results` in `runs` (default `$COURSE_RUNS`, or `runs`).

    `key`: dotted, as `llm_int8.course-lm.int8.perplexity`; its first part names the file that the
    value will be accepted into. `tolerance`: how far, in `unit`, a later run may lie from the
    accepted value; 0 asks for the same value, None (a timing) says that it is not compared. `model`
    defaults to the context's; `protocol` is what another needs to measure the same again, and
    `versions` are those of what else took part, beside (or instead of) this process's.
    Raises `ValueError` for a bad key, a value that is no finite number, a bad tolerance, a protocol
    that is not JSON, or when no profile is known.
    """
    entry = {
        "key": key,
        "value": value,
        "unit": unit,
        "tolerance": tolerance,
        "profile": _context["profile"] or os.environ.get("COURSE_PROFILE"),
        "model": model or _context["model"],
        "device": _context["device"],
        "versions": _versions() | (versions or {}),
        "commit": _commit(),
        "protocol": protocol,
    }
    _validate(entry, where=f"record({key!r})")
    name = hashlib.sha256(repr(_identity(entry)).encode()).hexdigest()[:12]
    _write_json(_recorded(runs) / f"{key}.{name}.json", entry)


def list_runs(runs: Path | None = None) -> list[dict]:
    """Entries recorded in `runs` (default as `record`'s), ordered by key, profile, model and protocol."""
    return sorted(map(_read_entry, _recorded(runs).glob("*.json")), key=_identity)


def accepted(root: Path) -> list[dict]:
    """Accepted entries, those of `root/results`, ordered by key, profile, model and protocol."""
    entries = []
    for file in (Path(root) / "results").glob("*.json"):
        if file.name != "tables.json":
            for entry in _read_json(file):
                _validate(entry, where=str(file))
                entries.append(entry)
    return sorted(entries, key=_identity)


def accept(root: Path, runs: list[dict], *, replace: bool = False) -> list[dict]:
    """Merge run entries, as `list_runs()` gives them, into `root/results`; returns those entries.

    An accepted entry of the same key, profile, model and protocol is replaced; all others stay. With
    `replace`, those go that tell the same quantity in another protocol.
    """
    if not runs:
        raise ValueError("nothing to accept: no values were recorded. Run a notebook first.")
    measured = set(map(_quantity, runs))
    stay = [e for e in accepted(root) if not (replace and _quantity(e) in measured)]
    merged = {_identity(entry): entry for entry in [*stay, *runs]}
    for part in sorted({_part(entry["key"]) for entry in runs}):
        of_part = [merged[i] for i in sorted(merged) if _part(merged[i]["key"]) == part]
        _write_json(Path(root) / "results" / f"{part}.json", of_part)
    return runs


def compare(root: Path, runs: list[dict]) -> list[str]:
    """What run entries, as `list_runs()` gives them, say otherwise than the accepted ones, a line each.

    Values are compared within the *accepted* tolerance: a run cannot loosen its own, and entries that
    were accepted without one are not compared. What was never accepted in its profile, for its model and
    by its protocol is a line too, and so is a run that recorded nothing: else they would pass unseen.
    """
    if not runs:
        return [
            "no values were recorded, so none can be compared: was COURSE_RUNS set for the run?"
        ]
    known = {_identity(entry): entry for entry in accepted(root)}
    deviations = []
    for run in runs:
        entry = known.get(_identity(run))
        where = f"{run['key']} (profile {run['profile']}, model {run['model']})"
        if entry is None:
            others = [e["protocol"] for e in known.values() if _quantity(e) == _quantity(run)]
            by = f" by the protocol {run['protocol']}, but by {others}" if others else ""
            deviations.append(
                f"{where}: {run['value']:.6g} {run['unit']} was never accepted{by}. Look at it, then "
                f"`course results accept --profile {run['profile']}`"
            )
        elif entry["tolerance"] is not None:
            off = abs(run["value"] - entry["value"])
            if off > entry["tolerance"] or run["unit"] != entry["unit"]:
                deviations.append(
                    f"{where}: {run['value']:.6g} {run['unit']} is {off:.3g} from the accepted "
                    f"{entry['value']:.6g} {entry['unit']}, tolerance {entry['tolerance']:g}"
                )
    return deviations


def _quantity(entry: dict) -> tuple[str, str, str]:
    return entry["key"], entry["profile"], entry["model"] or ""


def _identity(entry: dict) -> tuple[str, str, str, str]:
    return *_quantity(entry), json.dumps(entry["protocol"], sort_keys=True)


def _part(key: str) -> str:
    return key.split(".", 1)[0]


def _recorded(runs: Path | None) -> Path:
    return Path(runs or os.environ.get("COURSE_RUNS", "runs")) / "results"


def _validate(entry: dict, where: str) -> None:
    if set(entry) != set(FIELDS):
        raise ValueError(
            f"{where}: an entry has the fields {', '.join(FIELDS)}; found {', '.join(entry)}"
        )
    key, value, tolerance = entry["key"], entry["value"], entry["tolerance"]
    if not isinstance(key, str) or not KEY.fullmatch(key):
        raise ValueError(
            f"{where}: key {key!r} must be at least two parts joined by dots, of letters, digits, _ "
            "and -, the first in lower case, as llm_int8.course-lm.int8.perplexity"
        )
    _require_number(value, f"{where}: value")
    if tolerance is not None:
        _require_number(tolerance, f"{where}: tolerance")
        if tolerance < 0:
            raise ValueError(f"{where}: tolerance {tolerance} must not be negative")
    if not isinstance(entry["protocol"], dict):
        raise ValueError(f"{where}: the protocol {entry['protocol']!r} must be fields by name")
    if not entry["profile"]:
        raise ValueError(f"{where}: no profile is known; call profiles.resolve(...) first")
    try:
        json.dumps(entry["protocol"], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: the protocol must be plain finite JSON values: {error}"
        ) from error


def _require_number(value, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{what} {value!r} must be a number; for a tensor give its .item()")
    if not math.isfinite(value):
        raise ValueError(
            f"{what} {value!r} must be finite: find out what went wrong, do not record it"
        )


@functools.cache
def _versions() -> dict[str, str]:
    packages = ("torch", "numpy", "transformers")
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "course_utils": course_utils.__version__,
    }


@functools.cache
def _commit() -> str:
    """Commit of the checkout that this package lies in, marked if it is modified; else its version."""
    checkout = Path(course_utils.__file__).parent.parent
    version = f"v{course_utils.__version__}"
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return version
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    run = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    return run.stdout.strip() or version  # a checkout without any commit describes nothing


def _read_entry(file: Path) -> dict:
    entry = _read_json(file)
    _validate(entry, where=str(file))
    return entry


def _read_json(file: Path):
    try:
        return json.loads(file.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}): delete it and run again") from error


def _write_json(path: Path, content) -> None:
    text = json.dumps(content, indent=1, allow_nan=False, default=float) + "\n"
    with replacing(path) as partial:
        partial.write_text(text, "utf-8")
