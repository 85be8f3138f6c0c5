"""Making golden vectors anew: which libraries, in which environments, and what fails aloud."""

from pathlib import Path

import pytest

from course_utils.tools import CourseError
from course_utils.tools.golden import environment, libraries, make_environment, write_vectors

ROOT = Path(__file__).parent.parent
WRITE = "import sys\nfrom pathlib import Path\n"


@pytest.fixture
def course(tmp_path: Path, monkeypatch) -> Path:
    """A course with one oracle, which needs nothing installed."""
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "a course"
    oracle = root / "course_utils" / "tools" / "oracles" / "library"
    oracle.mkdir(parents=True)
    (oracle / "requirements.txt").write_text("# nothing\n")
    (oracle.parent / "sums_layers.py").write_text(
        f"{WRITE}Path(sys.argv[1], 'sums_layers.safetensors').write_text('layers')"
    )
    (oracle / "sums.py").write_text(
        f"{WRITE}layers = Path(sys.argv[1], 'sums_layers.safetensors').read_text()\n"
        "Path(sys.argv[1], 'library_sums').write_text(layers + sys.prefix)\n"
        "Path('a log').touch()"
    )
    return root


def test_layers_come_first_and_scripts_run_in_an_environment_of_their_own(course):
    lines = list(write_vectors(course))
    assert [line.partition(":")[0] for line in lines] == ["sums_layers", "library", "library"]
    (library,) = libraries(course)
    made = environment(library)
    written = (course / "tests" / "golden" / "library_sums").read_text()
    assert written == f"layers{made}"
    assert (made / "a log").exists() and not Path("a log").exists()

    kept = made / "kept"
    kept.touch()
    requirements = library / "requirements.txt"
    make_environment(requirements, made)
    assert kept.exists()
    requirements.write_text("# changed\n")
    make_environment(requirements, made)
    assert not kept.exists()


def test_layers_that_are_stored_are_kept_and_answers_made_anew(course):
    """On another machine Hessians differ by 1e-8, and with them once did all that libraries made of them."""
    golden = course / "tests" / "golden"
    golden.mkdir(parents=True)
    layers, answers = golden / "sums_layers.safetensors", golden / "library_sums"
    layers.write_text("those of another machine ")
    answers.write_text("old")
    lines = list(write_vectors(course))
    assert lines[0] == f"sums_layers: kept; to make them anew, delete {layers}"
    assert layers.read_text() == "those of another machine "
    assert answers.read_text().startswith("those of another machine /")
    layers.unlink()
    assert next(write_vectors(course)) == "sums_layers: weights, inputs, Hessians"


def test_environments_lie_in_the_cache_where_a_course_whose_path_has_a_space_can_compile(course):
    (library,) = libraries(course)
    assert " " in str(course)
    assert environment(library) == course.parent / "cache" / "oracles" / "library"


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
