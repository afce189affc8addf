"""Metrics and images of a run: in its folder on storage, and on MLflow."""

from pipeline.tracking.history import LastLogged, last_logged
from pipeline.tracking.opening import (
    open_run_tracker,
    open_tracker,
    open_training_tracker,
    refuse_early,
)
from pipeline.tracking.protocol import RunInfo, Tracker

__all__ = [
    "LastLogged",
    "RunInfo",
    "Tracker",
    "last_logged",
    "open_run_tracker",
    "open_tracker",
    "open_training_tracker",
    "refuse_early",
]
