"""Downloads: complete or absent, built once, never another file than the one that was pinned."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import course_utils.cache as cache_module
from course_utils.cache import DownloadError, cache_dir, cached, fetch_npm, fetch_wheel, sha256

CONTENT = b"what the registry serves"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty cache, in a folder whose name holds a space."""
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "a cache"))
    return tmp_path / "a cache"


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Stands for pip and npm: `served` is what they download, `calls` how they were called."""

    class Registry:
        served: bytes | None = CONTENT
        calls: list[list[str]] = []  # noqa: RUF012 (a new class for each test)

    def run(command, **_):
        Registry.calls.append(command)
        if Registry.served is None:
            return subprocess.CompletedProcess(command, 1, "", "warning\nERROR: no network\n")
        Path(command[-1], "served.whl").write_bytes(Registry.served)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(cache_module.subprocess, "run", run)
    monkeypatch.setattr(cache_module.shutil, "which", lambda program: f"/bin/{program}")
    return Registry


@pytest.fixture
def digest(tmp_path) -> str:
    (tmp_path / "content").write_bytes(CONTENT)
    return sha256(tmp_path / "content")


def loadable(folder: Path) -> list[str]:
    """What a later run could find: everything but locks and empty folders."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    )


def test_folder_is_chosen_by_the_environment(folder, monkeypatch, tmp_path):
    assert cache_dir() == folder
    monkeypatch.delenv("COURSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "course_utils"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "course_utils"


def test_built_once_and_found_again(folder):
    built = []

    def build(target: Path) -> None:
        built.append(target)
        target.mkdir()
        (target / "weights").write_bytes(b"1")

    first, second = cached("models/m", build), cached("models/m", build)
    assert first == second == folder / "models" / "m"
    assert len(built) == 1
    assert loadable(folder) == ["models/m/SHA256SUMS", "models/m/weights"]


def whole(target: Path) -> None:
    target.mkdir()
    (target / "weights").write_bytes(b"whole")


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_failing_build_leaves_nothing(folder, interruption):
    def build(target: Path) -> None:
        target.mkdir()
        (target / "weights").write_bytes(b"half")
        raise interruption

    with pytest.raises(interruption):
        cached("m", build)
    assert loadable(folder) == []
    assert (cached("m", whole) / "weights").read_bytes() == b"whole"


def test_damaged_folder_is_made_again(folder, capsys):
    file = cached("m", whole) / "weights"
    for damage in (lambda: file.write_bytes(b"whol"), file.unlink, (folder / "m" / "new").touch):
        damage()
        assert (cached("m", whole) / "weights").read_bytes() == b"whole"
        assert "is damaged" in capsys.readouterr().out
        assert loadable(folder) == ["m/SHA256SUMS", "m/weights"]


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DownloadError, match="set COURSE_CACHE to a folder that can be written"):
        cached("m", whole)


BUILD = """
import sys, time
from pathlib import Path
from course_utils.cache import cached

def build(target):
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")
    target.mkdir()
    (target / "weights").write_bytes(b"half")
    Path(sys.argv[2]).touch()
    time.sleep(float(sys.argv[3]))
    (target / "weights").write_bytes(b"whole")

print((cached("m", build) / "weights").read_bytes().decode())
"""


def start_build(tmp_path: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILD, tmp_path / "log", tmp_path / "begun", str(seconds)]
    root = Path(cache_module.__file__).parents[1]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=root)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, "the building process ended before it began to build"
        time.sleep(0.02)


def test_two_processes_build_once(tmp_path):
    processes = [start_build(tmp_path, 0.5) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in processes] == ["whole\n"] * 2
    assert (tmp_path / "log").read_text() == "built\n"


def test_killed_build_leaves_nothing_that_loads(folder, tmp_path):
    process = start_build(tmp_path, 600)
    wait_for(tmp_path / "begun", process)
    process.kill()
    process.communicate()
    assert not (folder / "m").exists()
    assert (cached("m", whole) / "weights").read_bytes() == b"whole"
    assert loadable(folder) == ["m/SHA256SUMS", "m/weights"]


def test_threads_wait_for_each_other():
    """In one process as well: file locks are per object, not per thread."""
    built, found = [], []

    def build(target: Path) -> None:
        built.append(target)
        whole(target)

    threads = [threading.Thread(target=lambda: found.append(cached("m", build))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and len(found) == 4


def test_wheel_is_fetched_without_dependencies_and_checked(registry, digest, folder):
    path = fetch_wheel("some-package", "1.0", digest, platform="manylinux_2_28_x86_64")
    assert path.read_bytes() == CONTENT
    (command,) = registry.calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "some-package==1.0", "--platform"} < set(command)
    assert fetch_wheel("some-package", "1.0", digest) == path
    assert len(registry.calls) == 1
    assert loadable(folder) == ["downloads/some-package-1.0.whl"]


def test_npm_package_is_fetched_and_checked(registry, digest, folder):
    path = fetch_npm("@scope/texts", "2.0", digest)
    assert path.read_bytes() == CONTENT
    assert "@scope/texts@2.0" in registry.calls[0]
    assert registry.calls[0][:2] == ["/bin/npm", "pack"]
    assert loadable(folder) == ["downloads/@scope-texts-2.0.tgz"]


@pytest.mark.parametrize("fetch", [fetch_wheel, fetch_npm])
def test_wrong_hash_names_both_and_leaves_nothing(registry, digest, folder, fetch):
    registry.served = b"another file"
    with pytest.raises(DownloadError) as caught:
        fetch("package", "1.0", digest)
    (folder / "other").write_bytes(registry.served)
    assert digest in str(caught.value) and sha256(folder / "other") in str(caught.value)
    assert loadable(folder) == ["other"]


def test_file_damaged_in_the_cache_is_fetched_again(registry, digest, capsys):
    path = fetch_wheel("package", "1.0", digest)
    path.write_bytes(CONTENT[:-1])
    assert fetch_wheel("package", "1.0", digest).read_bytes() == CONTENT
    assert "package-1.0.whl is damaged" in capsys.readouterr().out
    assert len(registry.calls) == 2


@pytest.mark.parametrize("fetch", [fetch_wheel, fetch_npm])
def test_failing_download_says_why_and_what_to_do(registry, digest, folder, fetch):
    registry.served = None
    with pytest.raises(DownloadError, match=r"ERROR: no network.*put the file at .*package-1\.0"):
        fetch("package", "1.0", digest)
    assert loadable(folder) == []


def test_missing_npm(registry, digest, monkeypatch):
    monkeypatch.setattr(cache_module.shutil, "which", lambda program: None)
    with pytest.raises(DownloadError, match="npm, which is not installed here: install npm"):
        fetch_npm("package", "1.0", digest)
    assert not registry.calls


def test_missing_pip(registry, digest, monkeypatch):
    monkeypatch.setattr(cache_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match="pip, which is not installed here: install pip"):
        fetch_wheel("package", "1.0", digest)
    assert not registry.calls


def test_a_cached_file_needs_neither(registry, digest, monkeypatch):
    path = fetch_npm("package", "1.0", digest)
    monkeypatch.setattr(cache_module.shutil, "which", lambda program: None)
    assert fetch_npm("package", "1.0", digest) == path
