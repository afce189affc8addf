"""Numbered checkpoints on storage: written in the background, finished by their manifest."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from cluster.storage import MissingKeyError, Store, join, open_store
from models.options import ModelOptions
from pipeline.config import stored_model_options

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TENSORS = ".safetensors"
TRANSFERS = 4  # files in transfer at the same time; large ones also go in parallel parts
MetricMode = Literal["min", "max"]
CheckpointChoice = int | Literal["newest", "best"]
"""A step, or which one of a run's."""
BEST: tuple[str, MetricMode] = ("val/l1_percent", "min")
"""The metric by which a checkpoint is the best one of its run."""
S = TypeVar("S")
T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, incomplete, damaged or not finite; the message names it."""


class CheckpointStore:
    """The checkpoints of one run. A checkpoint exists only once its manifest does.

    Saving runs in the background, one checkpoint at a time. Of the finished ones the newest
    ``keep`` stay, the ``best`` by a metric such as ``("val/psnr_db", "max")``, and the newest
    healthy one: intact byte for byte, with finite tensors and metrics. One process may save, any
    number may read.
    """

    def __init__(
        self, store: Store, *, keep: int = 3, best: tuple[str, MetricMode] | None = None
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} checkpoints: keep at least the newest one")
        self._store, self._keep, self._best = store, keep, best
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    @property
    def url(self) -> str:
        return self._store.url

    def save(self, step: int, files: Mapping[str, bytes], *, manifest: Mapping[str, Any]) -> None:
        """Write in the background; ``manifest`` is added to the names, sizes and digests.

        Returns at once, unless the previous save is still running: then it waits for that. Raises
        the error of the previous save, and CheckpointError where a metric in ``manifest`` is not
        finite. A tensor that is not finite raises CheckpointError later, as an error in writing
        does. None of these leaves a finished checkpoint.
        """
        if fault := _metrics_fault(manifest):
            raise CheckpointError(f"step {step} was not saved at {self.url}: {fault}")
        self.wait()
        self._pending = self._writer.submit(self._write, step, dict(files), dict(manifest))

    def wait(self) -> None:
        """Wait for the last save. Raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish the last save. Raises its error."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def steps(self) -> list[int]:
        """Every finished checkpoint, oldest first."""
        return sorted(step for step, names in self._folders().items() if MANIFEST in names)

    def newest(self) -> int | None:
        return max(self.steps(), default=None)

    def best(self, metric: str, mode: MetricMode) -> int | None:
        """The step whose manifest has the best finite value; the later one of equals."""
        if mode not in ("min", "max"):
            raise ValueError(f"mode {mode!r} is neither 'min' nor 'max'")
        sign = 1 if mode == "max" else -1
        values = {
            step: manifest.get("metrics", {}).get(metric, math.nan)
            for step, manifest in self.manifests().items()
        }
        finite = {step: sign * value for step, value in values.items() if math.isfinite(value)}
        return max(finite, key=lambda step: (finite[step], step), default=None)

    def manifest(self, step: int) -> dict[str, Any]:
        """The manifest given to ``save``, with ``files``: ``bytes`` and ``sha256`` by name."""
        key = f"{_folder(step)}/{MANIFEST}"
        try:
            data = self._store.get(key)
        except MissingKeyError as error:
            known = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(
                f"{self.url} has no finished checkpoint of step {step}: it has {known}"
            ) from error
        try:
            manifest = json.loads(data)
            for file in manifest["files"].values():
                file["bytes"], file["sha256"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{join(self.url, key)} is damaged: {error}") from error
        return dict(manifest)

    def manifests(self) -> dict[int, dict[str, Any]]:
        """The manifest of every finished checkpoint, oldest first; damaged ones give a warning."""

        def manifest(step: int) -> dict[str, Any] | None:
            try:
                return self.manifest(step)
            except CheckpointError as error:
                log.warning("checkpoint skipped step=%d: %s", step, error)
                return None

        steps = self.steps()
        found = zip(steps, _at_once(manifest, steps), strict=True)
        return {step: manifest for step, manifest in found if manifest is not None}

    def load(self, step: int) -> dict[str, bytes]:
        """Every file of ``step``. Raises CheckpointError unless it is healthy, byte for byte."""
        manifest = self.manifest(step)
        files = manifest["files"]
        contents = dict(
            zip(files, _at_once(lambda name: self._get(step, name, files), files), strict=True)
        )
        if fault := _metrics_fault(manifest) or _tensors_fault(contents):
            raise CheckpointError(f"{join(self.url, _folder(step))} is damaged: {fault}")
        return contents

    def load_newest(self) -> tuple[int, dict[str, bytes]] | None:
        """The newest healthy checkpoint; skips others with a warning.

        None if there is no checkpoint at all. Raises CheckpointError if all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return step, self.load(step)
            except CheckpointError as error:
                log.warning("checkpoint skipped step=%d: %s", step, error)
        if steps:
            raise CheckpointError(
                f"every checkpoint at {self.url} is damaged: delete them to start again"
            )
        return None

    def fault(self, step: int) -> str | None:
        """What a look at the manifest and at the sizes shows to be wrong; no file is read."""
        try:
            manifest = self.manifest(step)
            for name, file in manifest["files"].items():
                size = self._existing(step, name, self._store.size)
                if size != file["bytes"]:
                    return self._damaged(step, name, f"{size} of {file['bytes']} bytes")
        except CheckpointError as error:
            return str(error)
        return _metrics_fault(manifest)

    def read(self, step: int, name: str) -> bytes:
        """One file of ``step``, each byte checked."""
        files = self.manifest(step)["files"]
        if name not in files:
            raise CheckpointError(f"step {step} has no {name}: it has {', '.join(sorted(files))}")
        return self._get(step, name, files)

    def verify(self, step: int) -> list[str]:
        """Read every byte; one line for each fault, none for a healthy checkpoint."""
        try:
            manifest = self.manifest(step)
        except CheckpointError as error:
            return [str(error)]
        files = manifest["files"]

        def fault(name: str) -> str | None:
            try:
                return _tensors_fault({name: self._get(step, name, files)})
            except CheckpointError as error:
                return str(error)

        strangers = self._folders().get(step, set()) - set(files) - {MANIFEST}
        return [
            *filter(None, [*_at_once(fault, files), _metrics_fault(manifest)]),
            *(
                f"{join(self.url, _folder(step), name)} is not in the manifest"
                for name in sorted(strangers)
            ),
        ]

    def pull(self, step: int, to: Path) -> list[Path]:
        """Copy ``step`` into the folder ``to``, each byte checked; its manifest comes last.

        Files that are already in ``to`` are not fetched again: repeat a pull that was cut short.
        """
        manifest = self.manifest(step)
        files = manifest["files"]
        to.mkdir(parents=True, exist_ok=True)
        (to / MANIFEST).unlink(missing_ok=True)  # it describes ``to`` only at the end

        def fetch(name: str) -> Path:
            path = to / name
            if not (path.is_file() and _is_as_written(path, files[name])):
                self._existing(step, name, lambda key: self._store.download(key, path))
                if not _is_as_written(path, files[name]):
                    path.unlink()
                    raise CheckpointError(self._damaged(step, name, "its copy differs"))
            return path

        paths = _at_once(fetch, files)
        (to / MANIFEST).write_text(json.dumps(manifest, indent=1))
        return [*paths, to / MANIFEST]

    def delete(self, step: int) -> None:
        """Delete ``step``, its manifest first: half a checkpoint never passes for a whole one."""
        self._store.delete(f"{_folder(step)}/{MANIFEST}")
        for name in self._folders().get(step, set()) - {MANIFEST}:
            self._store.delete(f"{_folder(step)}/{name}")

    def prune(self) -> list[int]:
        """Delete what need not stay, and what was never finished; returns those steps.

        Keeps all that is newer than the newest finished checkpoint: it is being written. Reads
        checkpoints, newest first, until one is healthy: that one stays as well. Where none is, all
        finished ones stay.
        """
        healthy = None
        for step in reversed(self.steps()):
            try:
                self.load(step)
            except CheckpointError as error:
                log.warning("checkpoint is not healthy step=%d: %s", step, error)
            else:
                healthy = step
                break
        return self._prune(healthy)

    def _prune(self, healthy: int | None) -> list[int]:
        finished = self.steps()
        staying = set(finished) if healthy is None else {*finished[-self._keep :], healthy}
        if self._best and (best := self.best(*self._best)) is not None:
            staying.add(best)
        gone = [
            step
            for step in sorted(self._folders())
            if finished and step < finished[-1] and step not in staying
        ]
        for step in gone:
            self.delete(step)
        return gone

    def _write(self, step: int, files: dict[str, bytes], more: dict[str, Any]) -> None:
        started = time.perf_counter()
        if fault := _tensors_fault(files):
            raise CheckpointError(f"step {step} was not saved at {self.url}: {fault}")
        self.delete(step)  # leftovers of a save that was cut short
        _at_once(lambda name: self._store.put(f"{_folder(step)}/{name}", files[name]), files)
        manifest = {
            **more,
            "step": step,
            "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "files": {
                name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for name, data in files.items()
            },
        }
        data = json.dumps(manifest, indent=1).encode()
        self._store.put(f"{_folder(step)}/{MANIFEST}", data)  # last: this is the commit
        log.info(
            "checkpoint saved step=%d seconds=%.1f megabytes=%.1f url=%s",
            step,
            time.perf_counter() - started,
            sum(map(len, files.values())) / 1e6,
            join(self.url, _folder(step)),
        )
        for later in (later for later in self.steps() if later > step):
            log.warning("checkpoint deleted step=%d: the run resumed from before it", later)
            self.delete(later)
        self._prune(healthy=step)

    def _folders(self) -> dict[int, set[str]]:
        """The names in each step's folder, finished or not."""
        found: dict[int, set[str]] = {}
        for key in self._store.list_keys("step-"):
            if match := re.fullmatch(r"step-(\d+)/(.+)", key):
                found.setdefault(int(match[1]), set()).add(match[2])
        return found

    def _get(self, step: int, name: str, files: Mapping[str, Mapping[str, Any]]) -> bytes:
        data = self._existing(step, name, self._store.get)
        if len(data) != files[name]["bytes"]:
            expected = files[name]["bytes"]
            raise CheckpointError(self._damaged(step, name, f"{len(data)} of {expected} bytes"))
        if hashlib.sha256(data).hexdigest() != files[name]["sha256"]:
            raise CheckpointError(self._damaged(step, name, "its sha256 differs"))
        return data

    def _existing(self, step: int, name: str, use: Callable[[str], T]) -> T:
        try:
            return use(f"{_folder(step)}/{name}")
        except MissingKeyError as error:
            raise CheckpointError(self._damaged(step, name, "it is missing")) from error

    def _damaged(self, step: int, name: str, reason: str) -> str:
        return f"{join(self.url, _folder(step), name)} is damaged: {reason}; use another step"


@dataclass(frozen=True)
class CheckpointInfo:
    """One finished checkpoint, as a listing shows it."""

    step: int
    url: str
    saved: str
    """UTC, as 2026-01-31T12:00:00Z."""
    bytes: int
    metrics: Mapping[str, float]


def _metrics_fault(manifest: Mapping[str, Any]) -> str | None:
    """The first metric that is not finite, in words."""
    for name, value in manifest.get("metrics", {}).items():
        if not (isinstance(value, int | float) and math.isfinite(value)):
            return f"its metric {name} is {value}"
    return None


def _tensors_fault(files: Mapping[str, bytes]) -> str | None:
    """The first tensor in a safetensors file with a value that is not finite, in words."""
    for name, data in files.items():
        if not name.endswith(TENSORS):
            continue
        try:
            tensors = load_tensors(data)
        except SafetensorError as error:
            return f"{name} is not a safetensors file: {error}"
        for tensor, values in tensors.items():
            if not np.isfinite(values).all():
                return f"{tensor} in {name} is not finite"
    return None


def refuse_other_model(run: str, manifest: Mapping[str, Any], model: ModelOptions) -> None:
    """A run keeps its model: CheckpointError where a checkpoint's ``manifest`` has another."""
    saved = vars(stored_model_options(manifest["config"]["model"]))
    differing = [name for name, value in vars(model).items() if saved[name] != value]
    if differing:
        raise CheckpointError(
            f"run {run} at step {manifest['step']} has another model "
            f"({', '.join(differing)} differ): give the recipe a new name, or the old settings back"
        )


def find_checkpoints(url: str) -> tuple[CheckpointStore, int | None]:
    """The checkpoints at ``url``: a run's folder, its ``checkpoints`` folder, or one step's.

    The step is None unless ``url`` names one. Raises CheckpointError where there are none.
    """
    parent, _, name = url.rstrip("/").rpartition("/")
    if match := re.fullmatch(r"step-(\d+)", name):
        return CheckpointStore(open_store(parent)), int(match[1])
    for place in (url, join(url, "checkpoints")):
        checkpoints = CheckpointStore(open_store(place))
        if checkpoints.steps():
            return checkpoints, None
    raise CheckpointError(
        f"{url} has no finished checkpoint: give the folder of a run, as in STORAGE/runs/NAME"
    )


def list_checkpoints(url: str) -> list[CheckpointInfo]:
    """Every finished checkpoint at ``url``, oldest first."""
    checkpoints, only = find_checkpoints(url)
    manifests = checkpoints.manifests() if only is None else {only: checkpoints.manifest(only)}
    return [
        CheckpointInfo(
            step=step,
            url=join(checkpoints.url, _folder(step)),
            saved=str(manifest.get("saved", "")),
            bytes=sum(file["bytes"] for file in manifest["files"].values()),
            metrics=manifest.get("metrics", {}),
        )
        for step, manifest in manifests.items()
    ]


def choose_checkpoint(
    url: str, which: CheckpointChoice, best: tuple[str, MetricMode]
) -> tuple[CheckpointStore, int]:
    """The checkpoint that ``which`` means at ``url``; a URL that names a step settles it."""
    checkpoints, step = find_checkpoints(url)
    if step is None:
        if which == "newest":
            step = checkpoints.newest()
        elif which == "best":
            step = checkpoints.best(*best)
        else:
            step = which
    if step is None:
        raise CheckpointError(
            f"no checkpoint at {url} has a finite {best[0]}: give a step, or 'newest'"
        )
    return checkpoints, step


def pull_checkpoint(
    url: str, to: Path, which: CheckpointChoice, best: tuple[str, MetricMode]
) -> list[Path]:
    """Copy one checkpoint into the folder ``to``; see ``CheckpointStore.pull``."""
    checkpoints, step = choose_checkpoint(url, which, best)
    return checkpoints.pull(step, to)


def read_pulled(url: str, name: str) -> bytes | None:
    """The file ``name`` of the one checkpoint in the folder ``url``, each byte checked.

    Such a folder is what ``pull_checkpoint`` leaves; None where ``url`` is not one. Raises
    CheckpointError where the checkpoint is damaged or has no such file.
    """
    store = open_store(url)
    try:
        manifest = store.get(MANIFEST)
    except MissingKeyError:
        return None
    try:
        files = json.loads(manifest)["files"]
        if name not in files:
            raise CheckpointError(f"{url} has no {name}: it has {', '.join(sorted(files))}")
        expected = files[name]["bytes"], files[name]["sha256"]
        data = store.get(name)
    except (ValueError, TypeError, KeyError, MissingKeyError) as error:
        raise CheckpointError(f"{join(url, name)} is damaged: {error}; pull it again") from error
    if (len(data), hashlib.sha256(data).hexdigest()) != expected:
        raise CheckpointError(f"{join(url, name)} is damaged: its sha256 differs; pull it again")
    return data


def verify_checkpoints(url: str) -> dict[int, list[str]]:
    """The faults of every checkpoint at ``url``, by step; every byte is read."""
    checkpoints, only = find_checkpoints(url)
    steps = checkpoints.steps() if only is None else [only]
    return {step: checkpoints.verify(step) for step in steps}


def prune_checkpoints(url: str, *, keep: int, best: tuple[str, MetricMode]) -> list[int]:
    """Delete all at ``url`` but the newest ``keep``, the best and the newest healthy one.

    Returns the deleted steps.
    """
    checkpoints, only = find_checkpoints(url)
    if only is not None:
        raise CheckpointError(f"{url} is a single checkpoint: prune a run's folder")
    return CheckpointStore(open_store(checkpoints.url), keep=keep, best=best).prune()


def _folder(step: int) -> str:
    return f"step-{step:08d}"


def _is_as_written(path: Path, file: Mapping[str, Any]) -> bool:
    if path.stat().st_size != file["bytes"]:
        return False
    with path.open("rb") as source:
        return bool(hashlib.file_digest(source, "sha256").hexdigest() == file["sha256"])


def _at_once(action: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """``action`` on every item, a few at the same time; the results in order."""
    with ThreadPoolExecutor(TRANSFERS) as pool:
        return list(pool.map(action, items))
