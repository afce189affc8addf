"""Metrics and images of a run: to MLflow, to a JSON-lines file, or to nobody."""

from pipeline.tracking.opening import open_run_tracker, open_tracker, open_training_tracker
from pipeline.tracking.protocol import RunInfo, Tracker

__all__ = ["RunInfo", "Tracker", "open_run_tracker", "open_tracker", "open_training_tracker"]
