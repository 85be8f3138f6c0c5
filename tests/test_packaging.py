"""pyproject.toml, constraints.txt, environment.yml, Makefile: that they agree."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from typer.main import get_command

from course_utils import REVISION, __version__
from course_utils.tools import colab
from course_utils.tools.cli import app
from course_utils.tools.notebooks.pairs import FOLDERS

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


def requirements(*extras: str) -> list[Requirement]:
    """Everything that the package asks for with these extras, those of its extras among them."""
    found = [Requirement(text) for text in PROJECT["dependencies"]]
    for extra in extras:
        for text in EXTRAS[extra]:
            requirement = Requirement(text)
            if requirement.name == PROJECT["name"]:
                found += requirements(*requirement.extras)
            else:
                found.append(requirement)
    return found


def test_requirements_have_lower_bounds_only():
    every = requirements(*EXTRAS)
    assert {"torch", "bitsandbytes", "pytest"} <= {requirement.name for requirement in every}
    for requirement in every:
        assert {bound.operator for bound in requirement.specifier} <= {">="}, requirement
        assert requirement.url is None


def test_what_colab_gets_has_no_tools_of_notebooks():
    base = {requirement.name for requirement in requirements()}
    assert not base & {"bitsandbytes", "jupyterlab", "papermill", "nbval", "jupytext", "pytest"}
    assert {requirement.name for requirement in requirements("course")} >= {
        "bitsandbytes", "jupyterlab", "papermill", "nbval", "jupytext",
    }  # fmt: skip


def test_constraints_are_exact_and_portable():
    assert len({canonicalize_name(pin.name) for pin in CONSTRAINTS}) == len(CONSTRAINTS)
    for pin in CONSTRAINTS:
        (bound,) = pin.specifier
        assert bound.operator == "==" and "+" not in bound.version, pin
        assert pin.url is None


@pytest.mark.parametrize("requirement", requirements("test"), ids=str)
def test_constraints_hold_what_the_package_asks_for(requirement):
    pins = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in CONSTRAINTS}
    assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


def test_environment_yml_leaves_everything_to_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    *conda, with_pip = environment["dependencies"]
    python, pip = map(Requirement, conda)
    assert python.name == "python"
    assert python.specifier == SpecifierSet(PROJECT["requires-python"])
    assert (pip.name, str(pip.specifier)) == ("pip", "")
    (installed,) = with_pip["pip"]
    extra = re.fullmatch(r"-e \.\[(\w+)\]", installed)
    assert extra and extra[1] in EXTRAS


def test_make_targets_are_commands_that_windows_has():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    called = re.findall(r"^\t\$\(COURSE\) (.+)$", makefile, re.M)
    commands = get_command(app).commands
    named = {call.split()[0] for call in called}
    assert {"run", "test", "lab", "build", "check", "lint"} <= named
    assert named <= set(commands)


def test_each_make_target_has_one_rule_and_runs_the_command_of_its_name():
    """A rule once lost its name to a bad edit: `make lab` ran the notebooks on Colab's packages."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.+)$", makefile, re.M)
    targets = re.findall(r"^([\w-]+):", makefile, re.M)
    assert sorted(targets) == sorted(phony.split())
    rules = re.findall(r"^([\w-]+):.*\n\t\$\(COURSE\) ([\w-]+)", makefile, re.M)
    assert {target: command for target, command in rules if target != command} == {"course": "run"}
    assert {target for target, _ in rules} == set(targets) - {"clean"}


@pytest.mark.parametrize("name", sorted(get_command(app).commands))
def test_help_has_an_example(name):
    command = get_command(app).commands[name]
    for leaf in getattr(command, "commands", {name: command}).values():
        assert name == "lab" or "`course " in leaf.help, f"{leaf.name} has no example"


def test_continuous_integration_runs_make_test_and_the_newest_runtime_of_colab():
    run = ROOT / ".ci" / "run"
    assert run.stat().st_mode & 0o111
    newest = list(colab.runtimes(ROOT))[-1]
    assert run.read_text(encoding="utf-8").splitlines()[-2:] == [
        f".venv/bin/python -m course_utils test-colab {newest} --profile quick --t4",
        "make test",
    ]


def test_the_version_is_in_one_place():
    assert PROJECT["dynamic"] == ["version"]
    attribute = PYPROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert attribute == "course_utils.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    assert REVISION in ("main", f"v{__version__}")  # of a release, its tag


def test_pytest_and_ruff_know_all_folders_of_notebooks():
    options = PYPROJECT["tool"]["pytest"]["ini_options"]
    assert set(options["testpaths"]) == {"tests", *FOLDERS}
    (pattern,) = PYPROJECT["tool"]["ruff"]["lint"]["per-file-ignores"]
    assert set(re.findall(r"\w+", pattern.split("}")[0])) == set(FOLDERS)
    for folder in FOLDERS:
        settings = tomllib.loads((ROOT / folder / "ruff.toml").read_text(encoding="utf-8"))
        assert settings["line-length"] == 88


def test_the_license_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
