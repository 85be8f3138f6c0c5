"""The most memory that this process held, counted from where one says.

Of Python's own library alone, and in a folder of its own: the scripts of libraries import it in their
environments, which know nothing of the course. `course bench` puts the folder on their path.
"""

import sys
from pathlib import Path


def forget_peak() -> None:
    """Let `peak_bytes` count from here on, without what loading took. On Linux; elsewhere nothing can."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: see proc(5)


def peak_bytes() -> int:
    """The most memory that this process held at any time, or since `forget_peak`.

    On Linux not getrusage's, which begins with what the process that started this one held.
    """
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text("utf-8")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    if sys.platform == "win32":
        import psutil  # the one place where Python's own library does not count

        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
