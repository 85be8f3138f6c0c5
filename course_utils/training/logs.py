"""The logs of trainings whose results are shipped: a JSON file for each run, named as the run."""

import json
import platform
from pathlib import Path

import torch
import transformers


def of_this_run(curve: list[dict]) -> dict:
    """What every log says at its end: seconds, versions, threads, and the `curve` of `loop.train`."""
    return {
        "seconds": round(sum(row["seconds"] for row in curve), 1),
        "cpu_seconds": round(sum(row["cpu_seconds"] for row in curve), 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "curve": curve,
    }


def read_logs(folder: Path) -> dict[str, dict]:
    """The logs in `folder`, by the names of their runs."""
    return {
        path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))
    }
