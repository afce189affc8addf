"""The product's command line; every rank also writes samples and losses of its steps to a file.

    python -m tests.chaos.recorded FOLDER COMMAND ...

FOLDER takes one file per process.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline import ranks
from pipeline.cli import main
from pipeline.interval import Interval
from pipeline.state import Position
from pipeline.step import StepResult


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
    add = Interval.add

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

    setattr(Interval, "add", recorded)  # noqa: B010


def read(folder: Path) -> list[Step]:
    """Every line in ``folder``, without those that a kill cut short."""
    return [
        Step(**json.loads(line))
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


if __name__ == "__main__":
    record(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
