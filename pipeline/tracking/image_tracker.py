"""Tracking without MLflow: images as files in the run's folder.

Metrics need no tracker: ``pipeline.tracking.history`` keeps them whatever the backend.
"""

import logging
from collections.abc import Mapping

import numpy as np

from cluster.storage import StorageError, Store
from data_prep.images import encode_png
from pipeline.tracking.protocol import FinishOnExit

log = logging.getLogger(__name__)


class ImageFileTracker(FinishOnExit):
    """Writes images to ``tracking/<key>-<step>.png`` in the run's folder."""

    run_id = None

    def __init__(self, store: Store) -> None:
        self._store = store

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def log_checkpoint(self, step: int, url: str, values: Mapping[str, float]) -> None: ...

    def log_pack(self, name: str, url: str, digest: str) -> None: ...

    def log_artifact(self, name: str, data: bytes) -> None: ...

    def log_tag(self, name: str, text: str) -> None: ...

    def log_image(self, key: str, step: int, pixels: np.ndarray) -> None:
        try:
            self._store.put(f"tracking/{key}-{step:08d}.png", encode_png(pixels))
        except StorageError as error:  # no failure of a tracker may stop training
            log.warning("tracking: the image %s at step %d was not written: %s", key, step, error)
