"""Run seeded scenarios in which machines, storage and processes fail.

    python -m tests.chaos [storage|training|machines] [--seeds N] [--first-seed S] [--out FILE]

Each program leaves ``results/<name>.json``, with the versions and every scenario. The exit code is
1 where one of them broke a promise; its seed alone repeats it.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.timing import cpu_name
from tests.chaos.outcome import CONTINUED, Outcome

RESULTS = Path(__file__).parent / "results"
PROGRAMS = ("storage", "training", "machines")
"""Modules of this package. Each has ``SEEDS``, how many seeds its long form has; ``PACKAGES``,
whose versions matter; and ``outcomes(seeds)``, which runs a scenario for each seed. It may have
``why_not()``: what keeps this computer from running it, or None."""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Seeded failures.")
    parser.add_argument("program", nargs="*", metavar="PROGRAM", help=f"of {', '.join(PROGRAMS)}")
    parser.add_argument("--seeds", type=int, help="how many; by default what a program says")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the result of one program, instead of results/")
    arguments = parser.parse_args(words)
    names = arguments.program or list(PROGRAMS)
    if unknown := sorted({*names} - {*PROGRAMS}):
        parser.error(f"unknown program {unknown[0]}: choose from {', '.join(PROGRAMS)}")
    if arguments.out and len(names) > 1:
        parser.error("--out takes the result of one program: name it")
    held = True
    for name in names:
        out = arguments.out or RESULTS / f"{name}.json"
        held = run(name, arguments.first_seed, arguments.seeds, out) and held
    return 0 if held else 1


def run(name: str, first_seed: int, count: int | None, out: Path) -> bool:
    """Run one program and write its result to ``out``; whether every promise was held."""
    program = importlib.import_module(f"tests.chaos.{name}")
    if hasattr(program, "why_not") and (reason := program.why_not()) is not None:
        print(f"{name}: skipped, {reason}")
        return True
    seeds = range(first_seed, first_seed + (program.SEEDS if count is None else count))
    started, cpu_before = time.perf_counter(), _cpu_s()
    outcomes: list[Outcome] = []
    try:
        for outcome in program.outcomes(seeds):
            outcomes.append(outcome)
            print(
                f"{name} seed {outcome.seed}, {outcome.scenario}: {outcome.ended}"
                f" ({outcome.seconds:.1f} s)",
                *(f"\n  BROKEN: {promise}" for promise in outcome.broken),
                flush=True,
            )
    finally:  # after Ctrl-C too
        seconds = time.perf_counter() - started
        record = {
            "program": name,
            "device": cpu_name(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "versions": {package: version(package) for package in program.PACKAGES},
            **summary(outcomes),
            "seconds": round(seconds),
            "cpu_seconds": round(_cpu_s() - cpu_before),
            "scenarios": [
                {
                    "seed": outcome.seed,
                    "scenario": outcome.scenario,
                    "ended": outcome.ended,
                    **({"broken": outcome.broken} if outcome.broken else {}),
                }
                for outcome in outcomes
            ],
        }
        if outcomes:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, indent=1) + "\n")
    broken = [outcome.seed for outcome in outcomes if outcome.broken]
    print(
        f"{name}: {len(outcomes)} scenarios in {seconds:.0f} s, {len(broken)} broke a promise"
        + (f": seeds {', '.join(map(str, broken))}" if broken else "")
    )
    return not broken


def summary(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many scenarios ended in which way."""
    ways = Counter(
        "broken" if o.broken else "continued" if o.ended == CONTINUED else "stopped"
        for o in outcomes
    )
    return {
        "count": len(outcomes),
        **{way: ways[way] for way in ("continued", "stopped", "broken")},
    }


def _cpu_s() -> float:
    """CPU seconds of this process and of those that it started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    sys.exit(main())
