"""Progress of a long command: a live bar on a terminal, plain lines in a log."""

import io
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

log = logging.getLogger(__name__)

LINE_EVERY_S = 10.0
SOON_S = 0.1
UNKNOWN = "–"

_bars: list[Progress] = []  # at most one: a terminal has room for one live bar


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
def progress(what: str, unit: str, *, lines: bool = True) -> Iterator[Advance]:
    """Show ``what`` advancing, in ``unit`` per second with the time left, while the block runs.

    On a terminal as a bar, below which nothing is written: what the block logs and prints comes
    above it. Elsewhere, and within another bar, as log lines, unless the block has ``lines`` of its
    own.
    """
    if sys.stderr.isatty() and not _bars:
        shown = _bar(what, unit)
    else:
        shown = _lines(what, unit) if lines else _nothing()
    with shown as advance:
        yield advance


@contextmanager
def _bar(what: str, unit: str) -> Iterator[Advance]:
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{{task.fields[rate]}} {unit}/s{{task.fields[failed]}}"),
        TextColumn("left {task.fields[left]}"),
    )
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task(what, total=None, rate=UNKNOWN, failed="", left=UNKNOWN)
        clock = _Rate()

        def advance(done: int, total: int, failed: int = 0) -> None:
            rate = clock.rate(done)
            bar.update(
                task,
                completed=done,
                total=total,
                rate=UNKNOWN if rate is None else _digits(rate),
                failed=f", {failed} failed" if failed else "",
                left=format_duration((total - done) / rate) if rate else UNKNOWN,
            )

        _bars.append(bar)
        try:
            with _written_above(bar):
                yield advance
        finally:
            _bars.remove(bar)


def leave_terminal() -> None:
    """Give the terminal back as it was, for a process that ends without leaving its blocks."""
    if _bars:
        # Raw, since Python's files may be in use; it shows the cursor, which a bar hides.
        os.write(2, b"\n\x1b[?25h")


@contextmanager
def _written_above(bar: Progress) -> Iterator[None]:
    """Let what is logged and printed to the terminal of ``bar`` appear above it."""
    above, terminal = _Above(bar.console), sys.stderr
    handlers: list[logging.StreamHandler[Any]] = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is terminal
    ]
    for handler in handlers:
        handler.setStream(above)
    try:
        with redirect_stderr(above), redirect_stdout(above if sys.stdout.isatty() else sys.stdout):
            yield
    finally:
        for handler in handlers:
            handler.setStream(terminal)


class _Above(io.TextIOBase):
    """Lines written above a bar, as they are: rich's own way would break long ones."""

    def __init__(self, console: Console) -> None:
        self._console, self._begun = console, ""

    def write(self, text: str) -> int:
        *whole, self._begun = (self._begun + text).split("\n")
        for line in whole:
            self._console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
        return len(text)

    def isatty(self) -> bool:
        return True


@contextmanager
def _lines(what: str, unit: str) -> Iterator[Advance]:
    clock, logged_at, last = _Rate(), time.monotonic(), (-1, -1, -1)

    def advance(done: int, total: int, failed: int = 0) -> None:
        nonlocal logged_at, last
        now, rate = time.monotonic(), clock.rate(done)
        counts = (done, total, failed)
        if counts == last if done >= total else now - logged_at < LINE_EVERY_S:
            return
        logged_at, last = now, counts
        speed = "" if rate is None else f" {unit}_per_s={_digits(rate)}"
        left = f" left={format_duration((total - done) / rate)}" if rate else ""
        log.info("%s done=%d/%d failed=%d%s%s", what, done, total, failed, speed, left)

    yield advance


@contextmanager
def _nothing() -> Iterator[Advance]:
    yield lambda done, total, failed=0: None


def _digits(rate: float) -> str:
    """One decimal place, or two digits where that would be 0."""
    return f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"


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
