"""Notebooks built, run, checked, and cut down: what goes well, and each failure that must be seen."""

import json
import os
import re
import runpy
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

import course_utils
from conftest import CELLS, NAME, script
from course_utils import REPOSITORY, REVISION, __version__
from course_utils.results import fill
from course_utils.tools import CourseError, cli
from course_utils.tools.environments import python_of
from course_utils.tools.notebooks import build as building
from course_utils.tools.notebooks import execute as execution
from course_utils.tools.notebooks import standard_cells, students
from course_utils.tools.notebooks.check import check
from course_utils.tools.notebooks.execute import NotebookFailed, execute
from course_utils.tools.notebooks.pairs import (
    Notebook,
    course_root,
    find_notebooks,
    from_script,
    tagged,
)
from course_utils.tools.notebooks.standard_cells import SETUP, badge, write_standard_cells

ROOT = Path(__file__).parent.parent


def run(notebook: Notebook, parameters: dict | None = None) -> nbformat.NotebookNode:
    runs = notebook.root / "runs" / "quick"
    out = runs / f"{notebook.name}.ipynb"
    nb = from_script(notebook)
    return execute(nb, notebook.name, out, profile="quick", runs=runs, parameters=parameters)


def printed(nb: nbformat.NotebookNode) -> str:
    outputs = [output for cell in nb.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


def change(notebook: Notebook, **changed: str | None) -> None:
    notebook.script.write_text(script(**changed), encoding="utf-8")


# Running


def test_run_is_by_this_python_in_an_empty_folder(sample, tmp_path, monkeypatch):
    foreign = tmp_path / "data" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    kernel = {"argv": ["false"], "display_name": "of another Python", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    change(sample, work="# %%\nimport sys\n\nprint(SEED, sys.executable, os.listdir())")
    assert printed(run(sample, {"SEED": 7})) == f"7 {sys.executable} []\n"


def test_course_run_tells_where_the_results_are(sample, monkeypatch):
    monkeypatch.chdir(sample.root / "chronology")
    done = CliRunner().invoke(cli.app, ["run", "sample", "-p", "SEED=3"])
    assert done.exit_code == 0, done.output
    assert NAME in done.output and str(sample.root / "runs" / "quick") in done.output
    result = nbformat.read(sample.root / "runs" / "quick" / f"{NAME}.ipynb", as_version=4)
    assert printed(result) == "auto 3 quick\n"


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ("1 / 0", r"cell 7 \(1 / 0\): ZeroDivisionError: division by zero"),
        ("import sys\n\nsys.exit(0)", r"cell 7 \(import sys\): SystemExit: 0"),
        ("os._exit(0)", r"cell [78] .*: Kernel died"),
    ],
    ids=["exception", "sys.exit", "kernel dies"],
)
def test_run_fails_and_names_the_cell(sample, work, message):
    change(sample, work=f"# %%\n{work}")
    with pytest.raises(NotebookFailed, match=f"{NAME}, {message}"):
        run(sample)


@pytest.mark.alone  # on a busy machine the cells before it may take longer than is allowed here
def test_run_fails_and_names_the_cell_that_is_too_slow(sample, monkeypatch):
    monkeypatch.setattr(execution, "CELL_TIMEOUT", 5)
    change(sample, work="# %%\nimport time\n\ntime.sleep(60)")
    with pytest.raises(NotebookFailed, match=rf"{NAME}, cell 7 \(import time\): .*timed out"):
        run(sample)


@pytest.mark.parametrize(
    "command", ["!false", "found = !false", "%pip install nothing", "%%bash\nfalse", "%sx false"]
)
def test_run_refuses_shell_commands_which_pass_when_they_fail(sample, command):
    commented = "\n".join(f"# {line}" for line in command.splitlines())
    change(sample, work=f"# %%\n{commented}")
    with pytest.raises(NotebookFailed, match=r"cell 7: .* passes when the command fails"):
        run(sample)


def test_run_refuses_an_unknown_parameter(sample):
    with pytest.raises(
        NotebookFailed, match="no parameter 'SED'; its parameters are PROFILE, SEED"
    ):
        run(sample, {"SED": 1})


def test_run_refuses_a_notebook_without_parameters_cell(sample):
    change(sample, parameters=None)
    with pytest.raises(NotebookFailed, match="one cell tagged `parameters`, this has 0"):
        run(sample)


def test_run_sees_a_cell_that_was_skipped(sample):
    change(sample, work='# %% tags=["skip-execution"]\nprint(SEED)')
    with pytest.raises(NotebookFailed, match=r"cell 7 .*: it did not run to its end"):
        run(sample)


def test_course_run_ends_with_status_1_and_one_line(sample):
    change(sample, parameters=None)
    command = [sys.executable, "-m", "course_utils", "run"]
    done = subprocess.run(command, cwd=sample.root, env=outside(), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {NAME}: ") and len(done.stderr.splitlines()) == 1


def outside() -> dict[str, str]:
    """Environment of a process whose current folder holds another `course_utils`."""
    return os.environ | {"PYTHONSAFEPATH": "1"}


def test_notebooks_are_found_by_name(sample):
    other = Notebook(sample.root, "pruning/other")
    other.script.parent.mkdir()
    other.script.write_text(script())
    assert find_notebooks(sample.root) == [sample, other]
    for name in ("sample", NAME, f"{NAME}.py", f"{NAME}.ipynb"):
        assert find_notebooks(sample.root, [name]) == [sample]
    with pytest.raises(CourseError, match=r"no notebook 'gptq'\. There are: chronology/sample, pr"):
        find_notebooks(sample.root, ["gptq"])


def test_course_root_outside_a_course(tmp_path):
    with pytest.raises(CourseError, match="is not inside the course"):
        course_root(tmp_path)


# Building


@pytest.fixture(scope="module")
def built_once(tmp_path_factory):
    """The text of the sample's built notebook: one build for all tests of `check`."""
    return {}


@pytest.fixture
def built(sample, built_once) -> Notebook:
    if not built_once:
        assert building.build(sample)
        built_once["text"] = sample.ipynb.read_text(encoding="utf-8")
    sample.ipynb.write_text(built_once["text"], encoding="utf-8")
    return sample


def test_build_makes_a_notebook_that_passes_its_check(built):
    nb = building.read(built)
    assert check(built) == []
    assert printed(nb) == "auto 0 cpu\n"
    assert nb.metadata["course"]["versions"]["course_utils"] == __version__
    metadata = [set(cell.metadata) for cell in nb.cells]
    assert all(keys <= {"tags", "jupyter", "cellView"} for keys in metadata)


def test_build_again_does_nothing_until_something_changes(built):
    before = built.ipynb.read_bytes()
    assert not building.build(built)
    assert built.ipynb.read_bytes() == before
    (built.root / "course_utils" / "data" / "batches.py").write_text("ONE = 1\n")
    assert building.build(built)
    assert building.build(built, force=True)
    first, second = (json.loads(text) for text in (before, built.ipynb.read_bytes()))
    assert first["cells"] == second["cells"]


def test_build_keeps_the_outputs_where_only_text_changed(built, monkeypatch):
    def no_execution(*_, **__):
        raise AssertionError("it was executed")

    monkeypatch.setattr(building, "execute", no_execution)
    before = building.read(built)
    change(built, section="# %% [markdown]\n# ## A section\n# Told in other words [@known2022].")
    assert building.build(built) == "text"
    nb = building.read(built)
    assert check(built) == []
    assert "Told in other words" in "".join(cell.source for cell in nb.cells)
    assert printed(nb) == printed(before)
    kept = {"profile", "versions", "recorded", "package"}
    assert all(nb.metadata["course"][key] == before.metadata["course"][key] for key in kept)
    with pytest.raises(AssertionError, match="it was executed"):
        building.build(built, force=True)
    change(built, work="# %%\nprint(1)")
    with pytest.raises(AssertionError, match="it was executed"):
        building.build(built)


def test_new_text_with_a_number_that_no_run_recorded_is_refused(built):
    before = built.ipynb.read_bytes()
    change(built, section="# %% [markdown]\n# ## A section\n# {{none}} in the recorded run.")
    with pytest.raises(NotebookFailed, match=r"none.*recorded by no run"):
        building.build(built)
    assert built.ipynb.read_bytes() == before


def test_build_that_fails_leaves_the_notebook(built):
    before = built.ipynb.read_bytes()
    change(built, work="# %%\n1 / 0")
    with pytest.raises(NotebookFailed, match="ZeroDivisionError"):
        building.build(built)
    assert built.ipynb.read_bytes() == before


def test_build_writes_the_standard_cells(sample):
    old = script(
        badge=CELLS["badge"].replace(REVISION, "old"), setup='# %% tags=["setup"]\nimport os\n'
    )
    new = write_standard_cells(old, NAME)
    assert new == script()
    assert write_standard_cells(new, NAME) == new
    assert write_standard_cells("# %%\nx = 1\n", NAME) == "# %%\nx = 1\n"


def test_widgets_are_left_out_of_a_built_notebook(sample):
    nb = from_script(sample)
    nb.metadata["widgets"] = {"state": {}}
    data = {building.WIDGETS: {"model_id": "1"}, "text/plain": "100%"}
    nb.cells[6].outputs = [nbformat.v4.new_output("display_data", data)]
    clean = building.canonical(nb)
    assert "widgets" not in clean.metadata
    assert dict(clean.cells[6].outputs[0].data) == {"text/plain": "100%"}


def test_ids_of_cells_do_not_move_with_them(sample):
    before = [cell.id for cell in from_script(sample).cells]
    change(sample, added="# %%\nTHRESHOLD = 6.0")
    after = [cell.id for cell in from_script(sample).cells]
    assert [id for id in after if id in before] == before
    assert len(set(after)) == len(after) == len(before) + 1


# Checking


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"work": "# %%\nprint(1)"}, "the script changed after the build"),
        ({"setup": CELLS["setup"].replace("distributions", "packages")}, "set-up cell is not the"),
        ({"badge": CELLS["badge"].replace("sample", "simple")}, "the badge is not this notebook's"),
        ({"badge": CELLS["badge"].split("\n#\n")[0]}, "the cell tagged `badge` holds no title"),
        ({"badge": None}, "0 cells are tagged `badge`"),
        ({"parameters": None}, "0 cells are tagged `parameters`"),
        ({"section": "# %% [markdown]\n# [@known2022; @nobody]"}, "cell 6 cites @nobody, which"),
        ({"work": "# %%\n" + "x = 1\n" * 27}, "cell 7 has 27 lines, at most 26"),
        ({"work": f"# %%\nx = '{'w' * 88}'"}, "cell 7 has a line of 94 columns, at most 88"),
        ({"work": "# %%\n# !false"}, "cell 7: .* passes when the command fails"),
        ({"exercise": CELLS["exercise"].replace("### END SOLUTION", "")}, "cell 10: .* once each"),
        ({"exercise": '# %% tags=["exercise"]\ndouble = abs'}, "cell 10: an exercise has its solu"),
        ({"exercise": None}, "cell 10: tagged `exercise-tests` where `exercise` should"),
        ({"tests": None}, "the last exercise has no cell tagged `exercise-tests`"),
        ({"tests": CELLS["tests"].replace("BEGIN HIDDEN", "HIDDEN")}, "cell 11: `### BEGIN HIDD"),
        ({"work": "# %%\n### BEGIN SOLUTION"}, "cell 7: `### BEGIN SOLUTION` outside a cell"),
        ({"statement": CELLS["statement"].replace("1/5", "6/5")}, "cell 9: a statement begins"),
        ({"statement": CELLS["statement"].replace("Exercise 1", "Exercise 2")}, "cell 9: a statem"),
    ],
)
def test_check_sees_in_the_script(built, cells, message):
    change(built, **cells)
    problems = check(built)
    with pytest.raises(AssertionError, match=message):
        assert not "\n".join(problems)


@pytest.mark.parametrize(
    ("file", "text", "stale"),
    [
        ("cache.py", "CHANGED = 1\n", True),
        ("cache.py", "# a comment\n", False),
        ("data/batches.py", "CHANGED = 1\n", True),
        ("data/__init__.py", '"""Hands on."""\n', False),
        ("__init__.py", "CHANGED = 1\n", True),
        ("assets/sample-lm/model.safetensors", "1", True),
        ("assets/other-lm/model.safetensors", "1", False),
        ("pruning.py", "CHANGED = 1\n", False),
    ],
)
def test_check_sees_a_change_of_the_package_that_the_notebook_uses(built, file, text, stale):
    path = built.root / "course_utils" / file
    path.write_text(path.read_text() + text)
    remedy = f"{NAME}: the package changed after the build: run `course build {NAME}`"
    assert check(built) == ([remedy] if stale else [])


def error(nb):
    nb.cells[6].outputs = [nbformat.v4.new_output("error", ename="E", evalue="bad", traceback=[])]


def widget(nb):
    nb.cells[6].outputs = [nbformat.v4.new_output("display_data", {building.WIDGETS: {"a": "1"}})]


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (lambda nb: nb.cells[6].update(source="print(2)"), "cell 7 is not what the script"),
        (lambda nb: nb.cells.pop(), "its cells are not those of the script"),
        (lambda nb: nb.metadata.update(widgets={"state": {}}), "its metadata holds widgets"),
        (widget, "cell 7 shows a widget"),
        (error, "cell 7 ends in E: bad"),
        (lambda nb: nb.cells[6].update(execution_count=None), "cell 7 was not run"),
        (lambda nb: nb.metadata.pop("course"), "carries no stamp"),
        (lambda nb: nb.metadata["course"].update(profile="quick"), "not those of the profile cpu"),
        (lambda nb: nb.cells[6].outputs[0].update(text="x" * 10**6), "bytes, at most 1,000,000"),
    ],
)
def test_check_sees_in_the_built_notebook(built, plant, message):
    nb = building.read(built)
    plant(nb)
    nbformat.write(nb, built.ipynb)
    problems = check(built)
    with pytest.raises(AssertionError, match=message):
        assert not "\n".join(problems)


def test_check_asks_for_a_build(sample):
    assert check(sample) == [f"{NAME}: it was never built: run `course build {NAME}`"]


def test_course_check_ends_with_an_error(sample, monkeypatch):
    monkeypatch.chdir(sample.root)
    done = CliRunner().invoke(cli.app, ["check"])
    assert isinstance(done.exception, CourseError)
    assert "it was never built" in done.output


def test_the_readme_has_the_same_badge(built):
    readme = built.root / "README.md"
    readme.write_text(f"<!-- notebook: {NAME} --><!-- /notebook -->\n")
    fill(built.root)
    assert badge(NAME) in readme.read_text()


def revisions(nb: nbformat.NotebookNode) -> list[str]:
    """The revisions that a notebook names: its badge's, its student version's, its set-up cell's."""
    ((badge_cell,), (setup,)) = (tagged(nb, tag) for tag in ("badge", "setup"))
    return [
        *re.findall(rf"/github/{REPOSITORY}/blob/(.+?)/\w+/\w+\.ipynb", badge_cell.source),
        *re.findall(rf'"https://github\.com/{REPOSITORY}/archive/(.+)\.zip"', setup.source),
    ]


@pytest.mark.parametrize("notebook", find_notebooks(ROOT), ids=lambda notebook: notebook.name)
def test_badge_and_set_up_cell_of_every_notebook_are_of_one_revision(notebook):
    assert revisions(from_script(notebook)) == [REVISION, "assignments", REVISION]
    if notebook.ipynb.exists():  # else `course check` asks for it
        assert revisions(building.read(notebook)) == [REVISION, "assignments", REVISION]


def test_a_release_has_one_line_to_change(sample, monkeypatch):
    monkeypatch.setattr(course_utils, "REVISION", "v1.2.3")
    released = runpy.run_path(standard_cells.__file__)
    text = released["write_standard_cells"](script(), NAME)
    sample.script.write_text(text, encoding="utf-8")
    assert revisions(from_script(sample)) == ["v1.2.3", "assignments", "v1.2.3"]
    assert text.replace("v1.2.3", REVISION) == script()


# Student versions


def test_student_version_has_stubs_and_no_hidden_tests(sample, monkeypatch):
    monkeypatch.chdir(sample.root)
    done = CliRunner().invoke(cli.app, ["student", "sample", "--out", "handout/sample.ipynb"])
    assert done.exit_code == 0, done.output
    nb = nbformat.read(sample.root / "handout" / "sample.ipynb", as_version=4)
    nbformat.validate(nb)
    first = [CELLS[name].split("\n")[-1] for name in ("parameters", "opening")]
    assert [cell.source.split("\n")[-1] for cell in nb.cells[2:4]] == first
    *_, exercise, tests = (cell.source for cell in nb.cells)
    told = "Exercise 1, double: put your code here"
    stub = f'    """Twice x."""\n    raise NotImplementedError("{told}")'
    assert exercise == f"def double(x: int) -> int:\n{stub}"
    assert tests == 'assert double(2) == 4, "is it doubled?"'
    assert "COURSE_PROFILE" not in "".join(cell.source for cell in nb.cells[2:])


def test_solved_student_version_keeps_everything_of_its_exercises(sample):
    solved = students.student_version(from_script(sample), NAME, solved=True)
    assert "return 2 * x" in solved.cells[-2].source
    assert "assert double(-1) == -2" in solved.cells[-1].source


def test_no_student_version_without_exercises(sample):
    change(sample, statement=None, exercise=None, tests=None)
    with pytest.raises(CourseError, match="has no exercises"):
        students.student_version(from_script(sample), NAME)


# The set-up cell, in an environment without course_utils


def wheel(folder: Path, version: str, requires: str = "") -> str:
    """The address of a wheel of a `course_utils` that is nothing but a version."""
    path = folder / f"course_utils-{version}-py3-none-any.whl"
    info = f"course_utils-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: course_utils\nVersion: {version}\n"
    metadata += "Provides-Extra: oracles\n" + (f"Requires-Dist: {requires}\n" if requires else "")
    files = {
        "course_utils/__init__.py": f'__version__ = "{version}"\n',
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(name, text)
    return path.as_uri()


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    return python_of(folder)


def set_up(python: Path, spec: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"COURSE_UTILS_SPEC": spec, "PIP_NO_INDEX": "1"}
    command = [python, "-c", SETUP]
    return subprocess.run(command, cwd=python.parent, env=env, capture_output=True, text=True)


def test_set_up_cell_installs_once_and_replaces_nothing(bare_python, tmp_path):
    broken = set_up(bare_python, (tmp_path / "missing.whl").as_uri())
    assert broken.returncode and "RuntimeError: pip failed:" in broken.stderr
    assert "missing.whl" in broken.stderr

    greedy = set_up(bare_python, wheel(tmp_path, __version__, requires="pip>=1000"))
    assert greedy.returncode and "The user requested (constraint) pip==" in greedy.stderr

    spec = wheel(tmp_path, __version__)
    for _ in range(2):
        done = set_up(bare_python, spec)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert set_up(bare_python, "file:///nowhere.whl").returncode == 0  # there is nothing to install

    install = [bare_python, "-m", "pip", "install", "--no-index", wheel(tmp_path, "0.0.1")]
    subprocess.run(install, check=True, capture_output=True)
    old = set_up(bare_python, spec)
    assert f"needs course_utils {__version__}, not 0.0.1. On Colab open it by" in old.stderr
