"""Metrics and images of a run: in its folder on storage, and on MLflow."""

from pipeline.tracking.opening import (
    open_run_tracker,
    open_tracker,
    open_training_tracker,
    refuse_early,
)
from pipeline.tracking.protocol import RunInfo, Tracker

__all__ = [
    "RunInfo",
    "Tracker",
    "open_run_tracker",
    "open_tracker",
    "open_training_tracker",
    "refuse_early",
]
