"""Processes that a test started, and an end for them that leaves no time to clean up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path


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
