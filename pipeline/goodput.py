"""Where the wall time of a run goes, by the clock of the host: nothing waits for a device."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeAlias, TypeVar

T = TypeVar("T")

Phase: TypeAlias = Literal["training", "data", "saving", "validation", "restart", "compilation"]
PHASES: tuple[Phase, ...] = (
    "training",
    "data",
    "saving",
    "validation",
    "restart",
    "compilation",
)
"""``data``: waiting for it. ``restart``: everything before the first step of an attempt, since the
stage was launched, or since the last progress of an attempt that was lost. ``compilation``: the
first step of an attempt, where it compiles. What the device still does when a phase ends counts to
the next."""
HOURS = "speed/hours_"


class WallTime:
    """Seconds in each phase over all attempts of a run, as one rank sees them.

    Every second belongs to one phase, so the phases add up to the whole. ``hours`` are those of
    earlier attempts, ``before_s`` what has passed since the last of them was lost, or since the
    launch.
    """

    def __init__(
        self,
        hours: Mapping[str, float] | None = None,
        before_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = {phase: 3600 * (hours or {}).get(phase, 0.0) for phase in PHASES}
        self._seconds["restart"] += before_s
        self._clock, self._since = clock, clock()
        self._phase: Phase = "restart"
        self._last = dict(self._seconds)

    def enter(self, phase: Phase) -> None:
        """What comes now belongs to ``phase``."""
        now = self._clock()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    @contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """The block belongs to ``phase``, what follows to the phase from before."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def waiting(self, batches: Iterator[T], *, compiles: bool) -> Iterator[T]:
        """Yield from ``batches``; what follows is training, or first compilation."""
        first = True
        while True:
            if first:  # the loader starts
                batch = next(batches)
            else:
                with self.within("data"):
                    batch = next(batches)
            self.enter("compilation" if first and compiles else "training")
            first = False
            yield batch

    def seconds(self) -> dict[Phase, float]:
        self.enter(self._phase)
        return dict(self._seconds)

    def speeds(self, steps: int, global_batch: int) -> dict[str, float]:
        """Metrics of the ``steps`` since the last call, without saving, and hours of the run."""
        seconds = self.seconds()
        since = {phase: value - self._last[phase] for phase, value in seconds.items()}
        self._last = seconds
        stepping_s = max(since["training"] + since["data"] + since["compilation"], 1e-9)
        return {
            "speed/steps_per_s": steps / stepping_s,
            "speed/images_per_s": steps * global_batch / stepping_s,
            "speed/data_wait_ms": 1000 * since["data"] / max(steps, 1),
            **self.hours(),
        }

    def hours(self) -> dict[str, float]:
        """Hours of each phase, and the percentage of all that was training."""
        seconds = self.seconds()
        hours = {f"{HOURS}{phase}": value / 3600 for phase, value in seconds.items()}
        whole = max(sum(seconds.values()), 1e-9)
        return hours | {"speed/goodput_percent": 100 * seconds["training"] / whole}

    def summary(self) -> str:
        """Every phase's share for the log, the largest first."""
        seconds = self.seconds()
        whole = max(sum(seconds.values()), 1e-9)
        shares = sorted(seconds.items(), key=lambda item: -item[1])
        fields = " ".join(f"{phase}={100 * value / whole:.1f}%" for phase, value in shares)
        return f"hours={whole / 3600:.3f} {fields}"
