"""The wheel and the sdist, built from a copy of the tree and used away from it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from course_utils import __version__
from course_utils.tools.notebooks.pairs import FOLDERS

ROOT = Path(__file__).parent.parent
# What building needs, and folders it must leave out; not .git, environments and runs.
PARTS = ["pyproject.toml", "README.md", "LICENSE", "course_utils", "tests", *FOLDERS]
SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"


def call(*command: str | Path, cwd: Path, **environment: str) -> str:
    run = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def build_wheel(source: Path, out: Path) -> Path:
    """The wheel of a source tree or sdist, with the setuptools that is here."""
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    call(sys.executable, "-m", "pip", "wheel", *offline, "-w", out, source, cwd=out.parent)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """(wheel, sdist) of a copy of the tree: building writes into the tree it builds."""
    folder = tmp_path_factory.mktemp("a build")
    tree = folder / "tree"
    tree.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, tree)
    sdist = call(sys.executable, "-c", SDIST, folder, cwd=tree).splitlines()[-1]
    return build_wheel(tree, folder / "wheel"), folder / sdist


def contents(wheel: Path) -> dict[str, int]:
    """Names and checksums of the files in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {item.filename: item.CRC for item in archive.infolist()}


def test_the_wheel_holds_the_package_and_its_assets_and_nothing_else(built):
    names = set(contents(built[0]))
    assert {name.split("/")[0] for name in names} == {
        "course_utils",
        f"course_utils-{__version__}.dist-info",
    }
    tree = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "course_utils").rglob("*")
        if path.is_file()
    }
    tree = {name for name in tree if "__pycache__" not in name}
    assert {name for name in names if name.startswith("course_utils/")} == tree
    assert "course_utils/assets/course-lm/model.safetensors" in tree
    assert not [name for name in names if name.endswith(".ipynb") or "test" in name]


def test_the_sdist_gives_the_same_wheel(built, tmp_path):
    wheel, sdist = built
    assert contents(build_wheel(sdist, tmp_path / "wheel")) == contents(wheel)


USE = """
import sys
from pathlib import Path

import course_utils
from course_utils.data.tokens import evaluation_tokens
from course_utils.evaluation import perplexity
from course_utils.models import load_model
from course_utils.compression import get_method, quantize_model

assert Path(course_utils.__file__).is_relative_to(sys.prefix), course_utils.__file__
model, tokenizer = load_model("course-lm")
before = perplexity(model, evaluation_tokens(tokenizer, 128), window=64).perplexity
print(quantize_model(model, get_method("llm_int8")))
after = perplexity(model, evaluation_tokens(tokenizer, 128), window=64).perplexity
assert abs(after / before - 1) < 0.02, (before, after)
"""


def test_the_installed_wheel_loads_course_lm_and_quantizes_it(built, tmp_path):
    """In an empty environment that borrows torch and the rest from here, but not course_utils."""
    environment = tmp_path / "an environment"
    call(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / Path(sys.executable).name
    install = [
        "--python",
        python,
        "install",
        "--no-index",
        "--no-deps",
        "--disable-pip-version-check",
    ]
    call(sys.executable, "-m", "pip", *install, built[0], cwd=tmp_path)
    # Our site-packages goes to the end of its path. A .pth file in there, such as that of an
    # editable install, is not read, as Python reads those of its own site-packages alone.
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(call(python, "-I", "-c", ask, cwd=tmp_path).strip())
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    printed = call(python, "-I", "-c", USE, cwd=tmp_path)
    assert "16 layers, 3,145,728 weights" in printed and "bits per weight" in printed
    assert "Usage: course" in call(scripts / "course", "--help", cwd=tmp_path)
