"""Checkpoints on storage: committed by their manifest, found by URL, fetched and verified."""

from pipeline.checkpoints.background_saves import LONGEST_WAIT_S, finish_saves
from pipeline.checkpoints.manifest import CheckpointError, CheckpointManifest
from pipeline.checkpoints.store import (
    BEST,
    CheckpointChoice,
    CheckpointStore,
    MetricMode,
    parse_best,
    refuse_other_model,
)

__all__ = [
    "BEST",
    "LONGEST_WAIT_S",
    "CheckpointChoice",
    "CheckpointError",
    "CheckpointManifest",
    "CheckpointStore",
    "MetricMode",
    "finish_saves",
    "parse_best",
    "refuse_other_model",
]
