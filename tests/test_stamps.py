"""Stamps: which files count for a notebook, what of them counts, and the proof by a trace of its run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import course_utils
from conftest import NAME, script
from course_utils.results import accept, list_runs
from course_utils.tools import CourseError, cli
from course_utils.tools.notebooks import build as building
from course_utils.tools.notebooks.check import check
from course_utils.tools.notebooks.execute import execute
from course_utils.tools.notebooks.pairs import Notebook, find_notebooks, from_script
from course_utils.tools.notebooks.sources import sources_used
from course_utils.tools.notebooks.stamps import code, stamp
from course_utils.tools.notebooks.trace import files_run, tracing, untracked
from course_utils.tools.notebooks.verify import verify

ROOT = Path(__file__).parent.parent


def sources(notebook: Notebook) -> set[str]:
    package = notebook.root / "course_utils"
    found = sources_used(notebook.script, package)
    return {file.relative_to(package).as_posix() for file in found}


def write(folder: Path, **files: str) -> None:
    """Files of a package: `a__b="..."` is `a/b.py`, `a____init__` is `a/__init__.py`."""
    for name, text in files.items():
        path = folder.joinpath(*name.replace("____init__", "__INIT").split("__"))
        path = path.with_name(path.name.replace("INIT", "__init__") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


# Which files count: a package whose `__init__` hands on, and one whose `__init__` defines something


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "course_utils"
    write(
        folder,
        ____init__='__version__ = "1"\n',
        parts____init__='"""Hands on."""\nfrom course_utils.parts.a import f\n'
        'from course_utils.parts.b import g as h\n\n__all__ = ["f", "h"]\n',
        parts__a="from course_utils.low import x\n\ndef f(): ...\n",
        parts__b="def g():\n    from course_utils.late import y\n",
        parts__c="",
        own____init__="from course_utils.own.d import D\n\ndef helper(): ...\n",
        own__d="class D: ...\n",
        own__e="",
        low="x = 1\n",
        late="y = 1\n",
        fast="SOURCE = 'low.cpp', 'none.cpp'\n",
        quantizers____init__="",
        quantizers__gptq="",
        quantizers__awq="from course_utils.quantizers.gptq import GPTQ\n",
        tools__notebooks="",
    )
    (folder / "low.cpp").write_text("int one = 1;\n")
    for asset in ("small-lm/model.safetensors", "small-lm/README.md", "table.json"):
        (folder / "assets" / asset).parent.mkdir(parents=True, exist_ok=True)
        (folder / "assets" / asset).write_text("0")
    return folder


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("import course_utils", {"__init__"}),
        ("from course_utils.parts import f", {"__init__", "parts/a", "low"}),
        ("from course_utils.parts import h", {"__init__", "parts/b", "late"}),
        ("from course_utils.parts import c", {"__init__", "parts/c"}),
        ("from course_utils.parts.c import z", {"__init__", "parts/c"}),
        ("import course_utils.parts.a as a", {"__init__", "parts/a", "low"}),
        ("import course_utils.parts", {"__init__", "parts/a", "low", "parts/b", "late"}),
        ("from course_utils import parts", {"__init__", "parts/a", "low", "parts/b", "late"}),
        ("def f():\n    from course_utils import low", {"__init__", "low"}),
        ("from course_utils.own import helper", {"__init__", "own/__init__", "own/d"}),
        ("from course_utils.own import e", {"__init__", "own/__init__", "own/d", "own/e"}),
        ("make('gptq')", {"__init__", "quantizers/gptq"}),
        ("make(dict(name='awq'))", {"__init__", "quantizers/awq", "quantizers/gptq"}),
        ("print('as gptq does')  # 'gptq'", {"__init__"}),
        ("load(f'course_utils.parts.c')", {"__init__", "parts/c"}),
        ("from course_utils.parts import nothing", {"__init__"}),
        ("log('course_utils.nothing')", {"__init__"}),
        ("run('import sys\\nfrom course_utils import low')", {"__init__", "low"}),
        ("print('all of course_utils and more')", {"__init__"}),
        ("load('small-lm')", {"__init__", "small-lm/model.safetensors"}),
        ("open('assets/table.json')", {"__init__", "table.json"}),
        ("from course_utils import fast", {"__init__", "fast", "low.cpp"}),
        (
            "def f():\n    from course_utils.parts.a import b\n\n"
            "def g():\n    from course_utils.own.e import b",
            {"__init__", "parts/a", "low", "own/__init__", "own/d", "own/e"},
        ),
    ],
)
def test_files_that_a_script_reaches(package, text, files):
    notebook = package.parent / "notebook.py"
    notebook.write_text(f"import course_utils\n{text}\n", encoding="utf-8")
    found = [f.relative_to(package).as_posix() for f in sources_used(notebook, package)]
    assert found == sorted(found)
    assert {f.removeprefix("assets/").removesuffix(".py") for f in found} == files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from course_utils.parts import *", r"notebook.py: line 1: import names, not \*"),
        ("from . import parts", "notebook.py: line 1: import from course_utils by its full name"),
    ],
)
def test_imports_that_cannot_be_followed_are_refused(package, text, message):
    notebook = package.parent / "notebook.py"
    notebook.write_text(text, encoding="utf-8")
    with pytest.raises(CourseError, match=message):
        sources_used(notebook, package)


NOTEBOOKS = {Path(notebook.name).name: notebook for notebook in find_notebooks(ROOT)}


@pytest.mark.parametrize(
    ("method", "users"),
    [("gptq", {"gptq_demo", "gptq_ablations"}), ("gguf", {"linear_mapping"})],
)
def test_a_method_counts_for_the_notebooks_that_use_it(method, users):
    found = {name: sources(notebook) for name, notebook in NOTEBOOKS.items()}
    counted = {name for name, files in found.items() if f"quantizers/{method}.py" in files}
    assert users <= counted
    assert not counted & {"linear_mapping", "llm_int8_demo"} - users


def test_what_quantizes_every_model_counts_for_every_notebook_that_quantizes_one():
    for notebook in NOTEBOOKS.values():
        if "quantize_model(" in notebook.script.read_text(encoding="utf-8"):
            assert {"compression/driver.py", "compression/saving.py"} <= sources(notebook)


# What counts of a file

MODULE = '''\
"""What it is."""

import os  # for paths

def f(x):
    """What it does.

    At length.
    """
    # why
    return f"{x!r:>4} # {os.sep}" + """a

    b"""

class E(Exception):
    """When."""
'''
CODE = '''\
import os
def f(x):
    return f"{x!r:>4} # {os.sep}" + """a

    b"""
class E(Exception):
'''


def test_code_is_the_same_text_on_every_python():
    assert code(MODULE) == CODE


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("What it is.", "What it is now."),
        ("  # for paths", ""),
        ("    # why\n", "    # why not\n    # at length\n\n"),
        ('"""When."""', '"""When not."""  # ever'),
        ('    """What it does.\n\n    At length.\n    """\n', ""),
        ("\ndef f", "\n\n\ndef f"),
    ],
)
def test_comments_docstrings_and_blank_lines_do_not_count(old, new):
    assert old in MODULE
    assert code(MODULE.replace(old, new)) == CODE


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("import os", "import sys"),
        (">4} #", ">4} ##"),
        ("a\n\n    b", "a\n    b"),
        ("    return", "    x += 1\n    return"),
        ("return f", "return rf"),
        ('"""What it does.\n\n    At length.\n    """', 'f"""What {x} does."""'),
    ],
)
def test_code_and_strings_count(old, new):
    assert old in MODULE
    assert code(MODULE.replace(old, new)) != CODE


def test_line_endings_of_windows_give_the_same_stamp(sample):
    before = stamp(sample)
    for file in [sample.script, sample.root / "course_utils" / "cache.py"]:
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert stamp(sample) == before


def test_every_text_of_the_course_has_unix_line_endings():
    listed = subprocess.run(
        ["git", "ls-files", "--eol"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = listed.stdout.splitlines()
    assert lines
    assert not [line for line in lines if line.startswith("i/crlf") or "i/mixed" in line]
    texts = [line for line in lines if "i/-text" not in line]
    assert not [line for line in texts if "attr/text=auto eol=lf" not in line]


# The trace


PLANTED = """# %%
import importlib
import threading

name = "pruning"
pruning = importlib.import_module(f"course_utils.{name}")
CALL"""


@pytest.mark.parametrize(
    ("call", "function"),
    [
        ("pass", None),
        ("pruning.prune()", "prune"),
        ("pruning.Mask().draw()", "draw"),
        ("pruning.SMALLER(1)", "a lambda"),
        ("next(pruning.each())", "each"),
        ("thread = threading.Thread(target=pruning.prune)\nthread.start()\nthread.join()", "prune"),
        (
            "import subprocess, sys\nprogram = f'import course_utils.{name} as p; p.prune()'\n"
            "subprocess.run([sys.executable, '-c', program], check=True)",
            "prune",
        ),
    ],
    ids=["nothing", "function", "method", "lambda", "generator", "thread", "process"],
)
def test_a_function_that_runs_outside_the_stamp_is_found(sample, tmp_path, call, function):
    write(
        sample.root / "course_utils",
        ____init__=f'__version__ = "{course_utils.__version__}"\n',
        cache='def use():\n    """Used."""\n    return 1\n',
        pruning="def prune(): return 1\n\n\nclass Mask:\n    def draw(self): return 2\n\n\n"
        "SMALLER = lambda x: x / 2\n\n\ndef each():\n    yield prune\n\n\nAT_IMPORT = prune()\n",
    )
    use = "# %%\nassert cache.use() == 1 and cache.use.__doc__ == 'Used.'"
    sample.script.write_text(
        script(work=use, planted=PLANTED.replace("CALL", call)), encoding="utf-8"
    )
    variables = tracing(tmp_path / "trace", {"PYTHONPATH": str(sample.root)})
    nb, out = from_script(sample), tmp_path / "out.ipynb"
    execute(nb, NAME, out, profile="quick", runs=tmp_path, variables=variables)
    assert files_run(tmp_path / "trace")["cache.py"] == "use"
    found = untracked(tmp_path / "trace", sample)
    expected = f"{NAME} runs {function} of course_utils/pruning.py, which its stamp does not count"
    assert len(found) == (function is not None)
    assert all(problem.startswith(expected) for problem in found)


def test_a_trace_lets_another_start_up_file_run_and_leaves_compiled_functions_alone(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sitecustomize.py").write_text("print('other')\n")
    jitted = "def jit(f):\n    return f\n\n\n@jit\ndef fast():\n    return 1\n"
    write(tmp_path / "code" / "course_utils", ____init__="", kernel=jitted)
    paths = os.pathsep.join([str(tmp_path / "other"), str(tmp_path / "code")])
    variables = tracing(tmp_path / "trace", {"PYTHONPATH": paths})
    program = "from course_utils.kernel import fast\nprint(fast.__code__.co_names, fast())"
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.stdout == "other\n() 1\n", done.stderr


def test_no_trace_is_no_proof(sample, tmp_path):
    with pytest.raises(CourseError, match=r"no trace in .*: run the notebook under the"):
        untracked(tmp_path, sample)


# Verified in quick


RECORDS = """# %%
from pathlib import Path

from course_utils.results import record

VALUE = {value}
record("sample.value", VALUE, tolerance=0.5)"""


@pytest.fixture
def stale(sample, monkeypatch) -> Notebook:
    """A built notebook with accepted values of `quick`, after a change of a file that it uses."""
    monkeypatch.setattr(building, "PROFILE", "quick")  # so that one run gives both
    sample.script.write_text(script(work=RECORDS.format(value=1.0)), encoding="utf-8")
    assert building.build(sample)
    monkeypatch.undo()
    runs = list_runs(sample.root / "runs" / "quick")
    accept(sample.root, [*runs, *(entry | {"profile": building.PROFILE} for entry in runs)])
    nb = building.read(sample)
    nb.metadata["course"]["profile"] = building.PROFILE
    building.write(nb, sample)
    assert check(sample) == []
    write(
        sample.root / "course_utils", cache="from course_utils.data import batches\nCHANGED = 1\n"
    )
    assert "the package changed after the build" in "".join(check(sample))
    return sample


def planted(notebook: Notebook, change) -> None:
    nb = building.read(notebook)
    change(nb)
    building.write(nb, notebook)


def test_a_stamp_is_renewed_where_quick_agrees_and_a_build_clears_the_mark(stale, monkeypatch):
    before = building.read(stale)
    monkeypatch.chdir(stale.root)
    done = CliRunner().invoke(cli.app, ["build", "--verify"])
    assert done.exit_code == 0 and f"{NAME} ... verified in" in done.output, done.output
    renewed = building.read(stale)
    assert renewed.cells == before.cells
    assert renewed.metadata["course"] == before.metadata["course"] | {
        **stamp(stale),
        "package_verified_in": "quick",
    }
    assert check(stale) == []
    assert verify(stale) is None
    assert not building.build(stale)
    assert building.build(stale, force=True)
    assert "package_verified_in" not in building.read(stale).metadata["course"]


def other_output(nb):
    (cell,) = [cell for cell in nb.cells if cell.source == "[1, 2, 3]"]
    cell.outputs[0]["data"]["text/plain"] = "[1, 2, 4]"


def test_outputs_and_values_that_differ_are_told_and_the_notebook_is_left(stale, monkeypatch):
    planted(stale, other_output)
    (stored,) = (stale.root / "results").glob("*.json")
    stored.write_text(stored.read_text().replace('"value": 1.0', '"value": 2.0'))
    before = stale.ipynb.read_bytes()
    monkeypatch.chdir(stale.root)
    done = CliRunner().invoke(cli.app, ["build", "--verify"])
    assert isinstance(done.exception, CourseError)
    assert f"{NAME} ... is left as it is" in done.output
    assert f"{NAME}: the cell that begins `[1, 2, 3]` prints something else" in done.output
    assert f"{NAME}: sample.value (profile quick, model None): 1" in done.output
    assert "accepted 2" in done.output
    assert stale.ipynb.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda notebook: notebook.ipynb.unlink(), "it was never built: run `course build"),
        (
            lambda notebook: notebook.script.write_text(script(work="# %%\nprint(2)")),
            "its script changed, which only a build can follow: run `course build",
        ),
    ],
    ids=["never built", "script changed"],
)
def test_only_a_stale_package_can_be_verified(stale, change, message):
    change(stale)
    (problem,) = verify(stale)
    assert problem.startswith(f"{NAME}: {message}")


def test_a_notebook_that_shows_nothing_comparable_is_not_verified(stale):
    text = script(work="# %%\nprint(1)", checked=None)
    stale.script.write_text(text, encoding="utf-8")
    planted(stale, lambda nb: nb.metadata["course"].update(script=stamp(stale)["script"]))
    (problem,) = verify(stale)
    assert "it records nothing and has no cell tagged `nbval-check-output`" in problem


def test_build_refuses_to_force_and_verify_at_once(sample, monkeypatch):
    monkeypatch.chdir(sample.root)
    done = CliRunner().invoke(cli.app, ["build", "--force", "--verify"])
    assert isinstance(done.exception, CourseError) and "give one of them" in str(done.exception)
