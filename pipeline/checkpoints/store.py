"""Numbered checkpoints on storage: written in the background, finished by their manifest."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from cluster.storage import (
    MissingKeyError,
    StorageError,
    Store,
    join,
)
from cluster.storage.records import NewerReleaseError, RecordError, read_insisting, read_many
from models.options import ModelOptions
from pipeline.checkpoints.background_saves import LONGEST_WAIT_S, BackgroundSaves
from pipeline.checkpoints.manifest import (
    MANIFEST,
    PULLED,
    CheckpointError,
    CheckpointManifest,
    NewerCheckpointError,
    StoredFile,
    manifest_bytes,
    metrics_fault,
    parse_manifest,
)
from pipeline.config import stored_model_options

log = logging.getLogger(__name__)

TENSORS = ".safetensors"
SET_ASIDE = "manifest.set-aside.json"
TRANSFERS = 4  # files in transfer at the same time; large ones also go in parallel parts
MANIFESTS = 16  # small requests at the same time
SAVE_DEADLINE_S = 600.0
MetricMode = Literal["min", "max"]
CheckpointChoice = int | Literal["newest", "best"]
"""A step, or which one of a run's."""
BEST: tuple[str, MetricMode] = ("val/l1_percent", "min")
"""The metric by which a checkpoint is the best one of its run."""
S = TypeVar("S")
T = TypeVar("T")


class CheckpointStore:
    """The checkpoints of one run. A checkpoint exists only once its manifest does.

    Saving runs in the background, one checkpoint at a time. Of the finished ones the newest
    ``keep`` stay, the ``keep_best`` by the metric ``best`` such as ``("val/psnr_db", "max")``,
    those at multiples of ``every`` steps, and the newest healthy one: intact byte for byte, with
    finite tensors and metrics. One process may save, any number may read. What does not have its
    digest is read again over new connections before it counts as damaged.

    ``before_commit`` runs before a save removes what is left of an earlier one, before each
    manifest is written, and before retention; where it raises, what it precedes does not happen.
    ``after_commit`` gets the step of each checkpoint that was saved, in the thread that saves.

    ``only``: the store itself is this one checkpoint, as ``pull`` leaves it, and is not written.
    """

    def __init__(
        self,
        store: Store,
        *,
        keep: int = 3,
        best: tuple[str, MetricMode] | None = None,
        keep_best: int = 1,
        every: int | None = None,
        save_deadline_s: float = SAVE_DEADLINE_S,
        longest_wait_s: float = LONGEST_WAIT_S,
        before_commit: Callable[[], None] = lambda: None,
        after_commit: Callable[[int], None] = lambda step: None,
        only: int | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} checkpoints: keep at least the newest one")
        for name, value in (("keep_best", keep_best), ("every", every)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} should be at least 1")
        self._store, self._keep, self._best, self._every = store, keep, best, every
        self._keep_best = keep_best
        self._saves = BackgroundSaves(store.url, save_deadline_s, longest_wait_s)
        self._only = only
        self.before_commit, self._after_commit = before_commit, after_commit

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def store(self) -> Store:
        return self._store

    def save(
        self,
        step: int,
        files: Mapping[str, bytes] | Callable[[], Mapping[str, bytes]],
        *,
        manifest: Mapping[str, Any],
    ) -> None:
        """Write in the background; ``manifest`` is added to the names, sizes and digests.

        ``files``: names and contents, or what makes them, in the background as well. Returns at
        once, unless the previous save is still on its first attempt: then it waits for that, for
        ``longest_wait_s``. While storage is away, attempts are repeated until ``save_deadline_s``,
        or until the next save supersedes this one. Raises the failure of an earlier save, and
        CheckpointError where a metric in ``manifest`` is not finite. A tensor that is not finite
        raises CheckpointError later, as a failure does. None of these leaves a finished checkpoint.
        """
        if fault := metrics_fault(manifest.get("metrics", {})):
            raise CheckpointError(f"step {step} was not saved at {self.url}: {fault}")
        self._saves.submit(step, _Writing(self, step, files, dict(manifest)).attempt)

    def raise_failure(self) -> None:
        """Raise the failure of a save that has ended; returns at once otherwise."""
        self._saves.raise_failure()

    @property
    def safe_step(self) -> int | None:
        """The newest step that was loaded or saved here, and is whole on storage."""
        return self._saves.safe_step

    def wait(self) -> None:
        """Wait until every save is committed. Raises the failure of one."""
        self._saves.wait()

    def close(self) -> None:
        """Finish the last save. Raises its failure."""
        self._saves.close()

    def steps(self) -> list[int]:
        """Every finished checkpoint, oldest first."""
        return sorted(step for step, names in self._folders().items() if MANIFEST in names)

    def newest(self) -> int | None:
        return max(self.steps(), default=None)

    def newest_manifest(self) -> CheckpointManifest | None:
        """The newest manifest that is not damaged; others give a warning."""
        for step in reversed(self.steps()):
            if (manifest := self._manifest_or_none(step)) is not None:
                return manifest
        return None

    def best(self, metric: str, mode: MetricMode) -> int | None:
        """The step whose manifest has the best finite value; the later one of equals."""
        return best_of(self.manifests(), metric, mode)

    def manifest(self, step: int) -> CheckpointManifest:
        """The manifest of a finished checkpoint. Raises CheckpointError for a damaged one."""
        found = self.find_manifest(step)
        if found is None:
            known = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(
                f"{self.url} has no finished checkpoint of step {step}: it has {known}"
            )
        return found

    def find_manifest(self, step: int) -> CheckpointManifest | None:
        """``manifest``; None where ``step`` is not finished."""
        key = self.key(step, MANIFEST)
        try:
            return self._read_whole(key, lambda data: _manifest_of(step, data))
        except MissingKeyError:
            return None
        except NewerReleaseError as error:
            raise NewerCheckpointError(f"{join(self.url, key)}: {error}") from error

    def manifests(self) -> dict[int, CheckpointManifest]:
        """The manifest of every finished checkpoint, oldest first; damaged ones give a warning."""
        steps = self.steps()
        ready = read_many(self._store, [self.key(step, MANIFEST) for step in steps])

        def read(step: int) -> CheckpointManifest | None:
            with contextlib.suppress(KeyError, RecordError):
                return _manifest_of(step, ready[self.key(step, MANIFEST)])
            return self._manifest_or_none(step)

        found = zip(steps, _at_once(read, steps, MANIFESTS), strict=True)
        return {step: manifest for step, manifest in found if manifest is not None}

    def holds_any(self) -> bool:
        """Whether there is a checkpoint, finished or not."""
        return bool(self._folders())

    def load(self, step: int) -> dict[str, bytes]:
        """Every file of ``step``. Raises CheckpointError unless it is healthy, byte for byte."""
        manifest = self.manifest(step)
        files = manifest.files
        contents = dict(
            zip(files, _at_once(lambda n: self._get(step, n, files[n]), files), strict=True)
        )
        if fault := metrics_fault(manifest.metrics) or _tensors_fault(contents):
            raise CheckpointError(f"{join(self.url, self.folder(step))} is damaged: {fault}")
        return contents

    def load_newest(self) -> tuple[int, dict[str, bytes]] | None:
        """The newest healthy checkpoint; skips others with a warning.

        None if there is no checkpoint at all. Raises CheckpointError if all are damaged, or where
        a newer release wrote one.
        """
        steps, faults = self.steps(), []
        for step in reversed(steps):
            try:
                contents = self.load(step)
            except NewerCheckpointError:
                raise
            except CheckpointError as error:
                log.warning("checkpoint skipped step=%d: %s", step, error)
                faults.append(str(error))
            else:
                self._saves.safe_step = step
                return step, contents
        if steps:
            raise CheckpointError(
                f"every checkpoint at {self.url} is damaged, and all are left as they are: check "
                f"with `checkpoints verify`, or train under a new name; the newest: {faults[0]}"
            )
        return None

    def fault(self, step: int) -> str | None:
        """What a look at the manifest and at the sizes shows to be wrong; no file is read."""
        try:
            manifest = self.manifest(step)
            for name, file in manifest.files.items():
                size = self._existing(step, name, self._store.size)
                if size != file.bytes:
                    return self._damaged(step, name, f"{size} of {file.bytes} bytes")
        except CheckpointError as error:
            return str(error)
        return metrics_fault(manifest.metrics)

    def read(self, step: int, name: str) -> bytes:
        """One file of ``step``, each byte checked."""
        files = self.manifest(step).files
        if name not in files:
            raise CheckpointError(f"step {step} has no {name}: it has {', '.join(sorted(files))}")
        return self._get(step, name, files[name])

    def verify(self, step: int, advance: Callable[[int], None] = lambda size: None) -> list[str]:
        """Read every byte; one line for each fault, none for a healthy checkpoint.

        ``advance`` is called with the size of each file that was read, from several threads. In a
        folder of ``pull --weights-only``, only what was pulled is read.
        """
        try:
            manifest = self.manifest(step)
        except CheckpointError as error:
            return [str(error)]
        files, found = manifest.files, self._folders().get(step, set())
        expected = [name for name in files if PULLED not in found or name in found]

        def fault(name: str) -> str | None:
            try:
                return _tensors_fault({name: self._get(step, name, files[name])})
            except CheckpointError as error:
                return str(error)
            finally:
                advance(files[name].bytes)

        strangers = found - set(files) - {MANIFEST, PULLED}
        return [
            *filter(None, [*_at_once(fault, expected), metrics_fault(manifest.metrics)]),
            *(
                f"{join(self.url, self.key(step, name))} is not in the manifest"
                for name in sorted(strangers)
            ),
        ]

    def delete(self, step: int) -> None:
        """Delete ``step``, its manifest first: half a checkpoint never passes for a whole one."""
        self._store.delete(self.key(step, MANIFEST))
        for name in self._folders().get(step, set()) - {MANIFEST}:
            self._store.delete(self.key(step, name))

    def unfinished_newer(self) -> bool:
        """Whether something newer than every finished checkpoint lies here: a save that runs now,
        or that was cut short."""
        folders = self._folders()
        newest = max((s for s, names in folders.items() if MANIFEST in names), default=-1)
        return any(step > newest and SET_ASIDE not in names for step, names in folders.items())

    def plan_pruning(self, *, being_written: bool = True) -> Pruning:
        """What ``prune`` would delete, and why the others stay; nothing is deleted.

        ``being_written``: a save may be running, so what is newer than the newest finished
        checkpoint stays. Reads checkpoints, newest first, until one is healthy. Raises StorageError
        where one cannot be read at all.
        """
        for step in reversed(self.steps()):
            try:
                self.load(step)
            except CheckpointError as error:
                log.warning("checkpoint is not healthy step=%d: %s", step, error)
            else:
                return self._plan(step, being_written=being_written)
        return self._plan(None, being_written=being_written)

    def prune(self, *, being_written: bool = True) -> list[int]:
        """Delete what ``plan_pruning`` says; returns those steps.

        Where no checkpoint is healthy, all finished ones stay.
        """
        return self.apply(self.plan_pruning(being_written=being_written))

    def apply(self, pruning: Pruning) -> list[int]:
        """Delete what ``pruning`` says; returns those steps."""
        gone = sorted([*pruning.deleted, *pruning.orphans])
        for step in gone:
            self.delete(step)
        return gone

    def folder(self, step: int) -> str:
        """Of ``step``, below the store; empty where the store itself is the checkpoint."""
        return "" if self._only is not None else step_folder(step)

    def key(self, step: int, name: str) -> str:
        return f"{self.folder(step)}/{name}".lstrip("/")

    def _plan(self, healthy: int | None, *, being_written: bool = True) -> Pruning:
        folders = self._folders()
        finished = sorted(step for step, names in folders.items() if MANIFEST in names)
        manifests = self.manifests() if self._best else {}
        reasons: dict[int, list[str]] = {step: [] for step in finished}
        for step in finished[-self._keep :]:
            reasons[step].append("newest" if self._keep == 1 else f"newest {self._keep}")
        if self._best:
            for alike in _validated_alike(manifests):
                for best in ranked(alike, *self._best)[: self._keep_best]:
                    number = "" if self._keep_best == 1 else f" {self._keep_best}"
                    reasons[best].append(f"best{number} {self._best[0]}")
            for step in finished:
                if step not in manifests:  # it may have been the best one
                    reasons[step].append("its manifest cannot be read")
        if self._every:
            for step in finished:
                if step % self._every == 0:
                    reasons[step].append(f"every {self._every} steps")
        if healthy is None:
            for step in finished:
                reasons[step].append("no checkpoint is healthy")
        elif healthy in reasons:
            reasons[healthy].append("newest healthy")
        orphans: dict[int, str] = {}
        for step, names in sorted(folders.items()):
            newer = not finished or step > finished[-1]
            if MANIFEST in names:
                continue
            if SET_ASIDE in names and (newer or healthy is None):
                reasons[step] = ["set aside: it could not be read when the run resumed"]
            elif newer and being_written:
                reasons[step] = ["a save may be writing it"]
            else:
                orphans[step] = "set aside" if SET_ASIDE in names else "never finished"
        rules = [f"newest {self._keep}"]
        rules += [f"best {self._keep_best} {self._best[0]}"] if self._best else []
        rules += [f"every {self._every} steps"] if self._every else []
        return Pruning(
            kept={step: ", ".join(why) for step, why in sorted(reasons.items()) if why},
            deleted={
                step: f"not of the {', '.join(rules)}" for step, why in reasons.items() if not why
            },
            orphans=orphans,
            bytes={step: m.total_bytes for step, m in manifests.items()},
        )

    def _clean_up(self, step: int) -> None:
        """After ``step`` was committed: retire what need not stay. Failing here is no failure."""
        try:
            for later in (later for later in self.steps() if later > step):
                log.warning("checkpoint set aside step=%d: the run resumed from before it", later)
                self._set_aside(later)
            self.apply(self._plan(step))
        except (StorageError, CheckpointError) as error:
            log.warning("old checkpoints were not deleted: %s", error)

    def _set_aside(self, step: int) -> None:
        """Take ``step`` out of the finished ones and keep its files until it is saved again.

        It may be whole: the run passed over it because it could not be read.
        """
        self._store.put(self.key(step, SET_ASIDE), self._store.get(self.key(step, MANIFEST)))
        self._store.delete(self.key(step, MANIFEST))

    def _folders(self) -> dict[int, set[str]]:
        """The names in each step's folder, finished or not."""
        if self._only is not None:
            return {self._only: set(self._store.list_keys())}
        found: dict[int, set[str]] = {}
        for key in self._store.list_keys("step-"):
            if match := re.fullmatch(r"step-(\d+)/(.+)", key):
                found.setdefault(int(match[1]), set()).add(match[2])
        return found

    def _manifest_or_none(self, step: int) -> CheckpointManifest | None:
        try:
            return self.manifest(step)
        except CheckpointError as error:
            log.warning("checkpoint skipped step=%d: %s", step, error)
            return None

    def _get(self, step: int, name: str, file: StoredFile) -> bytes:
        def whole(data: bytes) -> bytes:
            if len(data) != file.bytes:
                raise RecordError(f"{len(data)} of {file.bytes} bytes")
            if hashlib.sha256(data).hexdigest() != file.sha256:
                raise RecordError("its sha256 differs")
            return data

        return self._existing(step, name, lambda key: self._read_whole(key, whole))

    def _read_whole(self, key: str, parse: Callable[[bytes], T]) -> T:
        """What ``parse`` makes of the value; after a RecordError it is read again.

        Raises CheckpointError where every reading fails.
        """
        try:
            return read_insisting(self._store, lambda store: parse(store.get(key)), key=key)
        except NewerReleaseError:
            raise
        except RecordError as error:
            raise CheckpointError(_damaged(join(self.url, key), str(error))) from error

    def _existing(self, step: int, name: str, use: Callable[[str], T]) -> T:
        try:
            return use(self.key(step, name))
        except MissingKeyError as error:
            raise CheckpointError(self._damaged(step, name, "it is missing")) from error

    def _damaged(self, step: int, name: str, reason: str) -> str:
        return _damaged(join(self.url, self.key(step, name)), reason)


class _Writing:
    """One save; an attempt continues where the one before it failed."""

    def __init__(
        self,
        checkpoints: CheckpointStore,
        step: int,
        files: Mapping[str, bytes] | Callable[[], Mapping[str, bytes]],
        more: dict[str, Any],
    ) -> None:
        self._checkpoints, self._step, self._more = checkpoints, step, more
        self._make: Callable[[], Mapping[str, bytes]] | None = (
            files if callable(files) else dict(files).copy
        )
        self._files: Mapping[str, bytes] = {}
        self._started = time.perf_counter()
        self._manifest: bytes | None = None
        self._cleared = False
        self._left: set[str] = set()

    def attempt(self) -> None:
        checkpoints, step, store = self._checkpoints, self._step, self._checkpoints.store
        if self._make is not None:
            self._files, self._make = self._make(), None  # what it made them from is free again
            self._left = set(self._files)
            if fault := _tensors_fault(self._files):
                raise CheckpointError(f"step {step} was not saved at {checkpoints.url}: {fault}")
        if not self._cleared:
            checkpoints.before_commit()  # who lost the run may delete nothing
            checkpoints.delete(step)  # leftovers of a save that was cut short
            self._cleared = True
        with ThreadPoolExecutor(1) as hashing:  # while the bytes travel
            described = None if self._manifest else hashing.submit(self._described)
            try:
                _at_once(self._put, sorted(self._left))
            finally:
                if described is not None:
                    self._manifest = described.result()
        assert self._manifest is not None
        checkpoints.before_commit()
        store.put(checkpoints.key(step, MANIFEST), self._manifest)  # last: this is the commit
        checkpoints._saves.safe_step = step  # also where storage hangs in what follows
        checkpoints._after_commit(step)
        log.info(
            "checkpoint saved step=%d seconds=%.1f megabytes=%.1f url=%s",
            step,
            time.perf_counter() - self._started,
            sum(map(len, self._files.values())) / 1e6,
            join(checkpoints.url, checkpoints.folder(step)),
        )
        checkpoints.before_commit()  # the put may have taken longer than the lease lives
        checkpoints._clean_up(step)

    def _put(self, name: str) -> None:
        key = self._checkpoints.key(self._step, name)
        self._checkpoints.store.put(key, self._files[name])
        self._left.remove(name)

    def _described(self) -> bytes:
        return manifest_bytes(
            {
                **self._more,
                "step": self._step,
                "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "files": {
                    name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                    for name, data in self._files.items()
                },
            }
        )


@dataclass(frozen=True)
class Pruning:
    """What stays and what goes."""

    kept: Mapping[int, str]
    """Steps that stay, with the reason."""
    deleted: Mapping[int, str]
    """Finished steps, with the reason."""
    orphans: Mapping[int, str]
    """Steps whose save was cut short, or set aside long ago."""
    bytes: Mapping[int, int] = field(repr=False)
    """Size of finished steps, as far as manifests were read."""


def parse_best(text: str) -> tuple[str, MetricMode]:
    """Metric and direction of ``val/psnr_db:max``. Raises CheckpointError."""
    metric, _, mode = text.rpartition(":")
    if not metric or mode not in ("min", "max"):
        raise CheckpointError(
            f"{text}: say also whether low or high is best, as in val/psnr_db:max or "
            "val/l1_percent:min"
        )
    return metric, "max" if mode == "max" else "min"


def best_of(
    manifests: Mapping[int, CheckpointManifest], metric: str, mode: MetricMode
) -> int | None:
    """The step with the best finite value of ``metric``; the later one of equals.

    Where a run was validated in several ways, the steps that were validated like the newest one
    compete.
    """
    if mode not in ("min", "max"):
        raise ValueError(f"mode {mode!r} is neither 'min' nor 'max'")
    for alike in reversed(_validated_alike(manifests)):
        if steps := ranked(alike, metric, mode):
            return steps[0]
    return None


def ranked(manifests: Mapping[int, CheckpointManifest], metric: str, mode: MetricMode) -> list[int]:
    """The steps that have ``metric``, the best first; of equals the later one.

    A step with any metric that is not finite is not healthy, so it is none of them: version 0.1
    wrote a PSNR of 100 beside an L1 of NaN.
    """
    sign = 1 if mode == "max" else -1
    values = {
        step: sign * manifest.metrics[metric]
        for step, manifest in manifests.items()
        if metric in manifest.metrics and manifest.metrics_fault is None
    }
    return sorted(values, key=lambda step: (values[step], step), reverse=True)


def _validated_alike(
    manifests: Mapping[int, CheckpointManifest],
) -> list[dict[int, CheckpointManifest]]:
    """The manifests whose metrics are comparable, together; those of the newest step last."""
    groups: list[dict[int, CheckpointManifest]] = []
    for step, manifest in sorted(manifests.items()):
        same = [g for g in groups if next(iter(g.values())).validation == manifest.validation]
        group = same[0] if same else {}
        groups = [other for other in groups if other is not group]
        groups.append({**group, step: manifest})
    return groups


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


def refuse_other_model(run: str, manifest: CheckpointManifest, model: ModelOptions) -> None:
    """A run keeps its model: CheckpointError where a checkpoint's ``manifest`` has another."""
    saved = vars(stored_model_options(manifest.config.get("model", {})))
    differing = [name for name, value in vars(model).items() if saved[name] != value]
    if differing:
        raise CheckpointError(
            f"run {run} at step {manifest.step} has another model "
            f"({', '.join(differing)} differ): give the recipe a new name, or the old settings back"
        )


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def _manifest_of(step: int, data: bytes) -> CheckpointManifest:
    manifest = parse_manifest(data)
    if manifest.step != step:
        raise RecordError(f"it describes step {manifest.step}")
    return manifest


def _damaged(url: str, reason: str) -> str:
    return f"{url} is damaged: {reason}; use another step"


def _at_once(action: Callable[[S], T], items: Iterable[S], threads: int = TRANSFERS) -> list[T]:
    """``action`` on every item, a few at the same time; the results in order."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(action, items))
