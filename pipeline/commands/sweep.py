"""``python -m pipeline sweep``: one run for each combination of settings, and one comparison."""

import itertools
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.session import connect
from cluster.storage import join
from pipeline import config
from pipeline.commands.compare import compare_runs
from pipeline.commands.tables import wide_console
from pipeline.run import prepare
from pipeline.run_storage import RunStorage
from pipeline.stop_request import SignalStop
from pipeline.tracking.opening import finish_sweep

if TYPE_CHECKING:
    from cluster.ray_commands import Room

log = logging.getLogger(__name__)

DONE, MISTAKE, STOPPED = 0, 1, 3
BUSY_S = 3600.0
"""How long a child waits for places that other children hold."""
SHAPING = ("data.", "sketch.")
"""Settings that make another dataset."""


@dataclass(frozen=True)
class SweepChild:
    """One combination."""

    cfg: config.Config
    overrides: Sequence[str]


def sweep(
    recipe: Path,
    overrides: Sequence[str],
    *,
    at_once: int | None = None,
    pack: str | None = None,
    out: Path | None = None,
) -> int:
    """Prepare, train and evaluate every combination, then compare all; returns an exit code.

    Children are Ray tasks, as many at a time as the cluster has room for and ``at_once`` at most.
    Finished children are skipped, and an interrupted one resumes. A child that fails does not
    keep the others from running. ``pack``: evaluation pack to measure and compare on.
    """
    if at_once is not None and at_once < 1:
        raise ValueError(f"--at-once {at_once} should be at least 1")
    children = plan_sweep(recipe, overrides)
    with connect():
        _prepare_once(children)
        codes = _run_children(recipe, children, at_once, pack)
    if STOPPED in codes.values() or len(codes) < len(children):
        finish_sweep(children[0].cfg, "KILLED")
        print("stopped: run the same command to resume", file=sys.stderr)
        return STOPPED
    failed = [name for name, code in codes.items() if code]
    finish_sweep(children[0].cfg, "FAILED" if failed else "FINISHED")
    urls = [
        RunStorage.open(child.cfg).run_url for child in children if child.cfg.name not in failed
    ]
    if len(urls) > 1:
        console = wide_console()
        for part in compare_runs(urls, pack=pack and pack.rstrip("/").rpartition("/")[2], out=out):
            console.print(part)
    if failed:
        print(f"failed: {', '.join(failed)}: run the same command to try again", file=sys.stderr)
    return MISTAKE if failed else DONE


def _prepare_once(children: Sequence[SweepChild]) -> None:
    """Make the datasets before the children take the CPUs of the cluster."""
    for _, child in {child.cfg.data.name: child for child in children}.items():
        prepare(child.cfg, RunStorage.open(child.cfg))


def _run_children(
    recipe: Path, children: Sequence[SweepChild], at_once: int | None, pack: str | None
) -> dict[str, int]:
    """Exit codes by name; after a request to stop, of those that had started."""
    from cluster.ray_commands import run_commands  # needs a connected cluster

    commands = {child.cfg.name: list(_commands(recipe, child, pack)) for child in children}
    log.info("sweep of %d runs: %s", len(children), ", ".join(commands))
    first, room = children[0].cfg, _room([child.cfg for child in children])
    if room.workers and room.fits():
        # Another child may measure on the GPUs that this one is about to train on.
        for lines in commands.values():
            lines[0].append(f"cluster.wait_s={max(BUSY_S, first.cluster.wait_s):.0f}")
    with SignalStop().listening() as stop:
        return run_commands(
            commands,
            room,
            owner=join(first.storage, "sweeps", first.name),
            most=at_once,
            stop=lambda: stop.requested,
            started=lambda name: log.info("sweep: run %s", name),
        )


def _room(configs: Sequence[config.Config]) -> "Room":
    """What a child takes: the most that any of them takes."""
    from cluster.ray_commands import Room, has_gpus

    gpus = any(
        cfg.train.device == "cuda" or (cfg.train.device == "auto" and has_gpus()) for cfg in configs
    )
    if all(cfg.train.launcher == "local" for cfg in configs):
        return Room("GPU" if gpus else "CPU")
    wanted = [cfg.train.workers if cfg.train.launcher == "ray" else 1 for cfg in configs]
    numbers = [
        workers[1] if isinstance(workers, tuple) else workers
        for workers in wanted
        if workers != "auto"
    ]
    return Room("GPU" if gpus else "CPU", "auto" if len(numbers) < len(wanted) else max(numbers))


def plan_sweep(recipe: Path, overrides: Sequence[str]) -> list[SweepChild]:
    """Every combination, checked as a recipe, in the order in which values were typed.

    Raises ConfigError for a combination that does not fit, ValueError where nothing varies.
    """
    axes: list[tuple[str, list[str]]] = []
    fixed: list[str] = []
    for override in overrides:
        name, _, text = override.partition("=")
        values = split_values(text)
        if len(values) > 1:
            axes.append((name, values))
        else:
            fixed.append(override)
    if not axes:
        raise ValueError("nothing varies: give at least one setting as key=a,b")
    base = config.load(recipe, fixed)
    parent = join(base.storage, "sweeps", base.name)
    children = []
    for combination in itertools.product(*(values for _, values in axes)):
        chosen = dict(zip((name for name, _ in axes), combination, strict=True))
        changes = [f"{name}={value}" for name, value in chosen.items()]
        changes += [f"name={_named(base.name, chosen)}", f"tracking.parent={parent}"]
        data = {n: v for n, v in chosen.items() if n.startswith(SHAPING) or n == "seed"}
        if data and "data.name" not in chosen:
            changes.append(f"data.name={_named(base.data.name, data)}")
        children.append(SweepChild(config.load(recipe, [*fixed, *changes]), [*fixed, *changes]))
    names = [child.cfg.name for child in children]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two combinations would be called {twice[0]}: give each value once")
    return children


def split_values(text: str) -> list[str]:
    """The values between commas, except those inside brackets, braces or quotes."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in ")}]":
            depth -= 1
        if letter == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += letter
    return [value.strip() for value in values]


def _named(base: str, chosen: dict[str, str]) -> str:
    """A name that says what differs."""
    parts = [f"{name.rpartition('.')[2]}-{value}" for name, value in chosen.items()]
    words = (re.sub(r"[^A-Za-z0-9_]+", "-", part).strip("-") for part in parts)
    return "-".join([base, *words])


def _commands(recipe: Path, child: SweepChild, pack: str | None) -> Iterator[list[str]]:
    ours = [sys.executable, "-m", "pipeline"]
    # Ranks started by Ray measure on its GPUs too; the others need no cluster, which `run` starts.
    stages = ["run"] if child.cfg.train.launcher == "ray" else ["train", "evaluate"]
    for stage in stages:
        yield [*ours, stage, str(recipe), *child.overrides]
    if pack is not None:
        yield [*ours, "evaluate", str(recipe), *child.overrides, "--pack", pack]
