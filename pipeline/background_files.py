"""Small files of a run, written beside training."""

import logging
import threading
from queue import SimpleQueue

from cluster.storage import StorageError, Store

log = logging.getLogger(__name__)

WAITING = 8  # files in memory, where storage does not answer
CLOSE_S = 20.0  # that the end of a run waits for them


class BackgroundFiles:
    """Writes files to ``store`` in order, from its own thread.

    So storage that fails or hangs neither ends a run nor holds the rank that the others wait for.
    What cannot be written is named in the log.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._files = SimpleQueue[tuple[str, bytes] | None]()
        self._thread: threading.Thread | None = None

    def put(self, name: str, data: bytes) -> None:
        """Write ``data`` soon; returns at once."""
        if self._files.qsize() >= WAITING:
            log.warning("%s was not written: storage does not answer", name)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="files", daemon=True)
            self._thread.start()
        self._files.put((name, data))

    def close(self) -> None:
        """Wait for what is left, for at most ``CLOSE_S``."""
        if self._thread is None:
            return
        self._files.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.warning("the last files of the run are not on storage url=%s", self._store.url)

    def _work(self) -> None:
        while (file := self._files.get()) is not None:
            try:
                self._store.put(*file)
            except StorageError as error:
                log.warning("%s was not written: %s", file[0], error)
