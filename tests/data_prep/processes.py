"""Processes that a test started: an end that leaves no time to clean up, and fewer rights."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

PR_SET_SECUREBITS, SECBIT_NOROOT = 28, 1  # linux/prctl.h, linux/securebits.h


def below(ancestor: int, title: str = "") -> list[int]:
    """Descendants of a process whose command line starts with ``title``."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = (folder / "stat").read_text()
            parents[int(folder.name)] = int(status.rpartition(")")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
    found = []
    for pid in parents:
        above = pid
        while above in parents and above != ancestor:
            above = parents[above]
        if above == ancestor and pid != ancestor and titles.get(pid, "").startswith(title):
            found.append(pid)
    return found


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """``kill -9`` for a driver, the Ray it started and every worker, and wait for its end."""
    for pid in [process.pid, *below(process.pid)]:
        kill(pid)
    process.wait()


@contextlib.contextmanager
def bound_by_permissions() -> Iterator[bool]:
    """Programs that this thread starts in here may read what file modes allow, though we be root.

    False where root cannot be held to that.
    """
    if os.geteuid() != 0:
        yield True
        return
    # Programs then start without the capabilities that root has; ours stay as they are.
    prctl = ctypes.CDLL(None).prctl
    bound = prctl(PR_SET_SECUREBITS, SECBIT_NOROOT, 0, 0, 0) == 0
    try:
        yield bound
    finally:
        if bound:
            prctl(PR_SET_SECUREBITS, 0, 0, 0, 0)
