"""Python environments that commands make, beside the one they run in."""

import os
from pathlib import Path


def python_of(environment: Path) -> Path:
    """The Python of an environment, on any system."""
    return environment / ("Scripts" if os.name == "nt" else "bin") / "python"
