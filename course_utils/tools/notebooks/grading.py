"""Grading by nbgrader, whose steps are set here so that a broken submission is zero points with a reason.

Needs the extra `classroom`. `configure` is what a teacher's folder has in its `nbgrader_config.py`, so that
nbgrader's own commands work there; `grade` does all steps for all submissions, and never stops at one.

What is ours in the pipeline: a stub names its exercise; cells that students do not write are put back as
they were given, with their tags; a kernel that dies, an endless loop or a flood of output leaves tests that
did not run, and those give nothing (nbgrader takes a cell without an error for right); a warning on stderr
costs no points (nbgrader takes it for an error), and a value that a cell ends with is not taken for them.
"""

import logging
import os
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient.exceptions import CellControlSignal, DeadKernelError
from nbconvert.exporters import HTMLExporter
from nbformat import NotebookNode
from nbgrader.api import Gradebook
from nbgrader.converters import Autograde, GenerateAssignment, GenerateFeedback
from nbgrader.converters.base import NbGraderException
from nbgrader.coursedir import CourseDirectory
from nbgrader.plugins.export import CsvExportPlugin
from nbgrader.preprocessors import (
    AssignLatePenalties,
    CheckCellMetadata,
    ClearHiddenTests,
    ClearOutput,
    ComputeChecksums,
    DeduplicateIds,
    Execute,
    LimitOutput,
    LockCells,
    NbGraderPreprocessor,
    OverwriteCells,
    OverwriteKernelspec,
    SaveAutoGrades,
    SaveCells,
)
from sqlalchemy.exc import SAWarning
from traitlets import Integer
from traitlets.config import Config

from course_utils.tools import CourseError
from course_utils.tools.notebooks.classroom import Outcome, find_submission, outcomes, restore
from course_utils.tools.notebooks.execute import kernel_of_its_own, set_environment
from course_utils.tools.notebooks.exercises import Exercise
from course_utils.tools.notebooks.students import stub_of

PROFILE = "quick"
CELL_SECONDS = 120
MOST_OUTPUT = 100_000  # characters a cell


@dataclass(frozen=True)
class Graded:
    """One student's assignment: its exercises, and what is to be said of it."""

    student: str
    assignment: str
    exercises: list[Outcome]
    notes: list[str]

    @property
    def points(self) -> int:
        return sum(outcome.points for outcome in self.exercises)

    @property
    def most(self) -> int:
        return sum(outcome.most for outcome in self.exercises)


class Stubs(NbGraderPreprocessor):
    """In the place of nbgrader's ClearSolutions: the stub of each exercise names it."""

    def preprocess(self, nb: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        told = iter(nb.metadata["course"]["exercises"])
        for cell in nb.cells:
            if cell.metadata["nbgrader"]["solution"]:
                cell.source = stub_of(cell, Exercise(**next(told)))
        return nb, resources


class Restore(NbGraderPreprocessor):
    """Before nbgrader looks at a submission: the cells that students do not write, as they were given.

    Converters run in the teacher's folder, where `source` holds what was given. What was mended stands in a
    cell at the top, which the feedback shows.
    """

    def preprocess(self, nb: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        told = resources["nbgrader"]
        given = Path("source", told["assignment"], f"{told['notebook']}.ipynb")
        nb, mended = restore(nb, nbformat.read(given, as_version=4))
        if mended:
            text = "**Notes of the grading**\n\n" + "\n".join(f"- {note}" for note in mended)
            nb.cells.insert(0, nbformat.v4.new_markdown_cell(text))
        nb.metadata["course"]["mended"] = mended
        return nb, resources


class RunSubmission(Execute):
    """nbgrader's run, for which a cell of tests that did not run to its end is a failed one."""

    timeout = Integer(CELL_SECONDS, help="Seconds a cell.", allow_none=True).tag(config=True)
    most_output = Integer(MOST_OUTPUT, help="Characters of output a cell.").tag(config=True)

    def preprocess(self, nb: NotebookNode, resources: dict, km=None) -> tuple[NotebookNode, dict]:
        self._written: dict[int, int] = {}
        reason = "a cell before it kept the notebook from running on"
        try:
            super().preprocess(nb, resources, km)
        except (DeadKernelError, CellControlSignal) as error:
            reason = (
                f"a cell before it ended the run: {(str(error).splitlines() or ['timeout'])[0]}"
            )
        for cell in nb.cells:
            if cell.metadata.get("nbgrader", {}).get("grade"):
                _settle(cell, reason)
        return nb, resources

    def output(self, outs: list, msg: dict, display_id: str | None, cell_index: int):
        """Keep an output, but for what exceeds the limit of its cell."""
        content = msg["content"]
        size = len(content.get("text", "")) + sum(
            len(str(part)) for part in content.get("data", {}).values()
        )
        before = self._written.get(cell_index, 0)
        self._written[cell_index] = before + size
        if before + size <= self.most_output or msg["msg_type"] == "error":
            return super().output(outs, msg, display_id, cell_index)
        if before <= self.most_output:
            told = f"... the output beyond {self.most_output:,} characters is left out\n"
            outs.append(nbformat.v4.new_output("stream", name="stdout", text=told))
        return None


def configure(config: Config) -> None:
    """Set what nbgrader does in a teacher's folder."""
    os.environ.setdefault("COURSE_PROFILE", PROFILE)
    config.CourseDirectory.course_id = "large-model-quantization"
    # nbgrader's own steps, with ours in the place of ClearSolutions; none of header, footer or markings
    config.GenerateAssignment.preprocessors = [
        LockCells, Stubs, ClearOutput, CheckCellMetadata, ComputeChecksums, SaveCells,
        ClearHiddenTests, ComputeChecksums, CheckCellMetadata,
    ]  # fmt: skip
    config.Autograde.sanitize_preprocessors = [
        Restore, ClearOutput, DeduplicateIds, OverwriteKernelspec, OverwriteCells, CheckCellMetadata,
    ]  # fmt: skip
    config.Autograde.autograde_preprocessors = [
        RunSubmission, LimitOutput, SaveAutoGrades, AssignLatePenalties, CheckCellMetadata,
    ]  # fmt: skip


def generate(folder: Path, assignments: list[str]) -> None:
    """Let nbgrader make the release of each assignment in `folder`, and take its cells down.

    Raises `CourseError` with what nbgrader says if it cannot.
    """
    config = _config(folder)
    for name in assignments:
        log: list[str] = []
        try:
            with _nbgrader(log):
                _start(GenerateAssignment, config, assignment=name)
        except NbGraderException as error:
            told = "; ".join(dict.fromkeys(log)) or "no reason was given"
            raise CourseError(f"nbgrader could not make the assignment {name}: {told}") from error


def grade(
    folder: Path, assignments: list[str] | None = None, seconds: int = CELL_SECONDS
) -> Iterator[Graded]:
    """Grade what lies in `folder/submitted`, and write feedback and `grades.csv`; yields each as it is done.

    `seconds` is how long a cell may take. Raises `CourseError` if there is nothing to grade.
    """
    known = sorted(path.name for path in folder.glob("source/*") if path.is_dir())
    if not (folder / "gradebook.db").is_file() or not known:
        raise CourseError(
            f"{folder} holds no assignments: run `course assignments --out {folder}`."
        )
    for name in assignments or []:
        if name not in known:
            raise CourseError(f"there is no assignment {name!r} in {folder}: {', '.join(known)}.")
    students = sorted(path.name for path in folder.glob("submitted/*") if path.is_dir())
    if not students:
        raise CourseError(
            f"nobody handed in: put notebooks at {folder}/submitted/STUDENT/NAME/NAME.ipynb."
        )
    config = _config(folder)
    config.RunSubmission.timeout = seconds
    with TemporaryDirectory(prefix="course-") as scratch:
        variables = kernel_of_its_own(Path(scratch))
        variables |= {"COURSE_PROFILE": PROFILE, "COURSE_SEED_FILE": ""}  # none of theirs to know
        with set_environment(variables), Gradebook(_database(folder)) as gradebook:
            for name in assignments or known:
                for student in students:
                    yield _grade_one(folder, config, gradebook, name, student)
            export = CsvExportPlugin(config=config)
            export.to = str(folder / "grades.csv")
            export.export(gradebook)


def _grade_one(
    folder: Path, config: Config, gradebook: Gradebook, name: str, student: str
) -> Graded:
    submitted = folder / "submitted" / student / name
    found, note = find_submission(submitted, name)
    notes, log = [note] if note else [], []
    if found is not None:
        if found.name != f"{name}.ipynb":
            found.rename(submitted / f"{name}.ipynb")
        try:
            with _nbgrader(log):
                _start(Autograde, config, assignment=name, student=student)
                _start(GenerateFeedback, config, assignment=name, student=student)
        except NbGraderException:
            notes.append("nbgrader could not grade it: " + (log or ["no reason was given"])[0])
            found = None
    gradebook.db.expire_all()
    if found is None:
        _zero(gradebook, name, student)
        given = nbformat.read(folder / "source" / name / f"{name}.ipynb", as_version=4)
        nothing = [
            Outcome(o.number, o.title, 0, o.most, "nothing to grade") for o in outcomes(given)
        ]
        return Graded(student, name, nothing, notes)
    run = nbformat.read(folder / "autograded" / student / name / f"{name}.ipynb", as_version=4)
    return Graded(student, name, outcomes(run), notes + run.metadata["course"]["mended"])


def _zero(gradebook: Gradebook, name: str, student: str) -> None:
    """No points, in the gradebook as well, whatever an earlier run gave."""
    with _nbgrader([]):
        gradebook.update_or_create_student(student)
        submission = gradebook.update_or_create_submission(name, student)
    for notebook in submission.notebooks:
        for grade in notebook.grades:
            grade.auto_score, grade.needs_manual_grade = 0, False
    gradebook.db.commit()


def _settle(cell: NotebookNode, reason: str) -> None:
    """Make a cell of tests tell by its outputs alone whether it gives points."""
    failed = any(output.output_type == "error" for output in cell.outputs)
    if cell.execution_count is None and not failed:
        told = {"ename": "NotRun", "evalue": reason, "traceback": [f"NotRun: {reason}"]}
        cell.outputs.append(nbformat.v4.new_output("error", **told))
    for output in cell.outputs:
        if output.output_type == "stream":
            output.name = "stdout"
        elif output.output_type == "execute_result":
            output.output_type = "display_data"
            del output["execution_count"]


def _config(folder: Path) -> Config:
    config = Config()
    configure(config)
    config.CourseDirectory.root = str(folder.resolve())
    config.CourseDirectory.db_url = _database(folder)
    return config


def _database(folder: Path) -> str:
    return f"sqlite:///{folder.resolve() / 'gradebook.db'}"


def _start(converter: type, config: Config, assignment: str, student: str = "*") -> None:
    course = CourseDirectory(config=config)
    course.assignment_id, course.student_id = assignment, student
    made = converter(coursedir=course, config=config)
    if converter is GenerateFeedback:
        made.exporter_class = HTMLExporter
    made.force = True
    made.start()


@contextmanager
def _nbgrader(found: list[str]) -> Iterator[None]:
    """While nbgrader works: collect the last line of each error that it logs, and show nothing of its log.

    It calls `alembic` by name, which lies beside Python also where the environment was not activated.
    """

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.ERROR:
                found.append(record.getMessage().strip().splitlines()[-1])

    logger, handler = logging.getLogger("traitlets"), Noting()
    propagate, handlers = logger.propagate, logger.handlers
    logger.propagate, logger.handlers = False, [handler]
    scripts = os.pathsep.join(filter(None, [sysconfig.get_path("scripts"), os.environ.get("PATH")]))
    try:
        with warnings.catch_warnings(), set_environment({"PATH": scripts}):
            warnings.simplefilter("ignore", SAWarning)  # of nbgrader's own way with its database
            yield
    finally:
        logger.propagate, logger.handlers = propagate, handlers
