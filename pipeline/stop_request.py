"""Stop on request with everything saved: Ctrl-C, SIGTERM, or a key in the run's folder."""

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
    @property
    def made(self) -> bool: ...


class NoStop:
    made = False


class SignalStop:
    """Set by the first SIGINT or SIGTERM to this process; a second one interrupts as usual."""

    def __init__(self) -> None:
        self.made = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.made:
            raise KeyboardInterrupt
        self.made = True
        log.warning("stopping on request: saving first (a second signal stops at once)")

    @contextlib.contextmanager
    def listening(self) -> Iterator["SignalStop"]:
        """Take over SIGINT and SIGTERM for a block; only in the main thread."""
        before = {name: signal.signal(name, self) for name in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM as Ctrl-C for a block: how `ray job stop` ends a stage that saves as it goes."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StoredStop:
    """Whether the run's folder holds the key ``stop``: how a driver reaches its workers.

    Asked of the storage every two seconds in a thread of its own, so training never waits for it.
    """

    def __init__(self, run: Store) -> None:
        self.made = False
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
                self.made = self.made or self._run.exists(STOP_KEY)
            except OSError as error:  # storage being away for a while is no reason to stop
                log.warning("stop request could not be looked up: %s", error)


def request_stop(run: Store) -> None:
    run.put(STOP_KEY, time.strftime("%Y-%m-%dT%H:%M:%SZ\n", time.gmtime()).encode())
