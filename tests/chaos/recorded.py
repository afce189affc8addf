"""The product's command line; every rank also writes samples and losses of its steps to a file.

    python -m tests.chaos.recorded FOLDER COMMAND ...

FOLDER takes one file per process, and an empty one while that process validates.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline import ranks
from pipeline.cli import main
from pipeline.evaluation.evaluator import Evaluation
from pipeline.interval import Interval
from pipeline.loop import TrainingLoop
from pipeline.state import Position
from pipeline.step import StepResult
from pipeline.stop_request import StopRequest


@dataclass(frozen=True)
class Step:
    """What one rank did at one step."""

    step: int
    rank: int
    world: int
    keys: list[str]
    losses: dict[str, float]


def record(folder: Path) -> None:
    """Append a line to a file in ``folder`` for each step of this process from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    add, validate = Interval.add, TrainingLoop._validate
    validating = folder / f"{os.getpid()}.validating"

    def recorded(
        interval: Interval, position: Position, keys: tuple[str, ...], result: StepResult
    ) -> None:
        place = ranks.current()
        line = {
            "step": position.step,
            "rank": place.rank,
            "world": place.world_size,
            "keys": keys,
            "losses": {name: float(value) for name, value in result.losses.items()},
        }
        with (folder / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        add(interval, position, keys, result)

    def noted(loop: TrainingLoop, stop: StopRequest) -> Evaluation | None:
        validating.touch()
        try:
            return validate(loop, stop)
        finally:
            validating.unlink()

    setattr(Interval, "add", recorded)  # noqa: B010
    setattr(TrainingLoop, "_validate", noted)  # noqa: B010


def read(folder: Path) -> list[Step]:
    """Every line in ``folder``, without those that a kill cut short."""
    return [
        Step(**json.loads(line))
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


def validates(folder: Path) -> bool:
    """Whether a rank is at the held-out images before a save, or was killed there."""
    return any(folder.glob("*.validating"))


if __name__ == "__main__":
    record(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
