"""What a tracker offers, and what it has to know about a run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Protocol, Self

import numpy as np

Point = tuple[int, int, float]
"""Step, milliseconds since 1970, value."""
Status = Literal["FINISHED", "FAILED", "KILLED"]
"""MLflow's terminal statuses of a run."""


@dataclass(frozen=True)
class RunInfo:
    """A run without its metrics and images."""

    name: str
    url: str
    """The run's folder on storage; it identifies a resumed run."""
    params: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
    config_yaml: str = ""
    dataset_name: str = ""
    dataset_url: str = ""
    dataset_digest: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    """What to filter runs by."""
    note: str = ""
    """Markdown for the page of the run."""
    parent: str = ""
    """Folder of the sweep that the run is part of."""
    code_diff: str = ""
    """What the checkout has beyond its commit."""
    recorded: Callable[[], Mapping[str, Sequence[Point]]] = dict
    """Every metric's values that the run keeps on storage."""
    training: bool = True
    """Whether this start trains; others add to the run without counting as an attempt."""


class Tracker(Protocol):
    """Records a run without delaying training and without making it fail.

    As a context manager it finishes the run: FAILED on an error, KILLED on an interruption, else
    with the status given to ``finish``, by default FINISHED.
    """

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until it is known, and without MLflow."""

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record a value for each name at ``step``; steps recorded before are not repeated."""

    def log_checkpoint(self, step: int, url: str, values: Mapping[str, float]) -> None:
        """Record the checkpoint of ``step`` at ``url``, and its metrics as ``log_metrics`` does."""

    def log_image(self, key: str, step: int, pixels: np.ndarray) -> None:
        """Record an (H, W, 3) uint8 RGB image."""

    def log_pack(self, name: str, url: str, digest: str) -> None:
        """Record the evaluation pack at ``url`` as an input of the run, beside its dataset."""

    def log_artifact(self, name: str, data: bytes) -> None:
        """Record a file; ``name`` is its path among those of the run."""

    def log_tag(self, name: str, text: str) -> None:
        """Record what people should read on the page of the run."""

    def flush(self) -> None:
        """Write the metrics so far to the run's folder; waits some seconds at most."""

    def finish(self, status: Status) -> None:
        """Set the status with which the run finishes at the end of the block."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class FinishOnExit:
    """The context manager that all trackers share; with nothing to write in the run's folder."""

    _status: Status = "FINISHED"

    def flush(self) -> None: ...

    def finish(self, status: Status) -> None:
        self._status = status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            self._status = "KILLED"
        elif error is not None:
            self._status = "FAILED"
        self._close()

    def _close(self) -> None:
        """Deliver what is left."""


class NullTracker(FinishOnExit):
    """Records nothing."""

    run_id = None

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def log_checkpoint(self, step: int, url: str, values: Mapping[str, float]) -> None: ...

    def log_image(self, key: str, step: int, pixels: np.ndarray) -> None: ...

    def log_pack(self, name: str, url: str, digest: str) -> None: ...

    def log_artifact(self, name: str, data: bytes) -> None: ...

    def log_tag(self, name: str, text: str) -> None: ...
