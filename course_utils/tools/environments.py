"""Python environments that commands make, beside the one they run in; and the machine they share."""

import os
from pathlib import Path


def python_of(environment: Path) -> Path:
    """The Python of an environment, on any system."""
    return environment / ("Scripts" if os.name == "nt" else "bin") / "python"


def cores() -> int:
    """The processors that this process may use; all of the machine where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
