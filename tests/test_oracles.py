"""Making golden vectors anew: which libraries, in which environments, and what fails aloud."""

from pathlib import Path

import pytest

from course_utils.tools import CourseError
from course_utils.tools.golden import libraries, make_environment, write_vectors

ROOT = Path(__file__).parent.parent
WRITE = "import sys\nfrom pathlib import Path\n"


@pytest.fixture
def course(tmp_path: Path) -> Path:
    """A course with one oracle, which needs nothing installed."""
    root = tmp_path / "a course"
    oracle = root / "course_utils" / "tools" / "oracles" / "library"
    oracle.mkdir(parents=True)
    (oracle / "requirements.txt").write_text("# nothing\n")
    (oracle.parent / "sums_layers.py").write_text(
        f"{WRITE}Path(sys.argv[1], 'sums_layers').write_text('layers')"
    )
    (oracle / "sums.py").write_text(
        f"{WRITE}layers = Path(sys.argv[1], 'sums_layers').read_text()\n"
        "Path(sys.argv[1], 'library_sums').write_text(layers + sys.prefix)\n"
        "Path('a log').touch()"
    )
    return root


def test_layers_come_first_and_scripts_run_in_an_environment_of_their_own(course):
    lines = list(write_vectors(course))
    assert [line.partition(":")[0] for line in lines] == ["sums_layers", "library", "library"]
    environment = course / "runs" / "oracles" / "library"
    written = (course / "tests" / "golden" / "library_sums").read_text()
    assert written == f"layers{environment}"
    assert (environment / "a log").exists() and not Path("a log").exists()

    kept = environment / "kept"
    kept.touch()
    requirements = course / "course_utils" / "tools" / "oracles" / "library" / "requirements.txt"
    make_environment(requirements, environment)
    assert kept.exists()
    requirements.write_text("# changed\n")
    make_environment(requirements, environment)
    assert not kept.exists()


def test_a_script_that_fails_and_an_oracle_that_is_not_there_are_errors(course):
    with pytest.raises(CourseError, match=r"no oracle 'hqq'\. There are: library"):
        list(write_vectors(course, ["hqq"]))
    (course / "course_utils" / "tools" / "oracles" / "sums_layers.py").write_text(
        "raise SystemExit(3)"
    )
    with pytest.raises(CourseError, match=r"sums_layers\.py .* failed: see above"):
        list(write_vectors(course))


def test_every_oracle_pins_what_it_installs():
    found = libraries(ROOT)
    assert {"gptqmodel", "llmcompressor"} <= {folder.name for folder in found}
    for folder in found:
        lines = (folder / "requirements.txt").read_text().splitlines()
        pins = [line for line in lines if not line.startswith("#")]
        assert pins and all("==" in pin for pin in pins), folder.name
        for script in folder.glob("*.py"):
            assert (
                ROOT / "tests" / "golden" / f"{folder.name}_{script.stem}.safetensors"
            ).is_file()
