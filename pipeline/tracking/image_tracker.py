"""Tracking without MLflow: images as files in the run's folder.

Metrics need no tracker: ``pipeline.tracking.history`` keeps them whatever the backend.
"""

from collections.abc import Mapping

import numpy as np

from cluster.storage import Store
from data_prep.images import encode_png
from pipeline.background_files import BackgroundFiles
from pipeline.tracking.protocol import FinishOnExit


class ImageFileTracker(FinishOnExit):
    """Writes images to ``tracking/<key>-<step>.png`` in the run's folder."""

    run_id = None

    def __init__(self, store: Store) -> None:
        self._files = BackgroundFiles(store)

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def log_checkpoint(self, step: int, url: str, values: Mapping[str, float]) -> None: ...

    def log_pack(self, name: str, url: str, digest: str) -> None: ...

    def log_artifact(self, name: str, data: bytes) -> None: ...

    def log_tag(self, name: str, text: str) -> None: ...

    def log_image(self, key: str, step: int, pixels: np.ndarray) -> None:
        self._files.put(f"tracking/{key}-{step:08d}.png", encode_png(pixels))

    def _close(self) -> None:
        self._files.close()
