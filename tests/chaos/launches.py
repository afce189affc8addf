"""Launches of the product that can be killed: forked ranks, torchrun, Ray."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil  # type: ignore[import-untyped]

from cluster.ports import free_ports
from pipeline import cli
from tests.chaos.recorded import record

PR_SET_PDEATHSIG = 1  # linux/prctl.h
GRACE_S = 170  # after SIGTERM, on a machine that may be busy
RAY_RANK = re.compile(r"pid=(\d+)\) world_rank=(\d+)")  # in the log, at every start of ranks
MARK = "DEEPFILL_CHAOS"
"""A variable of the environment by which the processes of a launch are found."""


@dataclass(frozen=True)
class Kind:
    """Who starts how many ranks."""

    launcher: Literal["forked", "torchrun", "ray"]
    """``forked``: from this process, with the environment that torchrun gives; imports are done."""
    ranks: int
    engine: Literal["ddp", "deepspeed"] = "ddp"

    def __str__(self) -> str:
        return f"{self.launcher} {self.ranks}x{self.engine}"


class Launch:
    """Processes that run one command, and their common log."""

    def __init__(self, kind: Kind, command: Sequence[str], folder: Path) -> None:
        self.kind, self.steps, self.log = kind, folder / "steps", folder / "log"
        folder.mkdir(parents=True)
        self.started = time.time()
        self._mark = str(folder)
        self._codes: dict[int, int] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._forked: list[int] = []
        words = [*command, "train.device=cpu", f"train.engine={kind.engine}"]
        if kind.launcher == "forked":
            port = free_ports(["master"], host="127.0.0.1")["master"]
            for rank in range(kind.ranks):
                place = _place(rank, kind.ranks, port) if kind.ranks > 1 else {}
                self._forked.append(self._fork([*words, "train.launcher=local"], place))
        elif kind.launcher == "torchrun":
            launcher = ["-m", "torch.distributed.run", "--standalone"]
            launcher += ["--nproc-per-node", str(kind.ranks)]
            program = ["-m", "tests.chaos.recorded", str(self.steps)]
            self._process = self._start(launcher + program + words)
        else:
            more = ["train.launcher=ray", f"train.workers={kind.ranks}"]
            self._process = self._start(["-m", "pipeline", *words, *more])

    def _fork(self, words: Sequence[str], environment: Mapping[str, str]) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        if pid := os.fork():
            return pid
        code: int | str | None = 1
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ |= environment
            record(self.steps)
            code = cli.main(words)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)

    def _start(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        variables = {MARK: self._mark, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        variables |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE_S)}
        with self.log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, *arguments],
                env=os.environ | variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def ranks(self) -> dict[int, int]:
        """The living processes of ranks, by an order that stays: pid of each."""
        if self.kind.launcher == "forked":
            return {r: pid for r, pid in enumerate(self._forked) if pid not in self._ended()}
        found = {p.pid for p in self.processes() if _is_rank(p)}
        # Ray Train says which of its processes are ranks: others stand by.
        named = {int(rank): int(pid) for pid, rank in RAY_RANK.findall(self.text())}
        ranks = {rank: pid for rank, pid in named.items() if pid in found}
        return ranks or dict(enumerate(sorted(found)))

    @property
    def driver(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def head(self) -> int | None:
        """Ray's head, where there is one."""
        return next((p.pid for p in self.processes() if _name(p) == "gcs_server"), None)

    def processes(self) -> list[psutil.Process]:
        """All living processes of a launch that was not forked, also those without a parent."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark and not _is_zombie(process):
                    found.append(process)
        return found

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def codes(self) -> list[int] | None:
        """The exit codes once all have ended."""
        if self._process is not None:
            code = self._process.poll()
            return None if code is None else [code]
        ended = self._ended()
        return list(ended.values()) if len(ended) == len(self._forked) else None

    def first_code(self) -> int | None:
        """The exit code of whoever ended first."""
        return next(iter(self._ended().values()), None) if self._forked else None

    def wait(self, seconds: float) -> list[int] | None:
        """The exit codes; None where some run after ``seconds``."""
        deadline = time.monotonic() + seconds
        while (codes := self.codes()) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        # What a launcher leaves behind has the same time.
        while self._process is not None and self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        return codes

    def end(self) -> list[int]:
        """Kill what is left, and return its process numbers."""
        left = [pid for pid in self._forked if pid not in self._ended()]
        if self._process is not None:
            left += [process.pid for process in self.processes()]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait(30)
        return left

    def _ended(self) -> dict[int, int]:
        for pid in self._forked:
            if pid not in self._codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self._codes[pid] = os.waitstatus_to_exitcode(status)
        return self._codes


def _place(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "chaos",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE_S),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        words = " ".join(process.cmdline())
        return "RayTrainWorker" in words or (
            "tests.chaos.recorded" in words and "RANK" in process.environ()
        )
    return False


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return str(process.name())
    return ""


def _is_zombie(process: psutil.Process) -> bool:
    return bool(process.status() == psutil.STATUS_ZOMBIE)


@contextlib.contextmanager
def launched(kind: Kind, command: Sequence[str], folder: Path) -> Iterator[Launch]:
    launch = Launch(kind, command, folder)
    try:
        yield launch
    finally:
        launch.end()
