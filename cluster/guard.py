"""Run one command; everything it started ends with our parent, or on SIGTERM.

Used as a program: ``python guard.py PARENT_PID GRACE_S LEFTOVERS COMMAND ...``. A service often
starts further processes that leave its process group and lose their parent. This process adopts
those orphans, so at the end its descendants are exactly what remains of the service.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil  # type: ignore[import-untyped]

POLL_S = 0.2
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@contextlib.contextmanager
def guarded(
    command: Sequence[str | Path],
    *,
    environment: Mapping[str, str],
    log: Path,
    folder: Path,
    grace_s: float,
    keep_open: Sequence[int] = (),
    leftovers: Sequence[Path] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """``command`` running in ``folder`` with ``environment`` alone, its output appended to ``log``.

    At the end of the block it gets SIGTERM, and after ``grace_s`` SIGKILL with everything it
    started. The same happens when this process is killed; then the guard also removes
    ``leftovers``. File descriptors in ``keep_open`` stay open until all of that is done.
    """
    program = [sys.executable, "-I", __file__, str(os.getpid()), str(grace_s)]
    program += [os.pathsep.join(map(str, leftovers)), *map(str, command)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            program,
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=keep_open,
            start_new_session=True,  # Ctrl-C in a terminal is handled here, not by the service
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def main(parent: int, grace_s: float, leftovers: Sequence[str], command: Sequence[str]) -> int:
    """The command's exit code, or 143 where this process ended it."""
    ending = False

    def end(*_: object) -> None:
        nonlocal ending
        ending = True

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    child = subprocess.Popen(command)
    while not ending and os.getppid() == parent:
        if (code := _reap(child.pid)) is not None:
            _kill_descendants()
            return code
        time.sleep(POLL_S)

    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and _reap(child.pid) is None:
        time.sleep(POLL_S / 4)
    _kill_descendants()
    if os.getppid() != parent:
        for path in leftovers:
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                Path(path).unlink(missing_ok=True)
    return 128 + signal.SIGTERM


def _reap(child: int) -> int | None:
    """Collect processes that have ended; returns the exit code of ``child`` once it has."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == child:
                return os.waitstatus_to_exitcode(ended[1])
    return None


def _kill_descendants() -> None:
    """Repeated until none is left, because one may start another in the meantime."""
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)
        _reap(-1)


if __name__ == "__main__":
    remaining = sys.argv[3].split(os.pathsep) if sys.argv[3] else []
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), remaining, sys.argv[4:]))
