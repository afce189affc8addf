"""Tracking without MLflow: images as files in the run's folder.

Metrics need no tracker: ``pipeline.tracking.history`` keeps them whatever the backend.
"""

import logging
import threading
from collections.abc import Mapping
from queue import SimpleQueue

import numpy as np

from cluster.storage import StorageError, Store
from data_prep.images import encode_png
from pipeline.tracking.protocol import FinishOnExit

log = logging.getLogger(__name__)

WAITING = 8  # images in memory, where storage does not answer
CLOSE_S = 20.0  # that the end of a run waits for them


class ImageFileTracker(FinishOnExit):
    """Writes images to ``tracking/<key>-<step>.png`` in the run's folder, from its own thread.

    So storage that hangs keeps no rank waiting for the first one.
    """

    run_id = None

    def __init__(self, store: Store) -> None:
        self._store = store
        self._images = SimpleQueue[tuple[str, bytes] | None]()
        self._thread: threading.Thread | None = None

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def log_checkpoint(self, step: int, url: str, values: Mapping[str, float]) -> None: ...

    def log_pack(self, name: str, url: str, digest: str) -> None: ...

    def log_artifact(self, name: str, data: bytes) -> None: ...

    def log_tag(self, name: str, text: str) -> None: ...

    def log_image(self, key: str, step: int, pixels: np.ndarray) -> None:
        name = f"tracking/{key}-{step:08d}.png"
        if self._images.qsize() >= WAITING:
            log.warning("tracking: %s was not written: storage does not answer", name)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="images", daemon=True)
            self._thread.start()
        self._images.put((name, encode_png(pixels)))

    def _close(self) -> None:
        if self._thread is None:
            return
        self._images.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.warning("tracking: the last images are not on storage url=%s", self._store.url)

    def _work(self) -> None:
        while (image := self._images.get()) is not None:
            try:
                self._store.put(*image)
            except StorageError as error:  # no failure of a tracker may stop training
                log.warning("tracking: %s was not written: %s", image[0], error)
