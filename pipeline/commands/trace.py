"""Where a checkpoint came from: each link of the chain, checked as far as it can be reached."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cluster.storage import StorageError, join, open_store, without_password
from data_prep.manifest import read_parquet
from data_prep.shards import Dataset, ShardError
from pipeline.checkpoints import CheckpointStore
from pipeline.checkpoints.manifest import CheckpointManifest


@dataclass(frozen=True)
class Link:
    """One link of the chain; ``fault`` is empty unless it is known to be broken."""

    name: str
    value: str
    found: str = "not checked"
    fault: str = ""


def trace(checkpoints: CheckpointStore, manifest: CheckpointManifest) -> list[Link]:
    """Checkpoint, recipe, dataset, source images, detector, commit, MLflow run, Ray job."""
    return [
        _checkpoint(checkpoints, manifest),
        _config(manifest),
        *_dataset(checkpoints, manifest),
        _commit(manifest),
        _mlflow_run(manifest),
        _recorded("Ray submission", manifest.ray_submission),
    ]


def _checkpoint(checkpoints: CheckpointStore, manifest: CheckpointManifest) -> Link:
    faults = checkpoints.verify(manifest.step)
    size = f"{manifest.total_bytes / 1e6:.1f} MB"
    return Link(
        "checkpoint", f"step {manifest.step}, {size}", "every byte is whole", "; ".join(faults)
    )


def _config(manifest: CheckpointManifest) -> Link:
    link = _recorded("recipe", manifest.config_digest)
    if not manifest.config or not manifest.config_digest:
        return link
    tree = json.dumps(manifest.config, sort_keys=True)
    if hashlib.sha256(tree.encode()).hexdigest() != manifest.config_digest:
        return replace(link, fault="the settings in the manifest have another digest")
    return replace(link, found="the settings in the manifest have this digest")


def _dataset(checkpoints: CheckpointStore, manifest: CheckpointManifest) -> Iterator[Link]:
    link = _recorded("dataset", manifest.dataset_digest)
    images, detector = Link("source images", "manifest.parquet"), Link("detector", "unknown")
    try:
        dataset = _open_dataset(checkpoints, manifest)
        if dataset is None:
            link = replace(link, found="not reached: its dataset.json was not found on storage")
    except StorageError as error:
        dataset, link = None, replace(link, found=f"not reached: {error}")
    except ShardError as error:
        dataset, link = None, replace(link, fault=str(error))
    if dataset is None:
        yield link
        yield images
        yield detector
        return
    if dataset.digest != manifest.dataset_digest:
        yield replace(link, fault=f"{dataset.url} has digest {dataset.digest}")
    else:
        yield replace(link, found=f"{dataset.url} has this digest")
    entry = dataset.files.get("manifest.parquet", {})
    images = Link("source images", str(entry.get("sha256", "")) or "not recorded")
    try:
        data = dataset.store.get("manifest.parquet")
    except StorageError as error:
        yield replace(images, fault=str(error))
        yield detector
        return
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        yield replace(images, fault="manifest.parquet has another sha256")
        yield detector
        return
    table = read_parquet(data, ["detector", "detector_weights_sha256"])
    yield replace(images, found=f"manifest.parquet has this sha256, and {table.num_rows:,} images")
    pairs = sorted(
        {(row["detector"], row["detector_weights_sha256"]) for row in table.to_pylist()}
        - {(None, None)},
        key=str,
    )
    named = ", ".join(f"{name} {digest or 'without weights'}" for name, digest in pairs)
    yield Link("detector", named or "none", "recorded for every image")


def _open_dataset(checkpoints: CheckpointStore, manifest: CheckpointManifest) -> Dataset | None:
    """The dataset beside the run, or where the recipe says; None where neither has one.

    Raises ShardError for a damaged one, StorageError where storage does not answer.
    """
    name = manifest.config.get("data", {}).get("name", "")
    beside, _, run = checkpoints.url.partition("/runs/")
    places = [beside] if run else []
    places += [str(manifest.config["storage"])] if manifest.config.get("storage") else []
    for place in places if name else ():
        url = join(place, "datasets", str(name))
        if open_store(url).exists("dataset.json"):
            return Dataset.open(url)
    return None


def _commit(manifest: CheckpointManifest) -> Link:
    link = _recorded("git commit", manifest.git_commit)
    if not manifest.git_commit:
        return link
    command = ["git", "cat-file", "-e", f"{manifest.git_commit}^{{commit}}"]
    try:
        answer = subprocess.run(command, capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return link
    known = answer.returncode == 0
    return replace(link, found="in this checkout" if known else "not in this checkout")


def _mlflow_run(manifest: CheckpointManifest) -> Link:
    link = _recorded("MLflow run", manifest.mlflow_run)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or str(
        manifest.config.get("tracking", {}).get("uri") or ""
    )
    if not manifest.mlflow_run or not uri:
        return link
    from pipeline.tracking.mlflow import run_status  # takes seconds to import

    try:
        status = run_status(uri, manifest.mlflow_run)
    except ValueError as error:
        return replace(link, found=f"not reached: {error}")
    return replace(link, found=f"{status} at {without_password(uri)}")


def _recorded(name: str, value: str) -> Link:
    return Link(name, value or "not recorded", "recorded" if value else "")
