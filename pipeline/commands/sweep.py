"""``python -m pipeline sweep``: one run for each combination of settings, and one comparison."""

import itertools
import logging
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from cluster.storage import join
from pipeline import config
from pipeline.commands.compare import compare_runs
from pipeline.commands.tables import wide_console
from pipeline.run_storage import RunStorage
from pipeline.tracking.opening import finish_sweep

log = logging.getLogger(__name__)

DONE, MISTAKE, STOPPED = 0, 1, 3
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
    at_once: int = 1,
    pack: str | None = None,
    out: Path | None = None,
) -> int:
    """Prepare, train and evaluate every combination, then compare all; returns an exit code.

    Finished children are skipped, and an interrupted one resumes. A child that fails does not
    keep the others from running. ``pack``: evaluation pack to measure and compare on.
    """
    if at_once < 1:
        raise ValueError(f"--at-once {at_once} should be at least 1")
    children = plan_sweep(recipe, overrides)
    commands = {child.cfg.name: list(_commands(recipe, child, pack)) for child in children}
    log.info("sweep of %d runs: %s", len(children), ", ".join(commands))
    codes = _Children(commands, at_once).run()
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
    yield [*ours, "run", str(recipe), *child.overrides]
    if pack is not None:
        yield [*ours, "evaluate", str(recipe), *child.overrides, "--pack", pack]


class _Children:
    """Processes of the children, a few at a time; a signal to stop reaches all of them."""

    def __init__(self, commands: dict[str, list[list[str]]], at_once: int) -> None:
        self._waiting = list(commands.items())
        self._at_once = at_once
        self._running: dict[str, tuple[subprocess.Popen[bytes], list[list[str]]]] = {}
        self._codes: dict[str, int] = {}
        self._stopping = False

    def run(self) -> dict[str, int]:
        """Exit codes by name; after a signal, of those that had started."""
        before = {
            number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            while self._running or (self._waiting and not self._stopping):
                while self._waiting and len(self._running) < self._at_once and not self._stopping:
                    self._start(*self._waiting.pop(0))
                for name, (process, rest) in list(self._running.items()):
                    if (code := process.poll()) is not None:
                        del self._running[name]
                        if code == 0 and rest and not self._stopping:
                            self._start(name, rest)
                        else:
                            self._codes[name] = STOPPED if code == 0 and rest else code
                time.sleep(0.1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._codes

    def _start(self, name: str, commands: list[list[str]]) -> None:
        log.info("sweep: %s %s", commands[0][3], name)
        # In a separate session: Ctrl-C reaches it once, from here.
        process = subprocess.Popen(commands[0], start_new_session=True)
        self._running[name] = process, commands[1:]

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        for process, _ in list(self._running.values()):
            process.send_signal(signal.SIGTERM)
