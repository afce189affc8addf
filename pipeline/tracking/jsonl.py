"""Tracking without a tracker: a file of JSON lines in the run's folder."""

import json
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from cluster.storage import Store
from data_prep.images import encode_png
from pipeline.tracking.protocol import FinishOnExit

JSONL = "tracking/metrics.jsonl"
WRITE_EVERY_S = 10.0


class JsonLinesTracker(FinishOnExit):
    """``tracking/metrics.jsonl`` in the run's folder: a line for each step, and one for the status.

    Images become ``tracking/<key>-<step>.png``.
    """

    run_id = None

    def __init__(self, store: Store, resume_from_step: int) -> None:
        self._store = store
        self._lines: dict[int, dict[str, float]] = {}
        if store.exists(JSONL):
            for line in store.get(JSONL).splitlines():
                values = json.loads(line)
                # Steps after the checkpoint are run, and recorded, again.
                if "step" in values and values["step"] <= resume_from_step:
                    self._lines[values.pop("step")] = values
        self._written_at = time.monotonic()

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._lines.setdefault(step, {}).update(values)
        if time.monotonic() - self._written_at > WRITE_EVERY_S:
            self._write()

    def log_image(self, key: str, step: int, pixels: np.ndarray) -> None:
        self._store.put(f"tracking/{key}-{step:08d}.png", encode_png(pixels))

    def _close(self) -> None:
        self._write({"status": self._status})

    def _write(self, *last: Mapping[str, Any]) -> None:
        lines = [{"step": step, **values} for step, values in sorted(self._lines.items())]
        text = "".join(json.dumps(line) + "\n" for line in [*lines, *last])
        self._store.put(JSONL, text.encode())
        self._written_at = time.monotonic()
