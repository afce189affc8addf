"""Requests to stop with everything saved: Ctrl-C, SIGTERM, or a key in the run's folder."""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Protocol

from cluster.storage import Store

log = logging.getLogger(__name__)

STOP_KEY = "stop"
POLL_INTERVAL_S = 2.0


class StopRequest(Protocol):
    """Whether the run was asked to stop."""

    @property
    def requested(self) -> bool: ...


class NoStop:
    """Never requested: for ranks that hear of a stop through rank 0."""

    requested = False


class SignalStop:
    """Requested by the first SIGINT or SIGTERM; a second one interrupts as usual."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        log.warning("stop requested: saving a checkpoint first (a second signal stops at once)")

    @contextlib.contextmanager
    def listening(self) -> Iterator["SignalStop"]:
        """Handle SIGINT and SIGTERM inside the block; only in the main thread."""
        before = {name: signal.signal(name, self) for name in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)


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


class StoredStop:
    """Whether the run's folder holds the key ``stop``: how a driver reaches its ranks.

    A thread polls the storage every ``POLL_INTERVAL_S``, so training never waits for it.
    """

    def __init__(self, run: Store) -> None:
        self.requested = False
        self._run = run
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop-request", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(POLL_INTERVAL_S):
            try:
                self.requested = self.requested or self._run.exists(STOP_KEY)
            except OSError as error:  # training continues while storage is away
                log.warning("stop request could not be read: %s", error)


def request_stop(run: Store) -> None:
    """Write the key ``stop`` into the run's folder; :class:`StoredStop` reads it."""
    run.put(STOP_KEY, time.strftime("%Y-%m-%dT%H:%M:%SZ\n", time.gmtime()).encode())
