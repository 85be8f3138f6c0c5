"""The notebooks as Google Colab runs them, without Colab.

A runtime of Colab is a list of installed packages: `tools/runtimes/<runtime>.txt`, as Google publishes it.
Here it becomes an environment that holds those of them that the course depends on, at Colab's
versions. The course's package is not among them: each notebook's set-up cell has to bring
it, as an archive like GitHub's, from a server on this machine. What was there before must be there
afterwards, in the same version.

Not Colab's are torch, which is the one of this Python (with sympy and setuptools, of which it asks for
newer ones), the version of Python, and the hundreds of packages that the course never touches.
Colab's own image has them all: give its Python to `run_on_python`.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from course_utils.tools import CourseError
from course_utils.tools.environments import python_of
from course_utils.tools.notebooks.execute import execute
from course_utils.tools.notebooks.pairs import Notebook, from_script, tagged, tags
from course_utils.tools.notebooks.side_by_side import execute_all
from course_utils.tools.notebooks.standard_cells import SETUP

LISTS = "course_utils/tools/runtimes"
# Of constraints.txt: what stands below it, no reader needs.
CLASSROOM = "# What the extra `classroom` adds"
# What a T4 has otherwise than this machine's CPU: run after the set-up cell.
AS_ON_A_T4 = """
import sys
sys.modules["triton"] = None  # its makers do not support a T4: importing it fails
import torch
from course_utils import profiles
profiles._dtype = lambda name, device: torch.float16

def addmm(*matrices, plain=torch.addmm):
    # GPT-2's product, which a CPU does a hundred times slower in float16.
    if any(matrix.dtype != torch.float16 for matrix in matrices):
        return plain(*matrices)
    return plain(*(matrix.float() for matrix in matrices)).half()

torch.addmm = addmm
"""
Versions = dict[str, str]  # package, as pip normalises its name -> version


class NotLikeColab(CourseError):
    """The set-up cell or a notebook does not behave on Colab's packages; the message says how."""


def runtimes(root: Path, names: list[str] | None = None) -> dict[str, Versions]:
    """What Colab's runtimes have installed, oldest first; those in `names` if any are given."""
    lists = {path.stem: path for path in sorted((root / LISTS).glob("*.txt"))}
    for name in names or []:
        if name not in lists:
            raise CourseError(f"there is no runtime {name!r}. There are: {', '.join(lists)}.")
    return {name: read_pins(lists[name]) for name in lists if not names or name in names}


def read_pins(path: Path, *, before: str = "\0") -> Versions:
    """The `name==version` lines of a requirements file, up to a line `before`."""
    lines = path.read_text(encoding="utf-8").partition(before)[0].splitlines()
    pins = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {canonicalize_name(name): version.strip() for name, version in pins}


def too_old(root: Path, pins: Versions) -> list[str]:
    """The package's requirements that a runtime does not meet, as `transformers>=4.57`."""
    needed = [r for r in _requirements(root) if canonicalize_name(r.name) in pins]
    return [
        str(requirement)
        for requirement in needed
        if not requirement.specifier.contains(pins[canonicalize_name(requirement.name)])
    ]


def run_on_runtime(
    root: Path, name: str, notebooks: list[Notebook], profile: str, *, t4: bool, jobs: int | None
) -> str:
    """Run notebooks on a runtime's packages; returns one line on how it went.

    On a runtime that is too old for the package the set-up cell has to say so and to change nothing.
    Raises `NotLikeColab` or, for a notebook, `NotebookFailed`.
    """
    pins = runtimes(root, [name])[name]
    folder = root / "runs" / "colab" / name
    python = make_environment(root, folder, pins)
    refused = too_old(root, pins)
    if not refused:
        told = run_on_python(root, python, notebooks, profile, folder, t4=t4, jobs=jobs)
        return f"{name}: {told}"
    before = installed(python)
    with course_archive(root) as address:
        message = set_up(python, address)
    for requirement in refused:
        if requirement not in message or "constraint" not in message:
            raise NotLikeColab(f"{name} lacks {requirement}, and the set-up cell says: {message}")
    _refuse_changes(before, installed(python), may_add=False)
    return f"{name}: refused by the set-up cell, as it must be, for lack of {', '.join(refused)}"


def run_on_python(
    root: Path,
    python: Path,
    notebooks: list[Notebook],
    profile: str,
    runs: Path,
    *,
    t4: bool,
    jobs: int | None,
) -> str:
    """Run notebooks with the packages of `python`, which the set-up cell may only add to.

    The first set-up cell runs alone, since it installs; then the notebooks, `jobs` at a time. With `t4`
    they compute in float16 and without Triton, as on Colab's card. Executed notebooks and records go to
    `runs`. Returns what happened in one line. Raises `NotLikeColab` or, for notebooks, `CourseError`.
    """
    before = installed(python)
    if "course-utils" in before:
        raise NotLikeColab(f"{python} has course_utils already: the set-up cell would do nothing.")
    every = {notebook.name: from_script(notebook) for notebook in notebooks}
    start = time.monotonic()
    with course_archive(root) as address:
        like_colab = {"python": str(python), "variables": colab_variables(address)}
        first = notebooks[0].name
        execute(
            only_set_up(every[first]), first, runs / "set-up.ipynb",
            profile=profile, runs=runs, **like_colab,
        )  # fmt: skip
        if t4:
            every = {name: as_on_a_t4(nb) for name, nb in every.items()}
        execute_all(every, profile=profile, runs=runs, jobs=jobs, **like_colab)
        again = set_up(python, address)
    if t4:
        for name in every:
            if "in float16 on " not in (runs / f"{name}.ipynb").read_text(encoding="utf-8"):
                raise NotLikeColab(f"{name} does not print that its profile takes float16.")
    if again:
        raise NotLikeColab(f"the set-up cell fails when it runs again: {again}")
    after = installed(python)
    _refuse_changes(before, after)
    added = [f"{name} {after[name]}" for name in after if name not in before]
    return (
        f"{len(notebooks)} notebooks in {time.monotonic() - start:.0f} s (profile {profile}); "
        f"{len(before)} packages were there and none moved; added: {', '.join(added)}"
    )


def as_on_a_t4(nb: NotebookNode) -> NotebookNode:
    """A notebook that computes in float16 and without Triton on any machine."""
    changed = copy.deepcopy(nb)
    after = 1 + next(at for at, cell in enumerate(nb.cells) if "setup" in tags(cell))
    changed.cells.insert(after, new_code_cell(AS_ON_A_T4))
    return changed


def only_set_up(nb: NotebookNode) -> NotebookNode:
    """A notebook that runs its set-up cell, and has the parameters that every notebook needs."""
    changed = copy.deepcopy(nb)
    changed.cells = [*tagged(changed, "setup"), *tagged(changed, "parameters")]
    return changed


def make_environment(root: Path, folder: Path, pins: Versions) -> Path:
    """The Python of an environment with a runtime's packages, without the course's own.

    Of the runtime's list it has what constraints.txt, where all lies that the course depends on, has
    too. It is kept in `folder` and used again, without what was added to it, until one of them changes.
    """
    # This Python's torch asks for newer ones of these than Colab has beside its own.
    own = {name: version for name, version in pins.items() if name not in ("setuptools", "sympy")}
    needed = read_pins(root / "constraints.txt", before=CLASSROOM)
    wanted = ["pip", *sorted(own.keys() & needed.keys())]
    pins = own | {"torch": metadata.version("torch")}
    asked = json.dumps([wanted, pins, sys.version])
    environment, made = folder / "environment", folder / "environment.json"
    python = python_of(environment)
    if made.exists() and _is_as_it_was(python, asked, json.loads(made.read_text())):
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(environment, with_pip=True)
    printed = _run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    packages = Path(printed.strip())
    copy_package("torch", packages)
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
    _pip(python, "install", "--constraint", str(constraints), *wanted)
    stub = packages / "google" / "colab" / "__init__.py"
    stub.parent.mkdir(parents=True, exist_ok=True)
    stub.write_text('"""Stands in for the package that Colab alone has."""\n')
    made.write_text(json.dumps({"asked": asked, "installed": installed(python)}))
    return python


def copy_package(name: str, packages: Path) -> None:
    """Copy a package of this Python, without its scripts, to the packages of another of its version.

    pip would fetch torch anew for each environment, on Linux with gigabytes of libraries for GPUs.
    """
    found = metadata.distribution(name)
    for folder in {file.parts[0] for file in found.files} - {".."}:
        shutil.copytree(found.locate_file(folder), packages / folder)


def _is_as_it_was(python: Path, asked: str, made: dict) -> bool:
    """Whether an environment is what is asked for, once what was added to it is gone."""
    if made["asked"] != asked:
        return False
    added = [name for name in installed(python) if name not in made["installed"]]
    if added:
        _pip(python, "uninstall", "--yes", *added)
    return installed(python) == made["installed"]


def installed(python: Path) -> Versions:
    """The packages that a Python has."""
    listed = json.loads(_pip(python, "list", "--format=json"))
    return {canonicalize_name(found["name"]): found["version"] for found in listed}


def set_up(python: Path, address: str) -> str:
    """Run the set-up cell, in an empty folder; returns what it says when it fails, else nothing."""
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [python, "-c", SETUP],
            cwd=empty, env=os.environ | colab_variables(address), capture_output=True, text=True,
        )  # fmt: skip
    return done.stderr if done.returncode else ""


def colab_variables(address: str) -> dict[str, str]:
    """The environment of a kernel on Colab, with the archive to install the package from."""
    return {
        "COLAB_RELEASE_TAG": "release-colab-external",
        "COURSE_UTILS_SPEC": address,
        "PYTHONPATH": "",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else Colab's debugger warns of frozen modules
    }


@contextmanager
def course_archive(root: Path) -> Iterator[str]:
    """The address of a zip archive of the course's files as they are, on a server that is local.

    As in GitHub's archives all files lie in one folder, and files that git ignores are left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_archive(root, Path(folder, "main.zip"))
        handler = partial(_Quiet, directory=folder)
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                yield f"http://127.0.0.1:{server.server_port}/main.zip"
            finally:
                server.shutdown()


def write_archive(root: Path, archive: Path) -> None:
    """Zip what git knows or would add, all of it in one folder."""
    # Named outright, the repository may belong to somebody else, as it does inside a container.
    git = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}", "-C", str(root)]
    listing = [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, capture_output=True, text=True)
    if done.returncode:
        raise CourseError(f"git cannot list the files of {root}: {done.stderr.strip()}")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name in sorted(set(done.stdout.split("\0")) - {""}):
            if (root / name).is_file():  # git still lists what was deleted and not committed
                zipped.write(root / name, f"course-main/{name}")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing: pip tells what it fetched."""


def _refuse_changes(before: Versions, after: Versions, may_add: bool = True) -> None:
    moved = [
        f"{name} {version} -> {after.get(name, 'gone')}"
        for name, version in before.items()
        if after.get(name) != version
    ]
    if not may_add:
        moved += [f"{name} {after[name]} is new" for name in after if name not in before]
    if moved:
        raise NotLikeColab(f"the set-up cell changed what was installed: {', '.join(moved)}.")


def _requirements(root: Path) -> list[Requirement]:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in project["dependencies"]]


def _pip(python: Path, *arguments: str) -> str:
    return _run([python, "-m", "pip", "--disable-pip-version-check", *arguments])


def _run(command: list) -> str:
    """What a command printed; raises `CourseError` with the end of its output if it fails."""
    environment = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        told = (done.stdout + done.stderr)[-3000:]
        raise CourseError(f"{' '.join(map(str, command[:6]))} ... failed:\n{told}")
    return done.stdout
