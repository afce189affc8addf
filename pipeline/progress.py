"""Progress of a long command: a live bar on a terminal, plain lines in a log."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

log = logging.getLogger(__name__)

LINE_EVERY_S = 10.0


class Advance(Protocol):
    """Called with what is done, how much there is in all, and how much of it failed."""

    def __call__(self, done: int, total: int, failed: int = 0) -> None: ...


@contextmanager
def progress(what: str, unit: str) -> Iterator[Advance]:
    """Show ``what`` advancing, in ``unit`` per second with the time left, while the block runs."""
    shown = _bar(what, unit) if sys.stderr.isatty() else _lines(what, unit)
    with shown as advance:
        yield advance


@contextmanager
def _bar(what: str, unit: str) -> Iterator[Advance]:
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{{task.fields[rate]}} {unit}/s, {{task.fields[failed]}} failed"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(what, total=None, rate="–", failed=0)
        clock = _Rate()

        def advance(done: int, total: int, failed: int = 0) -> None:
            rate = f"{clock.rate(done):.1f}"
            bar.update(task, completed=done, total=total, rate=rate, failed=failed)

        yield advance


@contextmanager
def _lines(what: str, unit: str) -> Iterator[Advance]:
    clock, told_at = _Rate(), time.monotonic()

    def advance(done: int, total: int, failed: int = 0) -> None:
        nonlocal told_at
        now, rate = time.monotonic(), clock.rate(done)
        if done < total and now - told_at < LINE_EVERY_S:
            return
        told_at = now
        left_s = (total - done) / rate if rate else 0.0
        log.info(
            "%s done=%d/%d failed=%d %s_per_s=%.1f left=%s",
            *(what, done, total, failed, unit, rate),
            time.strftime("%H:%M:%S", time.gmtime(left_s)),
        )

    yield advance


class _Rate:
    """Per second since the first call; what was done before that is not counted."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def rate(self, done: int) -> float:
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        since, already = self._first
        return (done - already) / (now - since) if now > since else 0.0
