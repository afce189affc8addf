"""Requests to stop with everything saved, and what is true where there was no time for that."""

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Protocol

from cluster.submit import NOT_SAVED
from pipeline.progress import leave_terminal

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 1.0
RESERVE_S = 20.0  # of the grace, for the end of all processes
GRACE_S = 120.0  # as ray_job.yaml and ray_cluster.yaml give
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopRequest(Protocol):
    """What somebody asked of the run, as one rank knows it; reading it never waits."""

    @property
    def requested(self) -> bool:
        """Save and end."""

    @property
    def leaving(self) -> bool:
        """Save and continue: the node of this rank is about to go."""

    def note_safe(self, step: int) -> None:
        """Remember that the checkpoint of ``step`` is whole on storage."""


class SignalStop:
    """Requested by the first SIGINT or SIGTERM, or after ``max_hours``.

    A second signal calls ``at_once``, which by default interrupts as usual. ``give_up`` is called
    in another thread where the block of ``listening`` still runs ``time_to_save_s`` after the
    first signal.
    """

    leaving = False

    def __init__(
        self,
        *,
        max_hours: float | None = None,
        at_once: Callable[[], None] | None = None,
        give_up: Callable[[], None] | None = None,
    ) -> None:
        self.safe_step: int | None = None
        self._signaled_at: float | None = None
        self._until = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._at_once, self._give_up = at_once, give_up
        self._done = threading.Event()

    @property
    def requested(self) -> bool:
        return self._signaled_at is not None or (
            self._until is not None and time.monotonic() >= self._until
        )

    @property
    def too_late(self) -> bool:
        """Whether the time for saving is over."""
        return (
            self._signaled_at is not None
            and time.monotonic() - self._signaled_at >= time_to_save_s()
        )

    def note_safe(self, step: int) -> None:
        self.safe_step = step

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self._signaled_at is not None:
            if self._at_once is None:
                raise KeyboardInterrupt
            self._at_once()
            return
        self._signaled_at = time.monotonic()
        log.warning("stop requested: saving a checkpoint first (a second signal stops at once)")
        if self._give_up is not None:
            threading.Thread(target=self._watch, name="stop-grace", daemon=True).start()

    @contextlib.contextmanager
    def listening(self) -> Iterator["SignalStop"]:
        """Handle SIGINT and SIGTERM inside the block; only in the main thread."""
        before = {name: signal.signal(name, self) for name in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            self._done.set()
            for name, handler in before.items():
                signal.signal(name, handler)

    def _watch(self) -> None:
        assert self._give_up is not None
        if not self._done.wait(time_to_save_s()):
            self._give_up()


def stop_with_launcher() -> None:
    """From now on, SIGTERM comes when the process ends that started this one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM acts as Ctrl-C in the block: `ray job stop` ends a stage that saves as it runs."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def interrupts_answered() -> Iterator[None]:
    """In the block, the first Ctrl-C answers in a line at once and then interrupts.

    What runs in threads is waited for, which can take as long as storage does; the second Ctrl-C
    ends the process without that. Nothing changes where something else handles Ctrl-C.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield
        return

    # Raw writes: Python's files may be in use by what a signal interrupts.
    def at_once(signum: int, frame: FrameType | None) -> None:
        leave_terminal()
        os.write(2, b"stopped at once: run the same command to resume\n")
        os._exit(1)

    def first(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, at_once)
        os.write(2, b"\nstopping (Ctrl-C again: at once)\n")
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        # After a Ctrl-C the interpreter may still wait for threads: the second one ends that too.
        if signal.getsignal(signal.SIGINT) is first:
            signal.signal(signal.SIGINT, before)


class PolledStop:
    """Whether ``poll`` has said so: how a driver reaches its ranks.

    A thread calls it every ``POLL_INTERVAL_S``, so training never waits for the answer, and passes
    safe steps to ``report_safe`` and steps that are done to ``report_step``. ``is_leaving`` has to
    answer at once.
    """

    def __init__(
        self,
        poll: Callable[[], bool],
        is_leaving: Callable[[], bool],
        report_safe: Callable[[int], None],
        report_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.requested = False
        self._poll, self._is_leaving = poll, is_leaving
        self._reports = {"safe": report_safe, "step": report_step}
        self._noted: dict[str, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop-request", daemon=True)
        self._thread.start()

    @property
    def leaving(self) -> bool:
        return self._is_leaving()

    def note_safe(self, step: int) -> None:
        self._noted["safe"] = step

    def note_step(self, step: int) -> None:
        """Remember that ``step`` is done, for the driver to show."""
        self._noted["step"] = step

    def close(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        reported: dict[str, int] = {}
        while not self._done.wait(POLL_INTERVAL_S):
            try:
                self.requested = self.requested or self._poll()
                for name, step in self._noted.copy().items():
                    if reported.get(name) != step:
                        self._reports[name](step)
                        reported[name] = step
            except Exception as error:  # training continues while the driver is out of reach
                log.warning("stop request could not be read: %s", error)


def time_to_save_s() -> float:
    """Seconds between a signal and the moment at which a save has to be given up.

    ``RESERVE_S`` less than what the launcher gives, or half of that where it gives little.
    """
    grace_s = GRACE_S
    if "TORCHELASTIC_RUN_ID" in os.environ:
        grace_s = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
    elif "RAY_JOB_STOP_WAIT_TIME_S" in os.environ:
        grace_s = float(os.environ["RAY_JOB_STOP_WAIT_TIME_S"])
    return max(grace_s - RESERVE_S, grace_s / 2)


def not_saved(safe_step: int | None) -> str:
    """What is true of a run that ended before its last steps were saved."""
    safe = "no step is safe" if safe_step is None else f"step {safe_step} is safe"
    return f"{NOT_SAVED}; {safe}: run the same command to resume"
