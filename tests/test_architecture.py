"""The arrows between the package's parts, and what importing it may not do."""

import subprocess
import sys
from pathlib import Path

import pytest

from course_utils.compression.methods import method_class, method_names
from course_utils.tools.notebooks.pairs import FOLDERS
from course_utils.tools.notebooks.sources import course_imports, parts_imported

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "course_utils"
# Each part may import those of the floors below its own, and the small ones of everybody.
FLOORS = [
    {"kernels", "grids"},
    {"models", "data"},
    {"evaluation", "plotting", "results", "training"},
    {"compression", "profiles"},
    {"pruning"},  # its methods have their doors among the quantizers
    {"quantizers", "formats"},
    {"finetuning", "distillation"},
    {"tools"},
    {"__main__"},
]
SMALL = {"cache", "digest", "files", "references"}

PARTS = {
    path.stem: [path] if path.is_file() else sorted(path.rglob("*.py"))
    for path in sorted(PACKAGE.iterdir())
    if path.suffix == ".py" or (path / "__init__.py").is_file()
}
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__main__" and (path.parent / "__init__.py").is_file()  # no lone scripts
)


def imports_of(part: str) -> set[str]:
    """The other parts that a part imports."""
    found = set().union(*(parts_imported(source) for source in PARTS[part]))
    return (found & set(PARTS)) - {part, "__init__"}


def test_the_arrows_are_read_from_the_sources():
    assert {"compression", "kernels"} <= imports_of("quantizers")


def test_every_part_has_its_floor():
    assert set(PARTS) <= SMALL.union(*FLOORS) | {"__init__"}


@pytest.mark.parametrize("part", sorted(SMALL))
def test_small_parts_import_no_other(part):
    assert not imports_of(part)


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_arrows_point_down(floor):
    below = SMALL.union(*FLOORS[:floor])
    for part in FLOORS[floor] & set(PARTS):
        assert imports_of(part) <= below, part


def test_kernels_know_nothing_of_methods_and_models():
    assert imports_of("kernels") <= {"cache"}


def test_nothing_but_the_entry_point_imports_cli():
    importing = [path for path in PACKAGE.rglob("*.py") if "tools.cli" in path.read_text("utf-8")]
    assert {path.relative_to(PACKAGE).parts[:2] for path in importing} <= {
        ("__main__.py",),
        ("tools", "cli"),
    }


def test_compression_and_quantizers_import_no_method_but_when_asked():
    code = (
        "import sys, course_utils.compression, course_utils.quantizers as q\n"
        "loaded = [m for m in sys.modules if m.startswith(q.__name__ + '.')]\n"
        "assert not loaded, loaded\n"
        "assert course_utils.compression.get_method('gptq', n_bits=3).n_bits == 3\n"
        "assert 'course_utils.quantizers.smoothquant' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", method_names())
def test_a_method_is_named_as_its_module(name):
    assert method_class(name).name == name
    homes = {f"course_utils.{part}.{name}" for part in ("quantizers", "pruning")}
    assert method_class(name).__module__ in homes


def test_no_two_parts_need_each_other():
    open_parts = {part: imports_of(part) for part in PARTS}
    while leaves := {part for part, needs in open_parts.items() if not needs & set(open_parts)}:
        open_parts = {part: needs for part, needs in open_parts.items() if part not in leaves}
    assert not open_parts, f"these parts import each other in a circle: {sorted(open_parts)}"


def test_notebooks_use_public_names_only():
    scripts = [script for folder in FOLDERS for script in (ROOT / folder).glob("*.py")]
    used = {(script.name, name) for script in scripts for name in course_imports(script)}
    hidden = {(script, name) for script, name in used if "._" in name}
    tools = {(script, name) for script, name in used if name.split(".")[1:2] == ["tools"]}
    assert not hidden | tools


# In a fresh process: imports without the course's extras, network, compilers and other programs
IMPORTS = """
import importlib, importlib.machinery, os, socket, subprocess, sys
for library in sys.argv[1].split(","):
    importlib.import_module(library)  # what it does is its own affair

def refuse(*arguments, **named):
    raise AssertionError(f"importing {name} calls {arguments}")

absent = set(sys.argv[2].split(","))
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda fullname, path=None, target=None: (
    None if fullname.split(".")[0] in absent else find(fullname, path, target)
)
socket.socket.connect = socket.getaddrinfo = refuse
torch = sys.modules["torch"]
subprocess.Popen.__init__ = os.system = torch.compile = torch.jit.script = refuse
for name in sys.argv[3:]:
    importlib.import_module(name)
loaded = absent & {module.split(".")[0] for module in sys.modules}
assert not loaded, loaded
print(len(sys.argv[3:]), "imported")
"""


def import_all(
    libraries: list[str], absent: list[str], modules: list[str]
) -> subprocess.CompletedProcess:
    """Import `libraries`, then `modules` with `absent` ones not to be found and much refused."""
    command = [sys.executable, "-c", IMPORTS, ",".join(libraries), ",".join(absent), *modules]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_importing_needs_no_extras_and_touches_nothing():
    absent = [
        "bitsandbytes",
        "hqq",  # transformers imports it where it is, and it compiles
        "papermill",
        "nbval",
        "jupyterlab",
        "jupytext",
        "nbformat",
        "pytest",
        "pandas",
    ]
    # tools make notebooks, and need what makes notebooks
    modules = [name for name in MODULES if not name.startswith("course_utils.tools.")]
    libraries = ["torch", "transformers", "matplotlib.font_manager"]  # which lists fonts at first
    done = import_all(libraries, absent, modules)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(modules)} imported\n"


def test_importing_tools_touches_nothing():
    modules = [name for name in MODULES if name.startswith("course_utils.tools.")]
    libraries = ["torch", "transformers", "jupytext", "papermill"]  # jupytext asks pandoc's version
    done = import_all(libraries, ["bitsandbytes", "hqq"], modules)
    assert done.returncode == 0, done.stderr


def test_importing_course_utils_loads_no_torch():
    code = "import sys, course_utils, course_utils.tools.cli\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
