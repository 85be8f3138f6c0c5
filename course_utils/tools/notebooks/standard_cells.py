"""The cells that are the same in all notebooks: one text, written into the scripts from here."""

import re

from course_utils import REPOSITORY, REVISION, __version__

ASSIGNMENTS = "assignments"  # the branch that `course release-assignments` is meant to be pushed as

SETUP = f'''\
# Set-up: installs the course's package where it is missing, as on Colab.
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile

VERSION = "{__version__}"
ARCHIVE = "https://github.com/{REPOSITORY}/archive/{REVISION}.zip"
if importlib.util.find_spec("course_utils") is None:
    spec = "course_utils[oracles] @ " + os.environ.get("COURSE_UTILS_SPEC", ARCHIVE)
    # What is installed already stays as it is: pip may only add to it.
    pins = {{}}
    for d in reversed(list(importlib.metadata.distributions())):
        pins[re.sub("[-_.]+", "-", str(d.name)).lower()] = f"{{d.name}}=={{d.version}}\\n"
    pin = re.compile(r"\\S+==\\d+(\\.\\d+)*((a|b|rc|\\.post|\\.dev)\\d+)*(\\+[\\w.]+)?\\n")
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{{folder}}/constraints.txt", "w") as file:
            file.writelines(filter(pin.fullmatch, pins.values()))
        command = [sys.executable, "-m", "pip", "install", "-c", file.name, spec]
        pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode != 0:
        hint = "If versions conflict on Colab: Runtime > Change runtime type > latest."
        raise RuntimeError(f"pip failed:\\n{{(pip.stdout + pip.stderr)[-2000:]}}{{hint}}")
    importlib.invalidate_caches()
import course_utils

if course_utils.__version__ != VERSION:
    found = f"The notebook needs course_utils {{VERSION}}, not {{course_utils.__version__}}"
    remedy = "On Colab open it by its badge; elsewhere install its commit, and restart"
    raise RuntimeError(f"{{found}}. {{remedy}}.")
'''


def colab(name: str, branch: str = REVISION) -> str:
    """The address that opens the notebook `<folder>/<name>` of a branch in Colab."""
    return f"https://colab.research.google.com/github/{REPOSITORY}/blob/{branch}/{name}.ipynb"


def badge(name: str, branch: str = REVISION) -> str:
    """The Open-in-Colab badge of the notebook `<folder>/<name>`, in markdown."""
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({image})]({colab(name, branch)})"


def first_line(name: str, exercises: bool) -> str:
    """A notebook's first line: its badge, and the way to its student version if it has `exercises`."""
    if not exercises:
        return badge(name)
    return f"{badge(name)} to read, or [work on its exercises in Colab]({colab(name, ASSIGNMENTS)})"


def write_standard_cells(script: str, name: str) -> str:
    """The text of a script with the set-up cell and the badge as they are defined here.

    The set-up cell is the one tagged `setup`, the badges the first line of the one tagged `badge`; a
    script without them is returned as it is, and `course check` asks for them.
    """
    first = first_line(name, bool(re.search(r'^# %%.*"exercise', script, re.M)))
    lines = ["# " + first, *_lines_of(script, "badge")[1:]]
    script = _replace_cell(script, "badge", "\n".join(lines) + "\n")
    return _replace_cell(script, "setup", SETUP)


def _cell(tag: str) -> re.Pattern:
    """A cell of a percent script with this tag: its first line, and its text up to the next."""
    return re.compile(
        rf'^(?P<head># %%[^\n]*"{tag}"[^\n]*\n)(?P<text>.*?)(?P<gap>\n*)(?=^# %%|\Z)', re.M | re.S
    )


def _lines_of(script: str, tag: str) -> list[str]:
    found = _cell(tag).search(script)
    return found["text"].splitlines() if found else []


def _replace_cell(script: str, tag: str, text: str) -> str:
    def new(found: re.Match) -> str:
        return found["head"] + text.rstrip("\n") + (found["gap"] or "\n")

    return _cell(tag).sub(new, script, count=1)
