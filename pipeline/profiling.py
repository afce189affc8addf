"""A trace of some steps by torch's profiler, kept with the run."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

log = logging.getLogger(__name__)

FOLDER = "profile"


class StepProfiler:
    """Profiles the steps from ``first`` to ``last`` of a run and hands the trace to ``keep``.

    ``keep`` gets its name and the bytes of a gzipped Chrome trace. A run that is resumed within
    these steps is profiled from there; after them, not at all.
    """

    def __init__(self, first: int, last: int, keep: Callable[[str, bytes], None]) -> None:
        self._first, self._last, self._keep = first, last, keep
        self._profile: torch.profiler.profile | None = None
        self._began = self._reached = 0

    def before(self, step: int) -> None:
        """Call it before ``step``, counted from 1."""
        if self._profile is None and self._first <= step <= self._last:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.start()
            self._began = step

    def after(self, step: int) -> None:
        """Call it after ``step``."""
        self._reached = step
        if step >= self._last:
            self.close()

    def close(self) -> None:
        """Keep what there is, also where the run ends within the steps."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profile.stop()
        name = f"{FOLDER}/steps-{self._began:08d}-{self._reached:08d}.json.gz"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json.gz")
            profile.export_chrome_trace(str(path))
            self._keep(name, path.read_bytes())
        log.info("profiled steps=%d-%d file=%s", self._began, self._reached, name)
