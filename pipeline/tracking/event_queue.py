"""Events of a run in a file, and the thread that sends them, so that training never waits."""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from cluster.storage import describe_error, open_store

log = logging.getLogger(__name__)

Event: TypeAlias = dict[str, Any]
"""``kind`` and what belongs to it, see ``FIELDS``."""

FIELDS: Mapping[str, Mapping[str, type]] = {
    "metrics": {"step": int, "values": dict, "ms": int},
    "machine": {"values": dict, "ms": int},
    "checkpoint": {"step": int, "url": str, "values": dict, "ms": int},
    "image": {"key": str, "step": int, "path": str},
    "pack": {"name": str, "url": str, "digest": str},
    "artifact": {"name": str, "path": str},
    "tag": {"name": str, "text": str},
    "end": {"status": str},
}

FLUSH_S = 20.0  # at its end a run waits this long for a server that accepts nothing
RETRY_S = (1.0, 5.0, 15.0, 60.0)
BATCH_VALUES = 1000  # MLflow accepts this many values in one call
EVENTS = "events.jsonl"
SHORTEN_AFTER = 100  # delivered events; the file is flushed to the disk then, and ``add`` waits


class EventQueue:
    """Events in a file until they are delivered, oldest first; the file survives the process.

    Where the file cannot be written or read, events are in memory alone, with one warning.
    ``resumes``: training resumes, so the status of an earlier process is out of date.
    """

    def __init__(self, folder: Path, *, resumes: bool = True) -> None:
        self.folder = folder
        self._store = open_store(str(folder))
        self._delivered_path = folder / "delivered"
        self._changed = threading.Condition()
        self._delivered = 0
        self._in_memory = False
        self._events: list[Event] = []
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._store.clear_unfinished()
            self._events = self._waiting()
            if resumes:
                self._events = [event for event in self._events if event["kind"] != "end"]
            self._rewrite()
        except OSError as error:
            self._warn(error)

    def _waiting(self) -> list[Event]:
        """What earlier processes have left."""
        if not self._store.exists(EVENTS):
            return []
        # Empty if a process was killed while writing it: then some events are sent twice.
        known = self._delivered_path.read_bytes() if self._delivered_path.exists() else b""
        lines = self._store.get(EVENTS).splitlines()[int(known) if known.isdigit() else 0 :]
        events = [event for line in lines if (event := _parsed(line))]
        if strangers := len(lines) - len(events):
            log.warning(
                "tracking: %d damaged lines in %s passed over", strangers, self.folder / EVENTS
            )
        return events

    def add(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
            try:
                with (self.folder / EVENTS).open("ab") as file:
                    file.write(json.dumps(event).encode() + b"\n")
            except OSError as error:
                self._warn(error)
            self._changed.notify_all()

    def _warn(self, error: OSError) -> None:
        if not self._in_memory:
            log.warning("tracking: events are in memory only: %s", describe_error(error))
        self._in_memory = True

    def next_batch(self) -> list[Event]:
        """The oldest events that fit in one call: metrics of the same kind, or a single event."""
        with self._changed:
            batch: list[Event] = []
            values = 0
            for event in self._events:
                values += len(event.get("values", ()))
                alike = not batch or event["kind"] == batch[0]["kind"]
                if batch and not (alike and "values" in event and values <= BATCH_VALUES):
                    break
                batch.append(event)
            return batch

    def remove(self, count: int) -> None:
        """Remove the oldest events after their delivery."""
        with self._changed:
            delivered, self._events = self._events[:count], self._events[count:]
            self._delivered += count
            try:
                self._delivered_path.write_text(str(self._delivered))
                if not self._events and self._delivered >= SHORTEN_AFTER:
                    self._rewrite()
            except OSError as error:
                self._warn(error)
        for event in delivered:
            if event["kind"] in ("image", "artifact"):
                with contextlib.suppress(OSError):
                    Path(event["path"]).unlink(missing_ok=True)

    def __len__(self) -> int:
        with self._changed:
            return len(self._events)

    def wait(self, timeout_s: float) -> None:
        """Return once there are events, at the latest after ``timeout_s``."""
        with self._changed:
            self._changed.wait_for(lambda: self._events, timeout_s)

    def _rewrite(self) -> None:
        """Drop delivered events from the file. Killed in between, some are sent twice."""
        self._delivered = 0
        self._delivered_path.write_text("0")
        lines = "".join(json.dumps(event) + "\n" for event in self._events)
        self._store.put(EVENTS, lines.encode())


class RefusedError(RuntimeError):
    """What a receiver refuses until somebody changes something; the message says what."""


class NotCreatedError(LookupError):
    """Another process has to create something first, and reports why it does not."""


class Receiver(Protocol):
    """Where an EventSender delivers; each method raises until it succeeds.

    ``RefusedError`` stands for what waiting does not cure.
    """

    @property
    def address(self) -> str:
        """The name of the receiver in messages."""

    def connect(self) -> None:
        """Called before every delivery; does nothing where it has succeeded before."""

    def receive(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Record a batch of ``EventQueue.next_batch``; events that come twice are recorded once."""


class EventSender:
    """Delivers a queue in order, from its own thread; while the receiver is down, events wait."""

    def __init__(self, receiver: Receiver, queue: EventQueue) -> None:
        self._receiver = receiver
        self._queue = queue
        self._closed = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Deliver what is left, for as long as that makes progress."""
        self._deadline = time.monotonic() + FLUSH_S
        self._closed.set()
        while self._thread.is_alive() and time.monotonic() < self._deadline:
            self._thread.join(0.1)
        if left := len(self._queue):
            log.warning(
                "tracking: %d events for %s wait in %s; the next attempt sends them, or `python -m "
                "pipeline tracking sync RUN`",
                left,
                self._receiver.address,
                self._queue.folder,
            )

    def _run(self) -> None:
        failures = 0
        while time.monotonic() < self._deadline:
            try:
                self._receiver.connect()
                while events := self._queue.next_batch():
                    self._deliver(events)
                    self._queue.remove(len(events))
                    if self._closed.is_set():
                        self._deadline = time.monotonic() + FLUSH_S
                failures = 0
                if self._closed.is_set() and not len(self._queue):
                    return
                self._queue.wait(0.5)
            except Exception as error:  # no failure of a tracker may stop training
                pause_s = RETRY_S[min(failures, len(RETRY_S) - 1)]
                failures += 1
                refused = isinstance(error, RefusedError)
                if failures == (1 if refused else 2) and not isinstance(error, NotCreatedError):
                    log.warning(
                        "tracking: refused, events are kept uri=%s: %s"
                        if refused
                        else "tracking: no answer, events are kept uri=%s: %s",
                        self._receiver.address,
                        describe_error(error),
                    )
                if self._closed.is_set():
                    time.sleep(RETRY_S[0])
                else:
                    self._closed.wait(pause_s)

    def _deliver(self, events: Sequence[Event]) -> None:
        try:
            self._receiver.receive(events)
        except Exception as error:
            # The event itself is invalid, whatever the server's state: it would block the rest.
            if getattr(error, "error_code", None) != "INVALID_PARAMETER_VALUE":
                raise
            if len(events) > 1:
                for event in events:
                    self._deliver([event])
            else:
                kind, step = events[0]["kind"], events[0].get("step", "the end")
                log.warning(
                    "tracking: %s at step %s refused: %s", kind, step, describe_error(error)
                )


def _parsed(line: bytes) -> Event | None:
    """The event; None for the last line of a killed process, and for what is not ours."""
    try:
        event = json.loads(line)
        fields = FIELDS[event["kind"]]
        whole = all(type(event[name]) is kind for name, kind in fields.items())
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return event if whole else None
