"""Stamps: what a notebook was built from, so that only what changed is built again.

A notebook can print something else when its script changes, or a part of the package that it uses.
The parts are the packages and modules directly inside `course_utils`. Those used are found by
following imports, a part always as a whole, since it may load its own modules by name. A new method
therefore asks for a rebuild of the notebooks on methods, and of no others. `build` and `cli` are
never among them: no notebook may import them (a test holds that). The trained weights in `assets`
always count; docstrings and comments do too, because telling them apart is not worth the machinery.
"""

import ast
import hashlib
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import course_utils
from course_utils.tools.notebooks.pairs import Notebook


def stamp(notebook: Notebook) -> dict:
    """Hashes of the script and of the package's sources that it uses, as they are now."""
    package = notebook.root / "course_utils"
    return {
        "script": _digest([notebook.script], notebook.root),
        "package": _digest(sources_used(notebook.script, package), notebook.root),
    }


def versions() -> dict[str, str]:
    """Versions that the outputs were made with; told to the reader, not compared."""
    libraries = {name: version(name) for name in ("torch", "numpy", "transformers")}
    course = {"course_utils": course_utils.__version__}
    return {"python": platform.python_version(), **libraries, **course}


def sources_used(script: Path, package: Path) -> list[Path]:
    """The package's files that a script depends on, with the assets."""
    found, waiting = set(), {"__init__", *parts_imported(script)}
    while waiting:
        part = waiting.pop()
        found.add(part)
        for source in _sources(package, part):
            waiting |= parts_imported(source) - found
    files = [source for part in found for source in _sources(package, part)]
    assets = package / "assets"
    files += [f for f in assets.rglob("*") if f.is_file() and f.suffix != ".md"]
    return sorted(files)


def parts_imported(source: Path) -> set[str]:
    """First names below `course_utils` that a Python file imports, anywhere in it."""
    return {name.split(".")[1] for name in course_imports(source) if "." in name}


def course_imports(source: Path) -> set[str]:
    """Full dotted names from `course_utils` that a Python file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"), filename=str(source))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "course_utils"}


def _sources(package: Path, part: str) -> list[Path]:
    """Files of a part; none if the name is no part but something that `__init__` defines."""
    module, folder = package / f"{part}.py", package / part
    return [module] if module.is_file() else sorted(folder.rglob("*.py"))


def _digest(files: Iterable[Path], root: Path) -> str:
    """SHA-256 over names and contents; line endings of text count as newlines everywhere."""
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        if file.suffix == ".py":
            content = content.replace(b"\r\n", b"\n")
        digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
