"""A Python without a network, for tests.

The network is refused by a `sitecustomize.py`, which every Python started with its folder on
`PYTHONPATH` runs first: pip, kernels and whatever they start, too. It lets loopback through (a kernel
talks to Jupyter over it), refuses all other connections and all names, and notes each attempt and
each wait in a file: so a test sees what was tried, and measures no time. Programs that are no Python,
and compiled code with sockets of its own, are beyond it; this course starts npm alone.
"""

import os
import subprocess
import sys
from pathlib import Path

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


def own_setting(variable: str) -> bool:
    """Whether an environment variable is a reader's own setting of pip, the hub or the course."""
    return variable.startswith(("PIP_", "HF_", "COURSE_"))


class Offline:
    """Runs this Python without a network, with empty caches, and with pip as it is installed."""

    def __init__(self, folder: Path):
        (folder / "guard").mkdir()
        (folder / "guard" / "sitecustomize.py").write_text(GUARD, encoding="utf-8")
        self.log = folder / "network.log"
        python_path = [str(folder / "guard"), os.environ.get("PYTHONPATH", "")]
        self.variables = {
            "PYTHONPATH": os.pathsep.join(filter(None, python_path)),
            "NETWORK_LOG": str(self.log),
            "COURSE_CACHE": str(folder / "cache"),
            "HF_HOME": str(folder / "huggingface"),
            "PIP_CONFIG_FILE": os.devnull,
        }
        self.environment = {k: v for k, v in os.environ.items() if not own_setting(k)}
        self.environment |= self.variables

    def python(self, *arguments: str, cwd: Path = ROOT) -> str:
        """What it prints; it must succeed and warn of nothing."""
        command = [sys.executable, "-P", *arguments]  # -P: the current folder is not imported from
        run = subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    def attempts(self) -> list[str]:
        """What was tried, a line each, as `resolve NAME`; and waits of half a second and more."""
        return self.log.read_text().splitlines() if self.log.exists() else []

    def connections(self) -> list[str]:
        """What was tried, without the waits."""
        return [line for line in self.attempts() if not line.startswith("sleep")]
