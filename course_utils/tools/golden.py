"""Golden vectors: what production libraries make of small layers, for the tests to compare with.

Libraries that cannot be installed beside the course, since they ask for other versions of what it
uses, each get an environment of their own: `tools/oracles/LIBRARY/` holds its `requirements.txt` and
its scripts. A script `WHAT.py` writes `tests/golden/LIBRARY_WHAT.safetensors`, with the versions used
in its metadata, from `tests/golden/WHAT_layers.safetensors`, which `tools/oracles/WHAT_layers.py`
wrote before. Layers that are there are kept: on another machine sums come out otherwise in their last digits,
and with them all answers. Delete the file to make them anew. A script `model/METHOD.py` quantizes a
whole model: `course bench quantize` runs it.
"""

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

from course_utils.cache import cache_dir
from course_utils.tools import CourseError
from course_utils.tools.environments import python_of


def libraries(root: Path, names: list[str] | None = None) -> list[Path]:
    """The folders of the libraries; those in `names` if any are given."""
    folders = {
        path.parent.name: path.parent
        for path in root.glob("course_utils/tools/oracles/*/requirements.txt")
    }
    for name in names or []:
        if name not in folders:
            raise CourseError(
                f"there is no oracle {name!r}. There are: {', '.join(sorted(folders))}."
            )
    return [folders[name] for name in sorted(folders) if not names or name in names]


def write_vectors(root: Path, names: list[str] | None = None) -> Iterator[str]:
    """Write the golden vectors of libraries anew; yields what is going on, line by line.

    Environments are kept in the course's cache, and made again when their requirements change. Raises
    `CourseError` if something cannot be installed, or a script fails.
    """
    chosen, golden = libraries(root, names), root / "tests" / "golden"
    golden.mkdir(parents=True, exist_ok=True)
    for script in sorted(root.glob("course_utils/tools/oracles/*_layers.py")):
        layers = golden / f"{script.stem}.safetensors"
        if layers.exists():
            yield f"{script.stem}: kept; to make them anew, delete {layers}"
        else:
            yield f"{script.stem}: weights, inputs, Hessians"
            _run([sys.executable, script, golden])
    for folder in chosen:
        yield f"{folder.name}: installing it takes some minutes the first time"
        made = environment(folder)
        python = make_environment(folder / "requirements.txt", made)
        for script in sorted(folder.glob("*.py")):  # not those in model/
            yield f"{folder.name}: {script.stem}"
            _run([python, script, golden], cwd=made)  # where libraries may leave their logs


def environment(library: Path) -> Path:
    """The folder of the environment of a library, one of `libraries`.

    In the cache, and not beside the course: GPTQModel compiles, which fails where a path has a space.
    """
    return cache_dir() / "oracles" / library.name


def is_made(requirements: Path, folder: Path) -> bool:
    """Whether the environment in `folder` was made from `requirements` as they are now."""
    made = folder / "requirements.txt"
    return made.is_file() and made.read_text("utf-8") == requirements.read_text("utf-8")


def make_environment(requirements: Path, folder: Path) -> Path:
    """The Python of an environment in `folder` that holds what `requirements` names, and no more."""
    python = python_of(folder)
    if not is_made(requirements, folder):
        venv.create(folder, clear=True, with_pip=True)
        _run([python, "-m", "pip", "install", "--quiet", "--requirement", requirements])
        shutil.copy(requirements, folder / "requirements.txt")
    return python


def _run(command: list, cwd: Path | None = None) -> None:
    """Run a command, whose output stays in sight."""
    # One thread, so that sums of floats are taken in one order.
    environment = os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    if subprocess.run(command, env=environment, cwd=cwd).returncode:
        raise CourseError(f"{' '.join(map(str, command))} failed: see above.")
