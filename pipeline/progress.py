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
SOON_S = 0.1


class Advance(Protocol):
    """Called with what is done, how much there is in all, and how much of it failed."""

    def __call__(self, done: int, total: int, failed: int = 0) -> None: ...


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds as ``11:16:02``, from a day on as ``5d 11:16:02``."""
    minutes, second = divmod(max(round(seconds), 0), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour:02d}:{minute:02d}:{second:02d}"
    return f"{days}d {clock}" if days else clock


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
            rate = clock.rate(done)
            shown = "–" if rate is None else f"{rate:.1f}"
            bar.update(task, completed=done, total=total, rate=shown, failed=failed)

        yield advance


@contextmanager
def _lines(what: str, unit: str) -> Iterator[Advance]:
    clock, logged_at = _Rate(), time.monotonic()

    def advance(done: int, total: int, failed: int = 0) -> None:
        nonlocal logged_at
        now, rate = time.monotonic(), clock.rate(done)
        if done < total and now - logged_at < LINE_EVERY_S:
            return
        logged_at = now
        speed = "" if rate is None else f" {unit}_per_s={rate:.1f}"
        left = f" left={format_duration((total - done) / rate)}" if rate else ""
        log.info("%s done=%d/%d failed=%d%s%s", what, done, total, failed, speed, left)

    yield advance


class _Rate:
    """Per second since the first call, None so soon after it that it would be a guess.

    What was done before is not counted.
    """

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def rate(self, done: int) -> float | None:
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        since, already = self._first
        return (done - already) / (now - since) if now > since + SOON_S else None
