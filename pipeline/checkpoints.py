"""Numbered checkpoints on storage: written behind the training, finished by their manifest."""

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

from cluster.storage import MissingKeyError, Store, join, open_store
from models.options import ModelOptions
from pipeline.config import stored_model_options

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TRANSFERS = 4  # files on their way at the same time; big ones go in parts besides
MetricMode = Literal["min", "max"]
CheckpointChoice = int | Literal["newest", "best"]
"""A step, or which one of a run's."""
BEST: tuple[str, MetricMode] = ("val/l1_percent", "min")
"""The metric by which a checkpoint is the best one of its run."""
S = TypeVar("S")
T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, incomplete or damaged; the message names it in one line."""


class CheckpointStore:
    """The checkpoints of one run. One exists only once its manifest does.

    Saving goes on in the background, one checkpoint at a time; of the finished ones the newest
    ``keep`` stay, and the one that is ``best`` by a metric: ``("val/psnr_db", "max")``. One process
    may save, any number may read.
    """

    def __init__(
        self, store: Store, *, keep: int = 3, best: tuple[str, MetricMode] | None = None
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} checkpoints: at least the newest one has to stay")
        self._store, self._keep, self._best = store, keep, best
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    @property
    def url(self) -> str:
        return self._store.url

    def save(self, step: int, files: Mapping[str, bytes], *, manifest: Mapping[str, Any]) -> None:
        """Write in the background; ``manifest`` is added to the names, sizes and digests.

        Returns at once, unless the save before is still under way: then it waits for that. Raises
        what the save before has raised.
        """
        self.wait()
        self._pending = self._writer.submit(self._write, step, dict(files), dict(manifest))

    def wait(self) -> None:
        """Until the last save is finished. Raises what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish what is being saved. Raises what it raised."""
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
        """What was saved with ``step``, and ``files``: ``bytes`` and ``sha256`` by name."""
        key = f"{_folder(step)}/{MANIFEST}"
        try:
            data = self._store.get(key)
        except MissingKeyError as error:
            known = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(
                f"{self.url} has no finished checkpoint of step {step}: there are {known}"
            ) from error
        try:
            manifest = json.loads(data)
            for file in manifest["files"].values():
                file["bytes"], file["sha256"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{join(self.url, key)} is damaged: {error}") from error
        return dict(manifest)

    def manifests(self) -> dict[int, dict[str, Any]]:
        """Every finished checkpoint's manifest, oldest first; damaged ones only give a warning."""

        def manifest(step: int) -> dict[str, Any] | None:
            try:
                return self.manifest(step)
            except CheckpointError as error:
                log.warning("checkpoint passed over step=%d: %s", step, error)
                return None

        steps = self.steps()
        found = zip(steps, _at_once(manifest, steps), strict=True)
        return {step: manifest for step, manifest in found if manifest is not None}

    def load(self, step: int) -> dict[str, bytes]:
        """Every file of ``step``, each byte checked. Raises CheckpointError for a damaged one."""
        files = self.manifest(step)["files"]
        contents = _at_once(lambda name: self._get(step, name, files), files)
        return dict(zip(files, contents, strict=True))

    def load_newest(self) -> tuple[int, dict[str, bytes]] | None:
        """The newest checkpoint that is intact; damaged ones are passed over with a warning.

        None if there is no checkpoint at all. Raises CheckpointError if all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return step, self.load(step)
            except CheckpointError as error:
                log.warning("checkpoint passed over step=%d: %s", step, error)
        if steps:
            raise CheckpointError(
                f"every checkpoint at {self.url} is damaged: delete it to restart"
            )
        return None

    def read(self, step: int, name: str) -> bytes:
        """One file of ``step``, each byte checked."""
        files = self.manifest(step)["files"]
        if name not in files:
            raise CheckpointError(f"step {step} has no {name}: it has {', '.join(sorted(files))}")
        return self._get(step, name, files)

    def verify(self, step: int) -> list[str]:
        """Read every byte; one line for each fault, none if all is as it was written."""
        try:
            files = self.manifest(step)["files"]
        except CheckpointError as error:
            return [str(error)]

        def fault(name: str) -> str | None:
            try:
                self._get(step, name, files)
            except CheckpointError as error:
                return str(error)
            return None

        strangers = self._folders().get(step, set()) - set(files) - {MANIFEST}
        return [
            *filter(None, _at_once(fault, files)),
            *(
                f"{join(self.url, _folder(step), name)} is not in the manifest"
                for name in sorted(strangers)
            ),
        ]

    def pull(self, step: int, to: Path) -> list[Path]:
        """Copy ``step`` into the folder ``to``, each byte checked; its manifest comes last.

        Files that are there already are not fetched again, so a pull that was cut short is
        finished by repeating it.
        """
        manifest = self.manifest(step)
        files = manifest["files"]
        to.mkdir(parents=True, exist_ok=True)
        (to / MANIFEST).unlink(missing_ok=True)  # ``to`` is not what it says until the end

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
        """Take ``step`` away; its manifest first, so half a checkpoint is never taken for one."""
        self._store.delete(f"{_folder(step)}/{MANIFEST}")
        for name in self._folders().get(step, set()) - {MANIFEST}:
            self._store.delete(f"{_folder(step)}/{name}")

    def prune(self) -> list[int]:
        """Delete what need not stay, also what was never finished; returns those steps.

        Only what is older than the newest finished one goes: a newer one is being written.
        """
        finished = self.steps()
        staying = set(finished[-self._keep :])
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
        self.delete(step)  # what a save that was cut short has left
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
            log.warning("checkpoint deleted step=%d: the run went on from before it", later)
            self.delete(later)
        self.prune()

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
            raise CheckpointError(self._damaged(step, name, "its sha256 is another"))
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
        f"{url} holds no finished checkpoint: give a run's folder, as in STORAGE/runs/NAME"
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
        raise CheckpointError(f"no checkpoint at {url} has a value of {best[0]} to be best by")
    return checkpoints, step


def pull_checkpoint(
    url: str, to: Path, which: CheckpointChoice, best: tuple[str, MetricMode]
) -> list[Path]:
    """Copy one checkpoint into the folder ``to``; see ``CheckpointStore.pull``."""
    checkpoints, step = choose_checkpoint(url, which, best)
    return checkpoints.pull(step, to)


def verify_checkpoints(url: str) -> dict[int, list[str]]:
    """The faults of every checkpoint at ``url``, by step; every byte is read."""
    checkpoints, only = find_checkpoints(url)
    steps = checkpoints.steps() if only is None else [only]
    return {step: checkpoints.verify(step) for step in steps}


def prune_checkpoints(url: str, *, keep: int, best: tuple[str, MetricMode]) -> list[int]:
    """Delete all but the newest ``keep`` and the best at ``url``; returns the steps that went."""
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
