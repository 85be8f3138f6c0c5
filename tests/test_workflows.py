"""The workflows of GitHub: known keys, pinned actions, few permissions, no logic of their own.

GitHub's syntax is checked as far as these workflows use it: a key that is not listed here is a
mistake, or a line to add.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from typer.main import get_command

from course_utils.tools import colab
from course_utils.tools.cli import app

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*"))
COMMANDS = get_command(app).commands
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)

KEYS = {
    "workflow": {"name", "on", "permissions", "concurrency", "jobs"},
    "on": {"push", "pull_request", "schedule", "workflow_dispatch", "workflow_call"},
    "job": {
        "name", "needs", "if", "runs-on", "timeout-minutes", "strategy", "env", "permissions", "steps",
    },
    "call": {"uses", "with"},
    "step": {"uses", "with", "if", "run"},
    "strategy": {"fail-fast", "matrix"},
}  # fmt: skip
INPUTS = {"actions/checkout": set(), "actions/setup-python": {"python-version"}}
# What makes an environment or reports; the rest of a workflow calls the course's own commands.
ALLOWED = (
    r"python3? -m venv( --system-site-packages --without-pip)? \.venv",
    r"python -m pip install uv",
    r"uv pip install --python \.venv --torch-backend=cpu( -c constraints\.txt)? torch",
    r"\.venv/bin/python -m pip install( -c constraints\.txt)? --editable \"\.\[(test|course)\]\"",
    r"sudo rm -rf( /[\w/.]+)+",
    r"docker run --detach --name colab --entrypoint bash .* \"\$IMAGE\" -c \"sleep infinity\"",
    r"git config user\.(name|email) \S+",
    r"git --work-tree \.\./assignments (checkout --orphan assignments|add --all|commit --message \"[\w ]+\")",
    r"git push --force origin assignments",
    r"gh issue list .* \| grep \. \|\| gh issue create .*",
)


def read(path: Path) -> dict:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    workflow["on"] = workflow.pop(True)  # YAML 1.1 takes `on` for a truth value
    return workflow


def jobs(path: Path) -> Iterator[dict]:
    yield from read(path)["jobs"].values()


def steps(path: Path) -> Iterator[dict]:
    for job in jobs(path):
        yield from job.get("steps", [])


def problem(line: str) -> str | None:
    """What is wrong with a `run` line."""
    line = line.removeprefix("docker exec colab ")
    if any(re.fullmatch(pattern, line) for pattern in ALLOWED):
        return None
    words = shlex.split(line)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        return None if set(words[1:]) <= set(targets) and words[1:] else "no such target"
    if words[:3] != [".venv/bin/python", "-m", "course_utils"]:
        return "no command of the course"
    if words[3] not in COMMANDS:
        return "no such command"
    known = {name for parameter in COMMANDS[words[3]].params for name in parameter.opts}
    given = {word for word in words[4 : words.index("--") if "--" in words else None]}
    return None if {word for word in given if word.startswith("-")} <= known else "no such option"


def test_the_workflows_that_there_are():
    assert [path.name for path in WORKFLOWS] == [
        "assignments.yml", "colab.yml", "gpu.yml", "tests.yml", "weekly.yml",
    ]  # fmt: skip


@each_workflow
def test_keys_are_those_that_github_knows(path):
    workflow = read(path)
    assert set(workflow) <= KEYS["workflow"]
    assert {"name", "on", "permissions", "jobs"} <= set(workflow)
    assert set(workflow["on"]) <= KEYS["on"]
    for job in jobs(path):
        assert set(job) <= (KEYS["call"] if "uses" in job else KEYS["job"])
        assert set(job.get("needs", [])) <= set(workflow["jobs"])
        assert set(job.get("strategy", {})) <= KEYS["strategy"]
        assert "uses" in job or 0 < job["timeout-minutes"] <= 180
    for step in steps(path):
        assert set(step) <= KEYS["step"]
        assert ("uses" in step) != ("run" in step)


@each_workflow
def test_actions_are_githubs_own_pinned_by_major_version(path):
    for step in steps(path):
        if "uses" in step:
            action, version = step["uses"].split("@")
            assert re.fullmatch(r"v\d+", version)
            assert set(step.get("with", {})) <= INPUTS[action]
    for job in jobs(path):
        if "uses" in job:
            inputs = read(ROOT / job["uses"])["on"]["workflow_call"]["inputs"]
            assert set(job["with"]) <= set(inputs)


@each_workflow
def test_every_line_is_a_command_of_the_course(path):
    lines = [step["run"] for step in steps(path) if "run" in step]
    assert {line: problem(line) for line in lines} == dict.fromkeys(lines)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("make tests", "no such target"),
        ("make", "no such target"),
        ("pytest tests", "no command of the course"),
        (".venv/bin/python -m course_utils rum", "no such command"),
        (".venv/bin/python -m course_utils run --profil gpu", "no such option"),
        ("docker exec colab make course && true", "no such target"),
        ("python -m venv .venv && rm x", "no command of the course"),
    ],
)
def test_a_wrong_line_is_seen(line, message):
    assert problem(line) == message


@each_workflow
def test_only_the_report_and_the_branch_of_assignments_are_written(path):
    allowed = {"report": {"issues": "write"}, "publish": {"contents": "write"}}
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job.get("permissions") == allowed.get(name)
    if path.name == "assignments.yml":  # no pull request may push
        assert set(workflow["on"]) == {"push", "workflow_dispatch"}
        assert workflow["on"]["push"] == {"branches": ["main"]}
    for step in steps(
        path
    ):  # what a stranger can choose, as a branch's name, stays out of the shell
        assert set(re.findall(r"\$\{\{ *([\w.-]+)", step.get("run", ""))) <= {"matrix.runtime"}


def test_a_runner_of_ones_own_sees_no_pull_request_and_no_fork():
    for path in WORKFLOWS:
        for job in jobs(path):
            if "self-hosted" in job.get("runs-on", ""):
                assert job["if"] == "vars.GPU_RUNNER == 'true'" and "gpu" in job["runs-on"]
                assert set(read(path)["on"]) == {"push", "workflow_dispatch"}


def test_colabs_image_runs_as_a_t4_at_a_push_and_the_profile_colab_weekly():
    (job,) = jobs(FOLDER / "colab.yml")
    asked = {
        step["run"].split("course_utils ")[-1]: step["if"] for step in job["steps"] if "if" in step
    }
    assert asked == {
        "test-colab --python python3 --profile quick --t4": "${{ !inputs.weekly }}",
        "test-colab --python python3": "${{ inputs.weekly }}",
        "test -- --ignore=tests": "${{ inputs.weekly }}",
    }
    assert read(FOLDER / "weekly.yml")["jobs"]["image"]["with"] == {"weekly": True}


def test_actionlint_is_told_the_labels_of_runners_of_ones_own():
    """actionlint knows GitHub's own labels only, and refuses any other."""
    told = yaml.safe_load((FOLDER.parent / "actionlint.yaml").read_text(encoding="utf-8"))
    labels = {
        label
        for path in WORKFLOWS
        for job in jobs(path)
        if isinstance(job.get("runs-on"), list)
        for label in job["runs-on"]
    }
    assert told == {"self-hosted-runner": {"labels": sorted(labels - {"self-hosted"})}}


def test_addresses_stay_out():
    for path in WORKFLOWS:
        text = path.read_text(encoding="utf-8")
        assert "://" not in text and "index-url" not in text
        hosts = set(re.findall(r"[\w-]+\.(?:dev|io|org|com)/[\w/-]*", text))
        assert hosts <= {"pkg.dev/colab-images/public/cpu-runtime"}


def test_pythons_and_runtimes_are_those_of_the_course():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (supported,) = re.findall(r'requires-python = "(.+)"', project)
    (test,) = jobs(FOLDER / "tests.yml")
    pythons = test["strategy"]["matrix"]["python"]
    assert pythons == ["3.11", "3.12", "3.13", "3.14"]
    assert SpecifierSet(supported) == SpecifierSet(f">={pythons[0]}")
    chosen = {entry["python"]: entry["tests"] for entry in test["strategy"]["matrix"]["include"]}
    assert chosen == dict.fromkeys(pythons, "not notebook") | {"3.13": ""}
    assert test["env"] == {"TESTS": "${{ matrix.tests }}"}
    runtimes = read(FOLDER / "weekly.yml")["jobs"]["runtimes"]["strategy"]["matrix"]["include"]
    assert {entry["runtime"] for entry in runtimes} == set(colab.runtimes(ROOT))
