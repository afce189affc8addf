"""Every metric at every step, kept with the run on storage whatever the tracker.

The format is described in docs/comparing.md.
"""

import json
import logging
import math
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from io import BytesIO
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import numpy as np
from jaxtyping import Float64, Int64

from cluster.storage import MissingKeyError, Store
from pipeline.tracking.protocol import Point, Status, Tracker

log = logging.getLogger(__name__)

FOLDER = "metrics"
FORMAT = 1
WRITE_EVERY_S = 10.0
PIECE_BYTES = 2**20
"""A piece of at least this size is finished; smaller ones are written again as they grow."""
FLUSH_S = 5.0  # a checkpoint waits this long for its metrics
CLOSE_S = 20.0  # the end of a run waits this long for storage that does not answer
MS_PER_HOUR = 3.6e6
READERS = 8  # pieces on their way at the same time
LEGACY = "tracking/metrics.jsonl"  # written by version 0.1, without times

_STEP, _MS = "step", "ms"
_HEAD = b'["step",'
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_PIECE = re.compile(rf"{FOLDER}/(\d+)-(\d+)\.jsonl")
_ATTEMPT = re.compile(rf"{FOLDER}/(\d+)\.json")


@dataclass(frozen=True)
class AttemptInfo:
    """What one start of a training run was given."""

    resume_from_step: int = 0
    """The checkpoint's step; what earlier attempts logged after it is superseded."""
    world_size: int = 1
    global_batch: int = 0
    """Images per step over all ranks; 0 where unknown."""
    device: str = ""
    """``cpu``, or the GPU's name."""
    git_commit: str = ""
    dataset_digest: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The complete resolved configuration."""
    forked_from: str = ""
    """URL and step of the run that this one was forked from."""


class HistoryWriter:
    """Writes ``metrics/`` of one attempt from its own thread.

    Storage that fails, or hangs, never stops training: values stay in memory and are written with
    the next piece. A kill loses what came after the last write, some ten seconds. ``add`` and
    ``flush`` may be called from any thread.
    """

    def __init__(self, store: Store, info: AttemptInfo) -> None:
        self._store, self._info = store, info
        self._started_ms = _now_ms()
        self._attempt: int | None = None
        self._number = 1
        self._piece = bytearray()
        self._columns: list[str] = []
        self._unwritten: dict[int, bytearray] = {}
        self._new: list[tuple[int, int, dict[str, float]]] = []
        self._flushed: list[threading.Event] = []
        self._changed = threading.Lock()
        self._wanted = threading.Event()
        self._closed = threading.Event()
        self._failing = False
        self._status: Status | None = None
        self._thread = threading.Thread(target=self._work, name="history", daemon=True)
        self._thread.start()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Keep ``values`` of ``step``; returns at once."""
        kept = {name: float(value) for name, value in values.items()}
        if kept:
            with self._changed:
                self._new.append((step, _now_ms(), kept))

    def flush(self) -> None:
        """Write what was added so far; a storage that does not answer gets ``FLUSH_S`` seconds."""
        flushed = threading.Event()
        with self._changed:
            self._flushed.append(flushed)
        self._wanted.set()
        flushed.wait(FLUSH_S)

    def finish(self, status: Status) -> None:
        """Note that the attempt ends as it should, with ``status``."""
        self._status = status

    def close(self) -> None:
        """Write what is left; a storage that does not answer gets ``CLOSE_S`` seconds."""
        self._closed.set()
        self._wanted.set()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive() or self._failing:
            log.warning(
                "the metrics since the last piece are not on storage url=%s", self._store.url
            )

    def _work(self) -> None:
        self._write()  # at once, so that the run has its configuration on storage
        while not self._closed.is_set():
            self._wanted.wait(WRITE_EVERY_S)
            self._wanted.clear()
            self._write()
        self._write()

    def _write(self) -> None:
        with self._changed:
            flushed, self._flushed = self._flushed, []
        try:
            if self._attempt is None:
                self._begin()
            self._write_pieces()
            if self._closed.is_set() and self._status is not None:
                self._put_record()
            self._failing = False
        except Exception as error:  # whatever storage does, training continues
            if not self._failing:
                log.warning("metrics are kept in memory until storage is back: %s", error)
            self._failing = True
        for event in flushed:
            event.set()

    def _begin(self) -> None:
        found = (
            _PIECE.fullmatch(key) or _ATTEMPT.fullmatch(key)
            for key in self._store.list_keys(f"{FOLDER}/")
        )
        attempt = 1 + max((int(match[1]) for match in found if match), default=0)
        self._put_record(attempt)
        self._attempt = attempt

    def _put_record(self, attempt: int | None = None) -> None:
        record = {"format": FORMAT, "started_ms": self._started_ms, **asdict(self._info)}
        if self._closed.is_set() and self._status is not None:
            record["ended"] = self._status
        key = _attempt_key(self._attempt or attempt or 1)
        self._store.put(key, json.dumps(record, indent=1).encode())

    def _write_pieces(self) -> None:
        with self._changed:
            new, self._new = self._new, []
        for step, ms, values in new:
            columns = [_STEP, _MS, *values]
            if columns != self._columns:
                self._columns = columns
                self._piece += json.dumps(columns).encode() + b"\n"
            self._piece += _row(step, ms, values.values())
            self._unwritten[self._number] = self._piece
            if len(self._piece) >= PIECE_BYTES:
                self._number += 1
                self._piece, self._columns = bytearray(), []
        for number, piece in sorted(self._unwritten.items()):
            self._store.put(f"{FOLDER}/{self._attempt:04d}-{number:06d}.jsonl", bytes(piece))
            del self._unwritten[number]


class HistoryTracker:
    """Another tracker, whose metrics are also kept with the run on storage."""

    def __init__(self, tracker: Tracker, writer: HistoryWriter) -> None:
        self._tracker, self._writer = tracker, writer

    @property
    def run_id(self) -> str | None:
        return self._tracker.run_id

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._writer.add(step, values)
        self._tracker.log_metrics(step, values)

    def log_checkpoint(self, step: int, url: str, values: Mapping[str, float]) -> None:
        self._writer.add(step, values)
        self._tracker.log_checkpoint(step, url, values)

    def log_image(self, key: str, step: int, pixels: np.ndarray) -> None:
        self._tracker.log_image(key, step, pixels)

    def log_pack(self, name: str, url: str, digest: str) -> None:
        self._tracker.log_pack(name, url, digest)

    def log_artifact(self, name: str, data: bytes) -> None:
        self._tracker.log_artifact(name, data)

    def log_tag(self, name: str, text: str) -> None:
        self._tracker.log_tag(name, text)

    def flush(self) -> None:
        self._writer.flush()
        self._tracker.flush()

    def finish(self, status: Status) -> None:
        self._writer.finish(status)
        self._tracker.finish(status)

    def __enter__(self) -> Self:
        self._tracker.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writer.close()
        self._tracker.__exit__(kind, error, traceback)


@dataclass(frozen=True)
class Attempt:
    """One start of the run, from its record and its lines."""

    number: int
    info: AttemptInfo
    started_ms: int
    ended_ms: int
    """Time of the last value; ``started_ms`` where there is none."""
    last_step: int

    @property
    def hours(self) -> float:
        """From the start to the last value."""
        return (self.ended_ms - self.started_ms) / MS_PER_HOUR


@dataclass(frozen=True)
class Curve:
    """One metric over the steps that count: strictly increasing, superseded ones left out."""

    steps: Int64[np.ndarray, " points"]
    hours: Float64[np.ndarray, " points"]
    """Hours of training up to this step, without pauses and superseded steps; NaN if unknown."""
    values: Float64[np.ndarray, " points"]


@dataclass(frozen=True)
class History:
    """Curves and attempts of one run."""

    curves: Mapping[str, Curve]
    attempts: Sequence[Attempt]
    damaged_lines: int = 0
    """Lines that were left out because they are not as this module writes them."""

    @property
    def rank_hours(self) -> float:
        """Hours times ranks over all attempts, with what was superseded."""
        return sum(attempt.hours * attempt.info.world_size for attempt in self.attempts)

    @property
    def gpu_hours(self) -> float:
        """Hours times ranks, of ranks on GPUs: one GPU for each rank."""
        on_gpus = [attempt for attempt in self.attempts if attempt.info.device not in ("", "cpu")]
        return sum(attempt.hours * attempt.info.world_size for attempt in on_gpus)

    def images(self, steps: Int64[np.ndarray, " points"]) -> Float64[np.ndarray, " points"]:
        """Images seen up to each of ``steps``; NaN where an attempt has no batch size on record."""
        if not self.attempts:
            return np.full(len(steps), np.nan)
        seen = np.zeros(len(steps))
        starts = [0, *(attempt.info.resume_from_step for attempt in self.attempts[1:])]
        for index, attempt in enumerate(self.attempts):
            end = min(starts[index + 1 :], default=max(int(steps.max(initial=0)), starts[index]))
            if starts[index] < end:
                batch = attempt.info.global_batch or math.nan
                seen += (np.clip(steps, starts[index], end) - starts[index]) * batch
        return seen


def recorded_points(history: History, until_step: int) -> dict[str, list[Point]]:
    """The values up to ``until_step`` with times, for a tracker; pauses of training left out."""
    began_ms = history.attempts[0].started_ms if history.attempts else 0

    def points(curve: Curve) -> list[Point]:
        ms = began_ms + np.nan_to_num(curve.hours) * MS_PER_HOUR
        rows = zip(curve.steps.tolist(), ms.tolist(), curve.values.tolist(), strict=True)
        return [(step, int(at), value) for step, at, value in rows if step <= until_step]

    return {name: points(curve) for name, curve in history.curves.items()}


def read_history(store: Store) -> History:
    """The history in the run's folder ``store``, also while the run is training.

    Whatever is torn or foreign there is passed over and counted. Steps from before this format are
    those of the file ``LEGACY``, without times.
    """
    found, pieces = _attempt_keys(store)
    records = {number: _record(store, key) for number, key in found.items()}
    logged: list[_AttemptLines] = []
    damaged = 0
    with ThreadPoolExecutor(READERS) as pool:
        for number in sorted({*records, *pieces}):
            keys = sorted(pieces.get(number, []))
            sections, faults = _sections(pool.map(partial(_existing, store), keys))
            damaged += faults
            logged.append(_attempt_lines(number, records.get(number, {}), sections))
    if (not logged or logged[0].attempt.info.resume_from_step) and store.exists(LEGACY):
        sections, faults = _legacy_sections(store.get(LEGACY))
        damaged += faults
        logged.insert(0, _AttemptLines(Attempt(0, AttemptInfo(), 0, 0, 0), sections))
    attempts = [each.attempt for each in logged if each.attempt.number]
    return History(_curves(logged), attempts, damaged)


@dataclass(frozen=True)
class LastLogged:
    """The end of what the attempts of a run have recorded so far."""

    values: Mapping[str, float]
    """The last ones with some prefix, whether superseded since or not."""
    lost_s: float
    """Seconds since the last value of an attempt that was lost; 0 after one that ended well."""


def last_logged(store: Store, prefix: str) -> LastLogged:
    """What the run in ``store`` recorded last; metrics that begin with ``prefix``.

    An attempt that recorded nothing was lost too, and so is the time since it started.
    """
    records, pieces = _attempt_keys(store)
    since_ms: int | None = None
    for number in sorted({*records, *pieces}, reverse=True):
        record = _record(store, records[number]) if number in records else {}
        ended_well = "ended" in record
        sections, _ = _sections([_existing(store, key) for key in sorted(pieces.get(number, []))])
        if not sections:
            if not ended_well:
                since_ms = int(record.get("started_ms", _now_ms()))
            continue
        if not ended_well:
            since_ms = int(max(section.ms.max() for section in sections))
        values: dict[str, float] = {}
        for section in sorted(sections, key=lambda section: float(section.ms[-1])):
            values |= {
                name: float(column[-1])
                for name, column in zip(section.names, section.values, strict=True)
                if name.startswith(prefix)
            }
        # Without such values the attempt is of a version that did not note how it ended either.
        return LastLogged(values, _since_s(since_ms) if values else 0.0)
    return LastLogged({}, _since_s(since_ms))


def _since_s(ms: int | None) -> float:
    return 0.0 if ms is None else max(_now_ms() - ms, 0) / 1000


def _attempt_keys(store: Store) -> tuple[dict[int, str], dict[int, list[str]]]:
    """The record and the pieces of each attempt."""
    records: dict[int, str] = {}
    pieces: dict[int, list[str]] = {}
    for key in store.list_keys(f"{FOLDER}/"):
        if match := _PIECE.fullmatch(key):
            pieces.setdefault(int(match[1]), []).append(key)
        elif match := _ATTEMPT.fullmatch(key):
            records[int(match[1])] = key
    return records, pieces


@dataclass(frozen=True)
class _Section:
    """Lines of equal columns."""

    names: Sequence[str]
    steps: Int64[np.ndarray, " lines"]
    ms: Float64[np.ndarray, " lines"]
    values: Sequence[Float64[np.ndarray, " lines"]]
    """One array for each name."""


@dataclass(frozen=True)
class _AttemptLines:
    """An attempt and what it logged."""

    attempt: Attempt
    sections: Sequence[_Section]


def _attempt_lines(
    number: int, record: Mapping[str, Any], sections: Sequence[_Section]
) -> _AttemptLines:
    known = {name: record[name] for name in AttemptInfo.__dataclass_fields__ if name in record}
    info = AttemptInfo(**known)
    started_ms = int(record.get("started_ms", min((s.ms.min() for s in sections), default=0)))
    return _AttemptLines(
        Attempt(
            number,
            info,
            started_ms,
            int(max((s.ms.max() for s in sections), default=started_ms)),
            int(max((s.steps.max() for s in sections), default=info.resume_from_step)),
        ),
        sections,
    )


def _curves(logged: Sequence[_AttemptLines]) -> dict[str, Curve]:
    """Each metric over all attempts; an attempt counts up to where a later one began again."""
    starts = [each.attempt.info.resume_from_step for each in logged]
    hours_before: list[float] = []
    parts: dict[str, list[Curve]] = {}
    for index, each in enumerate(logged):
        hours_before.append(_hours_before(starts[index], logged[:index], hours_before))
        end = min(starts[index + 1 :], default=None)
        for section in each.sections:
            counts = slice(None) if end is None else section.steps <= end
            since_ms = section.ms[counts] - each.attempt.started_ms
            hours = hours_before[index] + since_ms / MS_PER_HOUR
            for name, values in zip(section.names, section.values, strict=True):
                part = Curve(section.steps[counts], hours, values[counts])
                parts.setdefault(name, []).append(part)
    joined = {name: _joined(parts[name]) for name in sorted(parts)}
    return {name: curve for name, curve in joined.items() if len(curve.steps)}


def _hours_before(
    start: int, logged: Sequence[_AttemptLines], hours_before: Sequence[float]
) -> float:
    """Hours of training behind the checkpoint of step ``start``, from the attempts before."""
    for each, before in reversed([*zip(logged, hours_before, strict=True)]):
        times = [section.ms[section.steps <= start] for section in each.sections]
        last_ms = max((part.max() for part in times if len(part)), default=None)
        if last_ms is not None and each.attempt.number:
            return before + float(last_ms - each.attempt.started_ms) / MS_PER_HOUR
    return 0.0


def _joined(parts: Sequence[Curve]) -> Curve:
    """In the order of steps; of several values at one step the one that was logged last."""
    steps = np.concatenate([part.steps for part in parts])
    hours = np.concatenate([part.hours for part in parts])
    values = np.concatenate([part.values for part in parts])
    if np.any(np.diff(steps) <= 0):
        order = np.argsort(steps, kind="stable")
        steps, hours, values = steps[order], hours[order], values[order]
        last = np.append(np.diff(steps) > 0, True)
        steps, hours, values = steps[last], hours[last], values[last]
    return Curve(steps, hours, values)


def _sections(texts: Iterable[bytes]) -> tuple[list[_Section], int]:
    """What the pieces ``texts`` hold, lines of equal columns together, and the damaged lines."""
    bodies: dict[bytes, list[bytes]] = {}
    damaged = 0
    for text in texts:
        starts = _heads(text)
        damaged += sum(1 for line in text[: starts[0]].splitlines() if line.strip())
        for start, end in pairwise(starts):
            head, _, body = text[start:end].partition(b"\n")
            if body:
                bodies.setdefault(head, []).append(body.rstrip(b"\n") + b"\n")
    sections = []
    for head_line, parts in bodies.items():
        body = b"".join(parts)
        columns = _columns(head_line)
        if columns is None:
            damaged += 1 + body.count(b"\n")
            continue
        table = _parsed_at_once(body, len(columns))
        if table is None:
            table, faults = _parsed_line_by_line(body, len(columns))
            damaged += faults
        if len(table[0]):
            section = _Section(columns[2:], table[0].astype(np.int64), table[1], table[2:])
            sections.append(section)
    return sections, damaged


def _heads(text: bytes) -> list[int]:
    """Where each line of names begins, and where ``text`` ends."""
    starts = [0] if text.startswith(_HEAD) else []
    at = text.find(b"\n" + _HEAD)
    while at >= 0:
        starts.append(at + 1)
        at = text.find(b"\n" + _HEAD, at + 1)
    return [*starts, len(text)]


def _parsed_at_once(body: bytes, columns: int) -> list[np.ndarray] | None:
    """Each column of ``body``; None unless every line is a whole row of numbers.

    As CSV, which pyarrow reads ten times as fast as Python reads JSON.
    """
    from pyarrow import ArrowInvalid, csv, float64

    whole = body.startswith(b"[") and body.endswith(b"]\n")
    if not whole or body.count(b"]\n[") + 1 != body.count(b"\n"):
        return None
    names = [str(index) for index in range(columns)]
    try:
        table = csv.read_csv(
            BytesIO(body.translate(None, b"[]")),
            read_options=csv.ReadOptions(column_names=names),
            convert_options=csv.ConvertOptions(
                column_types=dict.fromkeys(names, float64()), null_values=[]
            ),
        )
    except ArrowInvalid:
        return None
    return [column.to_numpy() for column in table.columns]


def _parsed_line_by_line(body: bytes, columns: int) -> tuple[list[np.ndarray], int]:
    """Each column of the lines that are whole, and how many are not."""
    rows, damaged = [], 0
    for line in body.splitlines():
        try:
            row = [_WORDS[cell] if isinstance(cell, str) else cell for cell in json.loads(line)]
            if len(row) != columns or not all(type(cell) in (int, float) for cell in row):
                raise ValueError
            rows.append([float(cell) for cell in row])
        except (ValueError, TypeError, KeyError, OverflowError):
            damaged += bool(line.strip())
    return list(np.array(rows, float).reshape(-1, columns).T), damaged


def _columns(line: bytes) -> list[str] | None:
    try:
        columns = json.loads(line)
    except ValueError:
        return None
    fits = len(columns) > 2 and all(isinstance(name, str) for name in columns)
    return columns if fits else None


def _row(step: int, ms: int, values: Iterable[float]) -> bytes:
    cells = (f"{value:.9g}" if math.isfinite(value) else f'"{_word(value)}"' for value in values)
    return f"[{step},{ms},{','.join(cells)}]\n".encode()


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _record(store: Store, key: str) -> Mapping[str, Any]:
    try:
        record = json.loads(_existing(store, key))
    except ValueError:
        return {}
    ours = isinstance(record, dict) and record.get("format") == FORMAT
    numbers = ("started_ms", "resume_from_step", "world_size", "global_batch")
    whole = ours and all(type(record.get(name)) is int for name in numbers)
    return record if whole else {}


def _existing(store: Store, key: str) -> bytes:
    try:
        return store.get(key)
    except MissingKeyError:  # deleted since it was listed
        return b""


def _legacy_sections(text: bytes) -> tuple[list[_Section], int]:
    """One section for each metric of the file ``LEGACY``."""
    points: dict[str, dict[int, float]] = {}
    damaged = 0
    for line in text.splitlines():
        try:
            values = json.loads(line)
            if "step" in values:  # the last line has the status alone
                step = int(values.pop("step"))
                for name, value in values.items():
                    points.setdefault(name, {})[step] = float(value)
        except (ValueError, TypeError, AttributeError):
            damaged += 1
    sections = []
    for name, found in points.items():
        steps = np.array([*found], np.int64)
        values = [np.array([*found.values()])]
        sections.append(_Section([name], steps, np.full(len(found), np.nan), values))
    return sections, damaged


def _attempt_key(attempt: int) -> str:
    return f"{FOLDER}/{attempt:04d}.json"


def _now_ms() -> int:
    return int(time.time() * 1000)
