"""Student versions, and nbgrader on what students hand in: right work, wrong work, and broken files.

Each submission is graded by nbgrader's own pipeline in a kernel of its own. Faults are planted in the
student's file. Of the course's notebooks that have `tests/mutants`, each typical mistake must fail its tests;
one notebook is graded with its solution, its stubs, and a bundle of a mistake of every exercise.
"""

import csv
import os
import re
import runpy
import shlex
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from typer.testing import CliRunner

from conftest import NAME, script
from course_utils.tools import CourseError, cli
from course_utils.tools.notebooks import classroom, grading
from course_utils.tools.notebooks.check import check
from course_utils.tools.notebooks.grading import Graded, grade
from course_utils.tools.notebooks.pairs import Notebook, find_notebooks, from_script, tagged
from course_utils.tools.notebooks.self_check import self_check
from course_utils.tools.notebooks.students import student_version

ROOT = Path(__file__).parent.parent
SECRET = "a sentence that nobody guesses"
TESTS = """# %% tags=["exercise-tests"]
assert double(2) == 4, "is it doubled?"
double(3)
### BEGIN HIDDEN TESTS
seed = 0  # the teacher's seed
number = random.Random(seed).random()
assert double(number) == number + number, "any number, not those of the tests"
### END HIDDEN TESTS"""
SECOND = '''# %% [markdown] tags=["exercise-statement", "refuses:course_utils.digest"]
# ### Exercise 2: a hash
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# Hash a text.

# %% tags=["exercise"]
def hashed(text):
    """The SHA-256 of a text, in hexadecimal digits."""
    ### BEGIN SOLUTION
    return hashlib.sha256(text.encode()).hexdigest()
    ### END SOLUTION

# %% tags=["exercise-tests"]
assert hashed("")[:6] == "e3b0c4", "SHA-256, in hexadecimal digits"
### BEGIN HIDDEN TESTS
assert hashed("é")[:6] == "4a9955", "encode the text as UTF-8"
### END HIDDEN TESTS
'''
IMPORTS = "# %%\nimport hashlib\nimport os\nimport random\n\nfrom course_utils import cache, digest"
DOUBLE = "def double(x):\n    return 2 * x\n"
HASHED = "def hashed(text):\n    return hashlib.sha256(text.encode()).hexdigest()\n"


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Notebook:
    """A notebook with two exercises, in a course of its own."""
    root = tmp_path_factory.mktemp("course")
    for file in ("pyproject.toml", "course_utils/__init__.py", "course_utils/digest.py"):
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text("")
    notebook = Notebook(root, NAME)
    notebook.script.parent.mkdir()
    text = script(imports=IMPORTS, tests=TESTS) + "\n" + SECOND
    notebook.script.write_text(text, encoding="utf-8")
    return notebook


@pytest.fixture(scope="module")
def given(course) -> NotebookNode:
    return student_version(from_script(course), NAME)


def answer(nb: NotebookNode, **answers: str) -> NotebookNode:
    """A student's notebook with the cells that begin `def NAME` replaced."""
    nb = deepcopy(nb)
    for name, source in answers.items():
        (cell,) = (c for c in tagged(nb, "exercise") if c.source.startswith(f"def {name}("))
        cell.source = source
    return nb


def hand_in(folder: Path, student: str, nb: NotebookNode | str, *, file: str = "sample.ipynb"):
    path = folder / "submitted" / student / Path(file).stem.split()[0] / file
    path.parent.mkdir(parents=True, exist_ok=True)
    text = nb if isinstance(nb, str) else nbformat.writes(nb)
    path.write_text(text, encoding="utf-8")


def reasons(graded: Graded) -> str:
    return "\n".join([*graded.notes, *(outcome.reason for outcome in graded.exercises)])


# Student versions


def test_a_student_version_says_what_it_is_and_opens_itself(given):
    head = given.cells[0].source
    badge, title = head.splitlines()[0], head.splitlines()[2]
    assert "/blob/assignments/chronology/sample.ipynb)" in badge and title == "# A sample"
    assert "2 exercises, 3 points, about 15 minutes" in head
    assert "/blob/main/chronology/sample.ipynb); read that first" in head
    assert "| 2. a hash | 2/5 | 10 | 2 |" in head
    assert "Importing `course_utils.digest` is refused" in head


def test_it_keeps_of_the_opening_what_the_exercises_use(given):
    sources = [cell.source for cell in given.cells]
    assert "import hashlib\nimport random" in sources
    assert not any("from course_utils import" in source for source in sources)
    assert not any("Vectors are scaled" in source for source in sources)


def test_an_opening_keeps_all_of_a_long_import_that_is_used(sample):
    long = (
        "from course_utils.models.registry import a_name_that_is_long, another_name, one_more_name"
    )
    tests = '# %% tags=["exercise-tests"]\nassert a_name_that_is_long(another_name, one_more_name)'
    sample.script.write_text(script(imports=f"# %%\n{long}, unused", tests=tests))
    nb = student_version(from_script(sample), NAME)
    lines = next(cell.source for cell in nb.cells if "a_name" in cell.source).splitlines()
    assert lines[0] == "from course_utils.models.registry import (" and lines[-1] == ")"
    assert [line.strip() for line in lines[1:-1]] == [
        "a_name_that_is_long,", "another_name,", "one_more_name,",
    ]  # fmt: skip


def test_its_opening_ends_with_the_first_heading_wherever_it_stands_in_its_cell(sample):
    late = "# %% [markdown]\n# A sentence first.\n#\n# ## A section"
    sample.script.write_text(script(section=late))
    nb = student_version(from_script(sample), NAME)
    assert "print(PROFILE" not in "".join(cell.source for cell in nb.cells)


def test_the_first_stub_names_its_exercise_and_lets_run_all_go_on(given, tmp_path):
    file = tmp_path / "mine.ipynb"
    nbformat.write(answer(given, hashed=HASHED), file)
    first, second = self_check(file)
    assert first.reason == "NotImplementedError: Exercise 1, double: put your code here"
    assert (second.points, second.reason) == (2, "")
    assert all(
        "raises-exception" in cell.metadata["tags"] for cell in tagged(given, "exercise-tests")
    )


def test_course_student_overwrites_nothing_without_force(sample, monkeypatch):
    monkeypatch.chdir(sample.root)
    command = ["student", "sample", "--out", "mine.ipynb"]
    Path("mine.ipynb").write_text("work of three hours")
    done = CliRunner().invoke(cli.app, command)
    assert isinstance(done.exception, CourseError) and "give --force" in str(done.exception)
    assert Path("mine.ipynb").read_text() == "work of three hours"
    assert CliRunner().invoke(cli.app, [*command, "--force"]).exit_code == 0
    assert "raise NotImplementedError" in Path("mine.ipynb").read_text()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"statement": "refuses:course_utils.nothing"},
            "an exercise refuses course_utils.nothing, which is no module of the course",
        ),
        (
            {"statement": "refuses:course_utils.cache", "body": "return cache.MODEL"},
            "use cache of course_utils.cache, which an exercise refuses",
        ),
        (
            {"imports": "from course_utils.cache import double"},
            "imports double, and an exercise asks",
        ),
    ],
)
def test_course_check_sees_what_hands_over_an_answer(sample, changed, told):
    text = sample.script.read_text()
    if "statement" in changed:
        tag = changed["statement"]
        text = text.replace('"exercise-statement"', f'"exercise-statement", "{tag}"')
    text = text.replace("return 2 * x", changed.get("body", "return 2 * x"))
    text = text.replace("import os\n", f"import os\n{changed.get('imports', '')}\n")
    sample.script.write_text(text)
    assert told in "\n".join(check(sample))


def test_a_refused_module_cannot_be_reached_and_says_why(given):
    guard = next(cell.source for cell in given.cells if "class Refused" in cell.source)
    ways = [
        "from course_utils.digest import digest",
        "import course_utils.digest as d; d.digest",
        "import importlib; importlib.import_module('course_utils.digest').digest",
        "import course_utils; course_utils.digest.digest",
    ]
    lines = [
        f"for way in {ways}:",
        " try:",
        "  exec(way)",
        " except ImportError as e:",
        "  print(e)",
    ]
    code = "\n".join([guard, *lines])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    told = "course_utils.digest is refused here: exercise 2 asks you to write it yourself."
    assert done.stdout.splitlines() == [told] * len(ways), done.stderr


# Seeds


def test_hidden_cases_come_from_the_teachers_secret(course):
    cells = [tagged(classroom.teacher_version(course, s), "exercise-tests")[0].source
             for s in (None, SECRET, "another sentence")]  # fmt: skip
    seeds = [int(re.search(r"seed = (\d+)", source)[1]) for source in cells]
    assert seeds[0] == 0 and len(set(seeds)) == 3
    assert seeds[1] == classroom.seed_of(SECRET, NAME, "exercise-tests-1")
    assert SECRET not in "".join(cells)


def test_a_secret_lies_outside_the_course_and_is_one(course, tmp_path):
    file = course.root / "docs" / "secret.txt"
    with pytest.raises(CourseError, match="is inside the course, where it would be published"):
        classroom.read_secret(file, course.root)
    outside = tmp_path / "secret.txt"
    with pytest.raises(CourseError, match=r"there is no file .*write a line of your own"):
        classroom.read_secret(outside, course.root)
    outside.write_text("abc\n")
    with pytest.raises(CourseError, match="holds 3 characters: a secret has 8 or more"):
        classroom.read_secret(outside, course.root)
    outside.write_text(f"{SECRET}\n")
    assert classroom.read_secret(outside, course.root) == SECRET


# Putting back


def test_cells_are_known_without_the_metadata_that_an_editor_dropped(given):
    bare = answer(given, double=DOUBLE)
    for cell in bare.cells:
        cell.metadata, cell.id = NotebookNode(), f"new-{cell.id}"
    restored, _ = classroom.restore(bare, given)
    assert DOUBLE in [cell.source for cell in tagged(restored, "exercise")]
    assert [c.metadata["nbgrader"]["grade_id"] for c in tagged(restored, "exercise")] == [
        "exercise-1", "exercise-2",
    ]  # fmt: skip


def test_cells_of_their_own_stay_and_a_copied_cell_counts_once(given):
    nb = answer(given, double=DOUBLE)
    at = next(i for i, cell in enumerate(nb.cells) if cell.source == DOUBLE)
    copied = deepcopy(nb.cells[at])
    copied.source = "def double(x):\n    return x + x\n"
    own = nbformat.v4.new_code_cell("helper = 1")
    nb.cells[at + 1 : at + 1] = [own, copied]
    restored, mended = classroom.restore(nb, given)
    assert not mended and len(restored.cells) == len(given.cells) + 2
    counted = [c for c in restored.cells if c.metadata.get("nbgrader", {}).get("solution")]
    assert counted[0].source == copied.source and len(counted) == 2


# Grading, with faults in the student's file

FAULTS = {
    # who: (points, what is told)
    "solved": (3, ""),
    "stubs": (0, "Exercise 1, double: put your code here"),
    "first_only": (1, "Exercise 2, a hash"),
    "looked_up": (0, "any number, not those of the tests"),
    "warns": (3, ""),
    "loops": (0, "its own cell ends in CellTimeoutError"),
    "floods": (3, ""),
    "dies": (0, "NotRun: a cell before it ended the run: Kernel died"),
    "imports_the_answer": (1, "course_utils.digest is refused here: exercise 2 asks you"),
    "skips_and_tampers": (0, "is it doubled?"),
    "deleted_tests": (3, "the cell tests 1 was missing, and was put back"),
    "deleted_exercise": (1, "the cell of exercise 2 is missing"),
    "renamed": (3, "the file was handed in as sample (1).ipynb"),
    "one_beside": (3, "old.ipynb beside it was not graded"),
    "two_files": (0, "there are 2 notebooks, and none is sample.ipynb"),
    "nothing": (0, "no notebook was handed in"),
    "broken": (0, "sample.ipynb is no notebook that can be read"),
    "empty": (0, "sample.ipynb is empty"),
}


@pytest.fixture(scope="module")
def graded(course, given, tmp_path_factory) -> dict[str, Graded]:
    """A class that handed in all of `FAULTS`, graded."""
    folder = tmp_path_factory.mktemp("class")
    names = classroom.write_sources([course], folder, SECRET)
    grading.generate(folder, names)
    released = nbformat.read(folder / "release" / "sample" / "sample.ipynb", as_version=4)
    assert [c.source.rstrip() for c in released.cells] == [c.source.rstrip() for c in given.cells]
    right = answer(released, double=DOUBLE, hashed=HASHED)
    for student, nb in {
        "solved": nbformat.read(folder / "source" / "sample" / "sample.ipynb", as_version=4),
        "stubs": released,
        "first_only": answer(released, double=DOUBLE),
        "looked_up": answer(released, double="def double(x):\n    return 4\n"),
        "warns": answer(
            right,
            double="import warnings\n\n\ndef double(x):\n    warnings.warn('slow')\n    return 2 * x\n",
        ),
        "loops": answer(released, double="while True:\n    pass\n"),
        "floods": answer(right, double=f"print('x' * 3_000_000)\n\n\n{DOUBLE}"),
        "dies": answer(right, double="os = __import__('os')\nos._exit(0)\n"),
        "imports_the_answer": answer(
            right, hashed="def hashed(text):\n    from course_utils.digest import sha256\n"
        ),
        "skips_and_tampers": skipping(released),
        "deleted_tests": without(right, "exercise-tests-1"),
        "deleted_exercise": without(right, "exercise-2", "exercise-tests-2"),
        "broken": '{"cells": [',
        "empty": nbformat.v4.new_notebook(),
    }.items():
        hand_in(folder, student, nb)
    hand_in(folder, "renamed", right, file="sample (1).ipynb")
    hand_in(folder, "one_beside", right)
    (folder / "submitted" / "one_beside" / "sample" / "old.ipynb").write_text("{}")
    for file in ("sample a.ipynb", "sample b.ipynb"):
        hand_in(folder, "two_files", right, file=file)
    (folder / "submitted" / "nothing").mkdir()
    found = {one.student: one for one in grade(folder, seconds=12)}
    found["folder"] = folder
    return found


def skipping(nb: NotebookNode) -> NotebookNode:
    """A student who has the tests skipped, and rewritten."""
    nb = answer(nb, double="def double(x):\n    return x\n")
    for cell in tagged(nb, "exercise-tests"):
        cell.source = "assert True"
        cell.metadata["tags"] = ["skip-execution"]
    return nb


def without(nb: NotebookNode, *grade_ids: str) -> NotebookNode:
    nb = deepcopy(nb)
    nb.cells = [c for c in nb.cells if c.metadata["nbgrader"]["grade_id"] not in grade_ids]
    return nb


@pytest.mark.parametrize("student", FAULTS)
def test_what_is_graded_is_the_students_file(graded, student):
    points, told = FAULTS[student]
    assert graded[student].points == points, reasons(graded[student])
    assert graded[student].most == 3
    assert told in reasons(graded[student])


def test_all_that_was_handed_in_is_in_the_table_and_has_feedback(graded):
    rows = list(csv.DictReader((graded["folder"] / "grades.csv").open()))
    assert {row["student_id"]: float(row["score"]) for row in rows} == {
        student: points for student, (points, _) in FAULTS.items()
    }
    page = (graded["folder"] / "feedback/imports_the_answer/sample/sample.html").read_text("utf-8")
    assert "is refused here" in page
    flood = (graded["folder"] / "autograded/floods/sample/sample.ipynb").stat().st_size
    assert flood < 200_000


def test_grading_tells_what_is_missing(tmp_path, graded):
    with pytest.raises(CourseError, match="holds no assignments: run `course assignments --out"):
        list(grade(tmp_path))
    with pytest.raises(CourseError, match=r"no assignment 'other' in .*: sample"):
        list(grade(graded["folder"], ["other"]))


def test_self_check_needs_a_student_version(tmp_path, course):
    file = tmp_path / "mine.ipynb"
    with pytest.raises(CourseError, match="there is no file"):
        self_check(file)
    file.write_text("{")
    with pytest.raises(CourseError, match="is no notebook that can be read"):
        self_check(file)
    nbformat.write(from_script(course), file)
    with pytest.raises(CourseError, match="is no student version: `course student NAME"):
        self_check(file)


# The course's own exercises

MUTATED = sorted(path.stem for path in (ROOT / "tests" / "mutants").glob("*.py"))


def mutants_of(name: str) -> dict[int, list[tuple[str, str, str]]]:
    return runpy.run_path(str(ROOT / "tests" / "mutants" / f"{name}.py"))["MUTANTS"]


def wrong(cell: NotebookNode, mutant: tuple[str, str, str]) -> str:
    """The source of an exercise's cell with a mistake."""
    _, said, instead = mutant
    assert said in cell.source, f"the solution does not say {said!r}"
    return cell.source.replace(said, instead)


def failure_of(sources: list[str], names: dict) -> str:
    """The error that sources end in, run one after the other on a copy of `names`; or nothing."""
    names = dict(names)
    try:
        for source in sources:
            exec(compile(source, "<cell>", "exec"), names)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("name", MUTATED)
def test_each_typical_mistake_costs_its_exercise(name, monkeypatch):
    """All mutants in this process, which has imported what a kernel would have to import for each."""
    monkeypatch.setenv("COURSE_PROFILE", "quick")
    (notebook,) = find_notebooks(ROOT, [name])
    nb, names = classroom.teacher_version(notebook, SECRET), {"__name__": "__main__"}
    mutants = mutants_of(name)
    for cell in nb.cells:
        opening = cell.metadata["nbgrader"]["grade_id"].startswith("opening")
        if opening and cell.cell_type == "code" and "setup" not in cell.metadata.get("tags", []):
            exec(cell.source, names)
    exercises, tests = tagged(nb, "exercise"), tagged(nb, "exercise-tests")
    assert sorted(mutants) == list(range(1, len(exercises) + 1))
    for number, exercise, test in zip(sorted(mutants), exercises, tests, strict=True):
        assert len(mutants[number]) >= 3
        for mutant in mutants[number]:
            told = failure_of([wrong(exercise, mutant), test.source], names)
            assert "NameError" not in told, told  # which is no test's doing
            assert told, f"exercise {number} passes {mutant[0]}"
            assert told != "AssertionError: ", f"exercise {number} says nothing of {mutant[0]}"
        for source in (exercise.source, test.source):  # later exercises may build on both
            exec(source, names)


@pytest.mark.notebook
def test_nbgrader_gives_the_solution_all_points_and_stubs_and_a_bundle_of_mistakes_none(tmp_path):
    """A bundle holds a mistake of every exercise."""
    name, file = "llm_int8_demo", "llm_int8_demo.ipynb"
    (notebook,) = find_notebooks(ROOT, [name])
    grading.generate(tmp_path, classroom.write_sources([notebook], tmp_path, SECRET))
    source = nbformat.read(tmp_path / "source" / name / file, as_version=4)
    bundle = deepcopy(source)
    for cell, mutants in zip(tagged(bundle, "exercise"), mutants_of(name).values(), strict=True):
        cell.source = wrong(cell, mutants[0])
    hand_in(tmp_path, "solution", source, file=file)
    hand_in(tmp_path, "stub", (tmp_path / "release" / name / file).read_text("utf-8"), file=file)
    hand_in(tmp_path, "bundle", bundle, file=file)
    graded = {one.student: one for one in grade(tmp_path)}
    assert graded["solution"].points == graded["solution"].most > 0, reasons(graded["solution"])
    assert graded["stub"].points == graded["bundle"].points == 0
    assert all("NotImplementedError" in told.reason for told in graded["stub"].exercises)


def test_defect_assignments_were_made_only_in_an_activated_environment(
    course, tmp_path, monkeypatch
):
    """nbgrader calls `alembic` by name, and an environment's Python can be called by its path alone."""
    monkeypatch.setenv("PATH", str(tmp_path))
    grading.generate(tmp_path, classroom.write_sources([course], tmp_path, SECRET))
    assert (tmp_path / "release" / "sample" / "sample.ipynb").is_file()
    assert os.environ["PATH"] == str(tmp_path)


def test_defect_assignments_that_were_not_made_told_no_reason(course, tmp_path):
    names = classroom.write_sources([course], tmp_path, SECRET)
    (tmp_path / "source" / "sample" / "sample.ipynb").write_text("{")
    with pytest.raises(CourseError, match=r"could not make the assignment sample: .*JSON"):
        grading.generate(tmp_path, names)


# The handbook


def test_the_commands_of_the_handbook_work_as_they_stand(course, given):
    text = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
    commands = re.search(r"```bash\n(.*?)```", text, re.S)[1].strip().splitlines()
    assert len(commands) == 5
    install, *others = commands
    assert install == 'python -m pip install -c constraints.txt -e ".[classroom]"'
    environment = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT)}
    for command in others:
        if " grade " in command:
            folder = (course.root / shlex.split(command)[-1]).resolve()
            hand_in(folder, "ada", answer(given, double=DOUBLE, hashed=HASHED))
        python = command.replace("python", shlex.quote(sys.executable), 1)
        done = subprocess.run(
            python, shell=True, cwd=course.root, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert "ada, sample: 3 of 3 points" in done.stdout


def test_the_handbook_names_notebooks_that_exist_with_their_minutes():
    text = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \| (\d+) \| ", text, re.M)
    assert len(rows) > 10
    for name, minutes in rows:
        (notebook,) = find_notebooks(ROOT, [name])
        opening = " ".join(notebook.script.read_text(encoding="utf-8").split())
        told = re.search(r"It takes about (an hour|\d+ minutes) to read and work", opening)
        assert told and told[1] in (f"{minutes} minutes", "an hour" if minutes == "60" else ""), (
            name
        )
