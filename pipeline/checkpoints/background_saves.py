"""Saves behind training: one at a time, repeated while storage is away, until a deadline."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from cluster.storage import StorageError, StorageRefusedError
from pipeline.checkpoints.manifest import CheckpointError

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
LONGEST_WAIT_S = 30.0  # that training waits for the save before, by default


_all: weakref.WeakSet[BackgroundSaves] = weakref.WeakSet()


def finish_saves() -> None:
    """Wait until no save of this process is at its first attempt: storage answers, or is away."""
    for saves in list(_all):
        saves.settle()


@dataclass(frozen=True)
class _Save:
    step: int
    attempt: Callable[[], None]


class BackgroundSaves:
    """A thread that runs saves in order.

    An attempt that ends in StorageError is repeated, after a pause that doubles. The next save
    supersedes one that is being repeated. ``deadline_s`` after the first of such failures without
    a success between them, and at once where storage refuses, the saves have failed. Training
    waits at most ``longest_wait_s`` for a save.
    """

    def __init__(self, url: str, deadline_s: float, longest_wait_s: float = LONGEST_WAIT_S) -> None:
        self._url, self._deadline_s, self._longest_wait_s = url, deadline_s, longest_wait_s
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._running: _Save | None = None
        self._next: _Save | None = None
        self._failing_since: float | None = None
        self.safe_step: int | None = None
        """The newest step that is known to be whole on storage."""
        self._failure: BaseException | None = None
        self._closed = False
        _all.add(self)

    def submit(self, step: int, attempt: Callable[[], None]) -> None:
        """Run ``attempt`` in the background. Raises the failure of an earlier save.

        Waits for the save before, unless that is being repeated or takes ``longest_wait_s``:
        at most two saves are in memory.
        """
        self.settle()
        with self._changed:
            self.raise_failure()
            if self._next is not None:
                log.warning("checkpoint superseded step=%d by=%d", self._next.step, step)
            self._next = _Save(step, attempt)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until no save is at its first attempt, for at most ``longest_wait_s``."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._idle or self._failing_since is not None or self._failure is not None,
                self._longest_wait_s,
            )

    def raise_failure(self) -> None:
        """Raise the failure of a save, once; returns at once otherwise."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Wait until everything is committed. Raises the failure of a save."""
        with self._changed:
            self._changed.wait_for(lambda: self._idle)
            self.raise_failure()

    def close(self) -> None:
        """Wait as ``wait`` does, and end the thread."""
        try:
            self.wait()
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()

    @property
    def _idle(self) -> bool:
        return self._running is None and self._next is None

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None or self._closed)
                if self._next is None:
                    return
                self._running, self._next = self._next, None
            failure: BaseException | None = None
            try:
                self._repeat(self._running)
            except BaseException as error:  # training raises it
                failure = error
            with self._changed:
                self._running = None
                self._failure = self._failure or failure
                self._changed.notify_all()

    def _repeat(self, save: _Save) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                save.attempt()
            except StorageRefusedError as error:
                raise CheckpointError(f"{self._unsaved(save)}: {error}") from error
            except StorageError as error:
                if self._is_superseded(save, error, pause_s):
                    return
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                self._failing_since, self.safe_step = None, save.step
                return

    def _is_superseded(self, save: _Save, error: StorageError, pause_s: float) -> bool:
        """Wait ``pause_s``; whether a newer save came. Raises CheckpointError at the deadline."""
        with self._changed:
            now = time.monotonic()
            if self._failing_since is None:
                self._failing_since = now
            left_s = self._failing_since + self._deadline_s - now
            if left_s <= 0:
                self._failing_since = None
                minutes = f"{self._deadline_s / 60:.3g} minutes (train.save_deadline_minutes)"
                raise CheckpointError(f"{self._unsaved(save, minutes)}: {error}") from error
            log.warning(
                "checkpoint not saved yet step=%d, next attempt in %.1f s, giving up in %.0f s: %s",
                save.step,
                pause_s,
                left_s,
                error,
            )
            self._changed.notify_all()
            if self._changed.wait_for(lambda: self._next is not None, min(pause_s, left_s)):
                assert self._next is not None
                log.warning("checkpoint superseded step=%d by=%d", save.step, self._next.step)
                return True
            return False

    def _unsaved(self, save: _Save, time: str = "") -> str:
        safe = "no step" if self.safe_step is None else f"step {self.safe_step}"
        within = f" within {time}" if time else ""
        return f"step {save.step} could not be saved at {self._url}{within}, {safe} is safe"
