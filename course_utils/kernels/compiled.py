"""The compiled CPU backend: `cpu.cpp`, built at first use by the system's C++ compiler, and cached.

Nothing is compiled at import. The library is kept in the course's cache under a name that holds the
source, the flags, and all that the compiler says of itself and of the processor, so that another compiler
or machine gets its own. Where the cache cannot be written it is built for this process alone. Without a
compiler torch computes the same, more slowly; one warning says so. `COURSE_KERNELS` chooses: "auto"
(default), "torch", "compiled", which raises `NoCompiler` where there is none, or "triton" (`grouped.py`).
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from course_utils.cache import DownloadError, cached

CHOOSE = "COURSE_KERNELS"
BACKENDS = ("auto", "torch", "compiled", "triton")
SOURCE = Path(__file__).with_name("cpu.cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-Wno-psabi",
    # Without these, rounding and square roots may set flags that nobody reads, and are not vectorized.
    "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
# The first that the compiler takes: this very processor and threads; threads; neither.
CHOICES = (("-march=native", "-fopenmp"), ("-fopenmp",), ())
P, L, I = c_void_p, c_int64, c_int  # noqa: E741
# codes, scale, zero, codebook, rows, columns, groups, bits, tile, high_first
WEIGHT = (P, P, P, P, L, L, L, I, I, I)
SIGNATURES = {
    "float_product": (*WEIGHT, P, P, L, I),
    "int8_product": (*WEIGHT, P, I, P, L, I),
    "decode": (*WEIGHT, P, L, L, I),
    "int8_matmul": (P, P, P, L, L, L, I),
    "base3_product": (P, P, P, L, L, L, I),
    "hadamard": (P, L, L, I),
}
RETURN_NOTHING = ("int8_matmul", "base3_product", "hadamard")


class NoCompiler(RuntimeError):
    """There is no C++ compiler that builds `cpu.cpp`; says what was tried."""


def asked() -> str:
    """The value of `COURSE_KERNELS`. Raises `ValueError` for one that is none of `BACKENDS`."""
    name = os.environ.get(CHOOSE, "auto")
    if name not in BACKENDS:
        raise ValueError(f"{CHOOSE}={name!r}: choose one of {', '.join(BACKENDS)}")
    return name


def is_compiled(device: torch.device) -> bool:
    """Whether `library()` computes on `device`, as `COURSE_KERNELS` asks."""
    if device.type != "cpu" or (name := asked()) not in ("auto", "compiled"):
        return False
    if name == "compiled":
        library()
    return _is_there()


@cache
def _is_there() -> bool:
    try:
        library()
    except NoCompiler as error:
        warnings.warn(
            f"Packed weights are multiplied by torch, more slowly: {error}.", stacklevel=2
        )
        return False
    return True


@cache
def library() -> ctypes.CDLL:
    """The functions of `cpu.cpp`. Raises `NoCompiler`."""
    compiler, choice, told = _compiler()
    digest = hashlib.sha256(b"\0".join((SOURCE.read_bytes(), " ".join(FLAGS).encode(), told)))

    def build(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        command = [compiler, *FLAGS, *choice, str(SOURCE), "-o", str(folder / "kernels.so")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise NoCompiler(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")

    try:
        folder = cached(f"kernels/{digest.hexdigest()[:32]}", build)
    except DownloadError:  # the cache cannot be written
        folder = Path(tempfile.mkdtemp(prefix="course-kernels-"))
        try:
            build(folder)
            return _loaded(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return _loaded(folder)


def _loaded(folder: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(folder / "kernels.so"))
    for name, arguments in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes = arguments
        function.restype = None if name in RETURN_NOTHING else c_int
    return loaded


def _compiler() -> tuple[str, tuple[str, ...], bytes]:
    """The compiler, the first of `CHOICES` that it takes, and its macros: they tell version and processor."""
    asked = os.environ.get("CXX")
    tried = [asked] if asked else COMPILERS
    for name in filter(None, map(shutil.which, tried)):
        for choice in CHOICES:
            command = [name, *choice, "-dM", "-E", "-x", "c++", os.devnull]
            done = subprocess.run(command, capture_output=True)
            if not done.returncode:
                return name, choice, done.stdout + " ".join(choice).encode()
    raise NoCompiler(
        f"no C++ compiler ({', '.join(tried)}) works here: install g++ or clang, or set CXX to one"
    )
