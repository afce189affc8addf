"""What the manifest of a checkpoint says, each value of the kind that it should be."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.storage.records import RecordError, seal, typed, unseal

MANIFEST = "manifest.json"
PULLED = "pulled.json"
FORMAT_VERSION = 2  # 1: without format_version and record_sha256


class CheckpointError(RuntimeError):
    """A checkpoint is missing, incomplete, damaged or not finite; the message names it."""


class NewerCheckpointError(CheckpointError):
    """A newer release wrote the checkpoint, which is whole."""


@dataclass(frozen=True)
class StoredFile:
    """Size and content of one file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class CheckpointManifest:
    """The manifest of one finished checkpoint."""

    step: int
    saved: str
    """UTC, as 2026-01-31T12:00:00Z."""
    files: Mapping[str, StoredFile]
    metrics: Mapping[str, float]
    validation: Mapping[str, Any]
    """Masks, seed, size and number of the images behind ``metrics``; empty in older ones."""
    dataset_digest: str
    config: Mapping[str, Any]
    """The recipe of the run, without passwords; empty where the writer left it out."""
    config_digest: str
    mlflow_run: str
    git_commit: str
    ray_submission: str
    data: bytes
    """As it lies on storage."""

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files.values())

    @property
    def metrics_fault(self) -> str | None:
        """The first metric that is not finite, in words."""
        return metrics_fault(self.metrics)

    def record(self) -> dict[str, Any]:
        """Every value, named as on storage."""
        return unseal(self.data, version=FORMAT_VERSION)


def parse_manifest(data: bytes) -> CheckpointManifest:
    """Raises RecordError, which says what is wrong, also for names that lead out of a folder."""
    record = unseal(data, version=FORMAT_VERSION)
    files = {}
    for name, entry in typed(record, "files", dict).items():
        if not re.fullmatch(r"\w[\w.+-]*", name, re.ASCII) or name in (MANIFEST, PULLED):
            raise RecordError(f"files has {name[:60]!r}, which is not a plain file name")
        if not isinstance(entry, dict):
            raise RecordError(f"files has no size and sha256 for {name}")
        file = StoredFile(typed(entry, "bytes", int), typed(entry, "sha256", str))
        if file.bytes < 0 or not re.fullmatch(r"[0-9a-f]{64}", file.sha256):
            raise RecordError(f"files has an impossible size or sha256 for {name}")
        files[name] = file
    metrics = typed(record, "metrics", dict, {})
    config = typed(record, "config", dict, {})
    return CheckpointManifest(
        step=typed(record, "step", int),
        saved=typed(record, "saved", str, ""),
        files=files,
        metrics={name: typed(metrics, name, float) for name in metrics},
        validation=typed(record, "validation", dict, {}),
        dataset_digest=typed(record, "dataset_digest", str, ""),
        config=config,
        config_digest=typed(record, "config_digest", str, ""),
        mlflow_run=str(record.get("mlflow_run") or ""),
        git_commit=typed(record, "git_commit", str, ""),
        ray_submission=typed(record, "ray_submission", str, ""),
        data=data,
    )


def manifest_bytes(record: Mapping[str, Any]) -> bytes:
    """The manifest that holds ``record``, with its digest and the version of its format."""
    return seal(record, version=FORMAT_VERSION)


def metrics_fault(metrics: Mapping[str, Any]) -> str | None:
    """The first metric that is not finite, in words."""
    for name, value in metrics.items():
        if not (isinstance(value, int | float) and math.isfinite(value)):
            return f"its metric {name} is {value}"
    return None
