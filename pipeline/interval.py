"""Losses and bad steps since the last report: on the device until they are read."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline import ranks as distributed
from pipeline.rank_health import OwnTime
from pipeline.state import Position
from pipeline.step import FAULTS, StepResult


@dataclass(frozen=True)
class BadStep:
    """A step that changed nothing, because something in it was not finite."""

    position: Position
    """After the step."""
    keys: tuple[str, ...]
    """The samples of the batch: this rank's, or all."""
    faults: tuple[str, ...]
    """Which of ``pipeline.step.FAULTS``; the first one came first."""


@dataclass(frozen=True)
class IntervalValues:
    """What :meth:`Interval.read` found."""

    means: dict[str, float]
    """Each loss, averaged over the good steps that have it and over ranks."""
    bad: list[BadStep]
    in_a_row: int
    """The longest run of bad steps, with those that came right before the interval."""
    forward_ms: float = 0.0
    """Of this rank's own pass through the generator, the mean of the last steps."""


class Interval:
    """Gathers the results of steps without waiting for the device.

    ``weight`` is that of this rank's losses, see ``Ranks.weight``.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self._weight = weight
        self._steps: list[tuple[Position, tuple[str, ...]]] = []
        self._names: list[frozenset[str]] = []
        self._faults: list[Tensor] = []
        self._sums: dict[str, Tensor] = {}
        self._streak = 0
        self._own_time = OwnTime()

    def add(self, position: Position, keys: tuple[str, ...], result: StepResult) -> None:
        """``position`` is the one after the step, ``keys`` are those of this rank's batch."""
        self._steps.append((position, keys))
        self._names.append(frozenset(result.losses))
        self._faults.append(result.faults)
        self._own_time.add(result.forward)
        good = result.bad == 0
        for name, value in result.losses.items():
            counted = torch.where(good, value, 0.0)
            self._sums[name] = self._sums[name] + counted if name in self._sums else counted

    def read(self, device: torch.device) -> IntervalValues:
        """What was gathered since the last call; waits for the device. Collective."""
        sums = distributed.mean(self._sums, device, weight=self._weight)
        bad, longest = [], self._streak
        good: Counter[str] = Counter()
        for (position, keys), names, flags in zip(
            self._steps, self._names, torch.stack(self._faults).tolist(), strict=True
        ):
            faults = tuple(name for name, flag in zip(FAULTS, flags, strict=True) if flag)
            self._streak = self._streak + 1 if faults else 0
            longest = max(longest, self._streak)
            if faults:
                bad.append(BadStep(position, keys, faults))
            else:
                good.update(names)
        means = {name: value / good[name] for name, value in sums.items() if good[name]}
        self._steps, self._names, self._faults, self._sums = [], [], [], {}
        return IntervalValues(means, bad, longest, self._own_time.read_ms())
