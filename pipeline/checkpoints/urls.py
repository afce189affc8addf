"""Checkpoints by the URL that a person types: a storage, a run, one step, a pulled folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.storage import MissingKeyError, join, open_store
from cluster.storage.records import RecordError
from pipeline.checkpoints.manifest import (
    MANIFEST,
    CheckpointError,
    CheckpointManifest,
    parse_manifest,
)
from pipeline.checkpoints.store import (
    BEST,
    CheckpointChoice,
    CheckpointStore,
    MetricMode,
    best_of,
    step_folder,
)


@dataclass(frozen=True)
class CheckpointInfo:
    """One finished checkpoint, as a listing shows it."""

    step: int
    url: str
    saved: str
    """UTC, as 2026-01-31T12:00:00Z."""
    bytes: int
    metrics: Mapping[str, float]
    dataset_digest: str
    git_commit: str
    best: bool
    newest: bool


def is_mlflow_url(url: str) -> bool:
    """Whether ``url`` is one that MLflow resolves, as ``runs:/ID`` or ``models:/NAME@ALIAS``."""
    return re.match(r"(runs|models):/", url) is not None


def find_checkpoints(url: str, *, unfinished: bool = False) -> tuple[CheckpointStore, int | None]:
    """The checkpoints at ``url``: a run's folder, its ``checkpoints`` folder, one step's, or what
    ``pull`` left.

    The step is None unless ``url`` names one. ``unfinished``: what was never finished counts too.
    Raises CheckpointError where there are none, and
    StorageError for a URL with credentials in it.
    """
    parent, _, name = url.rstrip("/").rpartition("/")
    if (match := re.fullmatch(r"step-(\d+)", name)) and name == step_folder(int(match[1])):
        return CheckpointStore(open_store(parent or ".")), int(match[1])
    store = open_store(url)
    try:
        step = parse_manifest(store.get(MANIFEST)).step
    except MissingKeyError:
        pass
    except RecordError as error:
        raise CheckpointError(
            f"{join(url, MANIFEST)} is damaged: {error}; pull it again"
        ) from error
    else:
        return CheckpointStore(store, only=step), step
    for place in (url, join(url, "checkpoints")):
        checkpoints = CheckpointStore(open_store(place))
        if checkpoints.steps() or (unfinished and checkpoints.holds_any()):
            return checkpoints, None
    raise CheckpointError(
        f"{url} has no finished checkpoint: give the folder of a run, as in STORAGE/runs/NAME"
    )


def find_runs(url: str) -> dict[str, CheckpointStore]:
    """The runs with finished checkpoints in the storage at ``url``, by name."""
    names = {
        match[1]
        for key in open_store(url).list_keys("runs/")
        if (match := re.fullmatch(r"runs/([^/]+)/checkpoints/step-\d+/manifest\.json", key))
    }
    return {
        name: CheckpointStore(open_store(join(url, "runs", name, "checkpoints")))
        for name in sorted(names)
    }


def list_checkpoints(url: str) -> list[CheckpointInfo]:
    """Every finished checkpoint at ``url``, oldest first; those with a damaged manifest are not
    among them."""
    checkpoints, only = find_checkpoints(url)
    manifests = checkpoints.manifests() if only is None else {only: checkpoints.manifest(only)}
    return describe_checkpoints(checkpoints, manifests)


def describe_checkpoints(
    checkpoints: CheckpointStore, manifests: Mapping[int, CheckpointManifest]
) -> list[CheckpointInfo]:
    """How a listing shows ``manifests``, by step; the best one is by ``BEST``."""
    best, newest = best_of(manifests, *BEST), max(manifests, default=None)
    return [
        CheckpointInfo(
            step=step,
            url=join(checkpoints.url, checkpoints.folder(step)).rstrip("/"),
            saved=manifest.saved,
            bytes=manifest.total_bytes,
            metrics=manifest.metrics,
            dataset_digest=manifest.dataset_digest,
            git_commit=manifest.git_commit,
            best=step == best,
            newest=step == newest,
        )
        for step, manifest in sorted(manifests.items())
    ]


def open_checkpoint(
    url: str, which: CheckpointChoice, best: tuple[str, MetricMode]
) -> tuple[CheckpointStore, CheckpointManifest]:
    """``choose_checkpoint``, and the manifest; one request for an exact step of a run's folder."""
    if isinstance(which, int) and not re.search(r"/step-\d+/*$", url):
        folder = url.rstrip("/")
        place = folder if folder.endswith("/checkpoints") else join(folder, "checkpoints")
        checkpoints = CheckpointStore(open_store(place))
        if (found := checkpoints.find_manifest(which)) is not None:
            return checkpoints, found
    checkpoints, step = choose_checkpoint(url, which, best)
    return checkpoints, checkpoints.manifest(step)


def choose_checkpoint(
    url: str, which: CheckpointChoice, best: tuple[str, MetricMode]
) -> tuple[CheckpointStore, int]:
    """The checkpoint that ``which`` means at ``url``; a URL that names a step settles it."""
    checkpoints, step = find_checkpoints(url)
    if step is not None and isinstance(which, int) and which != step:
        raise CheckpointError(f"{url} is step {step}, and step {which} was asked for")
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
