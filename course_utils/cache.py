"""Downloads that are pinned, hash checked and cached atomically.

Packages are fetched through the reader's own `pip` and `npm`, so whatever index or proxy they are
configured with is used; nothing here names a host. A cached artefact appears under its final name
only when it is complete: it is built in a temporary sibling and renamed. Whenever it is asked for it
is compared with its hash, and made again if it was damaged since.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

SUMS = "SHA256SUMS"  # in a cached folder: what `sha256sum --check` reads


class DownloadError(RuntimeError):
    """A pinned artefact could not be fetched or kept, or is not the one that was pinned."""


def cache_dir() -> Path:
    """Folder of cached downloads: `$COURSE_CACHE`, else `~/.cache/course_utils` (XDG honoured)."""
    try:
        if os.environ.get("COURSE_CACHE"):
            return Path(os.environ["COURSE_CACHE"]).expanduser()
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise DownloadError(
            f"there is no place for the cache: {error} Set COURSE_CACHE to a folder that can be written."
        ) from error
    return Path(base) / "course_utils"


def sha256(path: Path) -> str:
    """Hex SHA-256 digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached(name: str, build: Callable[[Path], None], *, sha: str | None = None) -> Path:
    """The cached file or folder `name`; `build(target)` makes it if it is not there.

    A file is known by its SHA-256 `sha`; a folder (`sha` None) gets a list of its files' hashes when
    it is built. One that does not agree is damaged, and is made again after one line that says so.
    Two processes asking at once build it once: the second waits for the first. Raises
    `DownloadError` if the cache cannot be written, and whatever `build` raises.
    """
    final = cache_dir() / name
    try:
        if not _damaged(final, sha):
            return final
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{final}.lock"):
            damaged = _damaged(final, sha)
            if not damaged:  # built by another process while this one waited
                return final
            if final.exists():
                print(f"{final} is damaged ({', '.join(damaged)}): making it again.")
            _replace(final, build, sha)
    except (OSError, SafetensorError) as error:
        raise DownloadError(
            f"{final.name} cannot be kept in {final.parent}: {error}. Make room there, or set "
            "COURSE_CACHE to a folder that can be written."
        ) from error
    return final


def _replace(final: Path, build: Callable[[Path], None], sha: str | None) -> None:
    scratch = final.with_name(f".{final.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)  # what a process that was killed left behind
    scratch.mkdir()
    try:
        target = scratch / final.name
        build(target)
        if sha is None:
            (target / SUMS).write_text(_sums(target), encoding="utf-8", newline="\n")
        if final.exists():
            os.replace(final, scratch / f"{final.name}.damaged")
        os.replace(target, final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _damaged(path: Path, sha: str | None) -> list[str]:
    """Names of the files that are missing, altered or unknown; none if the artefact is whole."""
    try:
        if sha is not None:
            return [] if sha256(path) == sha else [path.name]
        written = (path / SUMS).read_text(encoding="utf-8", errors="replace")
        differing = set(written.splitlines()) ^ set(_sums(path).splitlines())
    except (FileNotFoundError, NotADirectoryError) as error:
        return [Path(error.filename).name]
    return sorted({line.partition("  ")[2] for line in differing})


def _sums(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    return "".join(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)


def fetch_wheel(name: str, version: str, sha: str, *, platform: str | None = None) -> Path:
    """The wheel `name==version` from PyPI, downloaded without its dependencies.

    A wheel with compiled code is pinned by its `platform` tag (CPython 3.11 builds are taken), so
    that every machine reads the same file. Raises `DownloadError` if pip is missing or cannot fetch
    it, if it is not the file with the SHA-256 `sha`, or if it cannot be kept.
    """
    command = ["-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    # One retry comes at once. Before more of them pip waits, which is no use without a network.
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--retries=1"]
    if platform is not None:
        command += ["--platform", platform, "--python-version", "3.11", "--implementation", "cp"]
    command += [f"{name}=={version}", "-d"]
    pip = sys.executable if importlib.util.find_spec("pip") else None
    return _fetch(f"{name}-{version}.whl", pip, command, sha, "pip")


def fetch_npm(name: str, version: str, sha: str) -> Path:
    """The tarball of the npm package `name@version`, by `npm pack`. Errors as `fetch_wheel`."""
    command = ["pack", "--fetch-retries=0", f"{name}@{version}", "--pack-destination"]
    npm = shutil.which("npm")  # its full path: on Windows it is npm.cmd, which needs its suffix
    return _fetch(f"{name.replace('/', '-')}-{version}.tgz", npm, command, sha, "npm")


def _fetch(filename: str, program: str | None, command: list[str], sha: str, tool: str) -> Path:
    def build(target: Path) -> None:
        folder = target.parent / "download"
        folder.mkdir()
        if program is None:
            raise DownloadError(
                f"{filename} is fetched with {tool}, which is not installed here: install {tool}, "
                f"or put the file at {final} by hand."
            )
        run = subprocess.run([program, *command, str(folder)], capture_output=True, text=True)
        files = list(folder.iterdir())
        if run.returncode != 0 or len(files) != 1:
            reason = (run.stderr or run.stdout).strip().splitlines() or ["no output"]
            raise DownloadError(
                f"{tool} could not download {filename}: {reason[-1].rstrip('.')}. "
                f"Check the network and the room on the disk, or put the file at {final} by hand."
            )
        found = sha256(files[0])
        if found != sha:
            raise DownloadError(
                f"{filename} has SHA-256 {found}, expected {sha}: "
                "the registry serves another file than the one this course was tested with."
            )
        files[0].rename(target)

    final = cache_dir() / "downloads" / filename
    return cached(f"downloads/{filename}", build, sha=sha)
