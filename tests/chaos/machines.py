"""Seeded failures of a machine and of the network: two Ray nodes with addresses of their own.

In half of the scenarios the number of ranks follows the machines. After each change the losses have
to be those of one plain process that resumes from the same checkpoint. In the others two ranks do
a whole job, which has to end as a job that was left alone on one machine: bit-equal under DDP, else
with losses within the tolerance.
"""

from __future__ import annotations

import abc
import functools
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from pipeline import config
from pipeline.arguments.common import DONE, STOPPED
from pipeline.checkpoints import CheckpointStore
from pipeline.fork import fork_checkpoint
from pipeline.run_storage import RunStorage
from pipeline.tracking.history import read_history
from pipeline.train import train
from tests.chaos import training
from tests.chaos.namespaces import Machines, two_machines
from tests.chaos.namespaces import why_not as why_not
from tests.chaos.outcome import CONTINUED, Outcome, crash_as_broken
from tests.chaos.quick import silent
from tests.small_dataset import FIXTURE, unpack_dataset

PACKAGES = ("torch", "deepspeed", "ray")
PATIENCE_S = 400.0  # for each thing that is waited for, on a computer that may be busy
SAVE_EVERY = 5
COMPARED = 5  # steps after each change of the number of ranks
RESIZED_OFTEN = """
import sys
from cluster import ray_train
from pipeline.cli import main
ray_train.RESIZE_S = 3.0
sys.exit(main())
"""
Engine = Literal["ddp", "deepspeed"]


class BrokenError(Exception):
    """A promise was not held, and the scenario ends with it."""


class LeftAlone:
    """The undisturbed job, run when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @functools.cached_property
    def job(self) -> training.LeftAlone:
        training.preload()
        self._folder.mkdir(exist_ok=True)
        return training.LeftAlone(self._folder)


class Scenario(abc.ABC):
    """Two machines, a driver on the first, and what happens to them."""

    def __init__(self, engine: Engine, seed: int, folder: Path, alone: LeftAlone) -> None:
        self.engine, self.rng, self.folder, self.alone = engine, random.Random(seed), folder, alone
        self.broken: list[str] = []
        self.log, self.storage = folder / "log", folder / "storage"
        self._driver: subprocess.Popen[bytes] | None = None

    @property
    @abc.abstractmethod
    def name(self) -> str: ...

    @abc.abstractmethod
    def prepare(self) -> None:
        """Before the machines start."""

    @abc.abstractmethod
    def play(self, machines: Machines) -> None:
        """Start the driver, and do to the machines what this scenario is about."""

    @abc.abstractmethod
    def compare(self) -> None:
        """Look at what is left on storage."""

    @property
    @abc.abstractmethod
    def checkpoints(self) -> CheckpointStore: ...

    def run(self) -> None:
        self.folder.mkdir()
        self.prepare()
        try:
            with two_machines(self.log) as machines:
                self.play(machines)
        except BrokenError as error:
            self.broken.append(f"{error}: {self.log.read_text(errors='replace')[-4000:]}")
            return
        for step in self.checkpoints.steps():
            if (fault := self.checkpoints.fault(step)) is not None:
                self.broken.append(f"a committed checkpoint is damaged: {fault}")
        self.compare()

    def drive(self, machines: Machines, *command: str) -> None:
        self._driver = machines.drive([sys.executable, *command])

    def until(self, condition: Callable[[], bool], what: str) -> None:
        assert self._driver is not None
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if self._driver.poll() is not None:
                raise BrokenError(f"the run ended before {what}")
            if time.monotonic() > deadline:
                raise BrokenError(f"{what} did not come")
            time.sleep(0.05)

    def end(self, expected: int) -> None:
        """Wait for the driver's exit code."""
        assert self._driver is not None
        try:
            code = self._driver.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise BrokenError("the run did not end") from None
        if code != expected:
            raise BrokenError(f"the run ended with {code}")

    def near(self, losses: Mapping[str, float], others: Mapping[str, float], step: int) -> None:
        """Promise that the losses of a step are those of the other run."""
        for name, value in losses.items():
            apart = abs(value - others[name]) / max(abs(others[name]), 1)
            if not apart <= training.TOLERANCE:
                self.broken.append(f"{name} differs by {apart:.1e} at step {step}")


class Resized(Scenario):
    """``train.workers=[1, 2]``: one machine is cut off, and another one may come."""

    another = False

    @property
    def name(self) -> str:
        return f"{self.engine}, one of two machines is cut off"

    def prepare(self) -> None:
        unpack_dataset(self.folder)

    def _settings(self, *more: str) -> list[str]:
        common = [f"storage={self.storage}", "model.width=8", "train.size_px=32"]
        common += [f"train.save_every_steps={SAVE_EVERY}", "train.keep_checkpoints=1000"]
        return [*common, "train.device=cpu", "evaluate.samples_while_training=1", *more]

    def _opened(self, *more: str) -> tuple[config.Config, RunStorage]:
        cfg = config.load(FIXTURE / "recipe.yaml", self._settings(*more))
        return cfg, RunStorage.open(cfg)

    @property
    def checkpoints(self) -> CheckpointStore:
        return CheckpointStore(self._opened()[1].checkpoints)

    @property
    def _world_sizes(self) -> list[int]:
        files = sorted((self.storage / "runs/before/metrics").glob("*.json"))
        return [int(json.loads(path.read_text())["world_size"]) for path in files]

    def _trained(self, ranks: list[int]) -> None:
        """Wait for a checkpoint of an attempt with as many ranks as the last of these."""
        many = f"with {ranks[-1]} rank{'s' * (ranks[-1] > 1)}"
        self.until(lambda: self._world_sizes == ranks, f"a start {many}")
        before = self.checkpoints.newest() or 0
        self.until(lambda: (self.checkpoints.newest() or 0) > before, f"a checkpoint {many}")
        time.sleep(self.rng.uniform(0, 1))

    def play(self, machines: Machines) -> None:
        more = [f"train.engine={self.engine}", "train.launcher=ray", "train.workers=[1, 2]"]
        words = ["train", str(FIXTURE / "recipe.yaml"), *self._settings(*more)]
        self.drive(machines, "-c", RESIZED_OFTEN, *words, "train.steps=100000")
        ranks = [2]
        self._trained(ranks)
        machines.cut()
        ranks.append(1)
        self._trained(ranks)
        if self.another:
            machines.restart()
            ranks.append(2)
            self._trained(ranks)
        assert self._driver is not None
        self._driver.send_signal(signal.SIGTERM)
        self.end(STOPPED)

    def compare(self) -> None:
        _, storage = self._opened()
        history = read_history(storage.run)
        begun = [attempt.info.resume_from_step for attempt in history.attempts]
        if begun != sorted(begun) or 0 in begun[1:]:
            self.broken.append(f"attempts resumed from steps {begun}")
        found = losses_of(storage)
        if [*found] != [*range(1, len(found) + 1)]:
            self.broken.append(f"metrics of steps {[*found]} are kept, from {begun}")
        for step in begun:
            others = self._plain(storage, step)
            for number in range(step + 1, step + COMPARED + 1):
                self.near(found[number], others[number], number)

    def _plain(self, storage: RunStorage, step: int) -> dict[int, dict[str, float]]:
        """The losses of one plain process that resumes from a checkpoint of the run."""
        more = [f"name=from-{step}", f"train.steps={step + COMPARED}", "train.launcher=local"]
        cfg, plain = self._opened(*more)
        if step:
            fork_checkpoint(CheckpointStore(storage.checkpoints), storage.run_url, step, plain)
        train(cfg, plain)
        return losses_of(plain)


class Replaced(Resized):
    another = True

    @property
    def name(self) -> str:
        return f"{super().name}, and another one joins"


class WholeJob(Scenario):
    """Two ranks prepare, train and evaluate over a slow cable."""

    @property
    def name(self) -> str:
        return f"{self.engine}, a whole job over a slow cable"

    @property
    def checkpoints(self) -> CheckpointStore:
        return CheckpointStore(self._opened()[1].checkpoints)

    @property
    def _words(self) -> list[str]:
        more = [f"train.engine={self.engine}", "train.launcher=ray", "train.workers=2"]
        images = self.alone.job.images
        return training.words_of("run", images, self.storage, *more, "train.device=cpu")

    def _opened(self) -> tuple[config.Config, RunStorage]:
        cfg = config.load(Path(training.RECIPE), self._words[2:])
        return cfg, RunStorage.open(cfg)

    def prepare(self) -> None:
        _ = self.alone.job  # takes its time, with no Ray beside it

    def play(self, machines: Machines) -> None:
        machines.slow_down(self.rng.choice([50, 100, 200]))
        self.drive(machines, "-m", "pipeline", *self._words)
        self.end(DONE)

    def compare(self) -> None:
        job, (_, storage) = self.alone.job, self._opened()
        if training.digest(self.storage) != job.digest:
            self.broken.append("the dataset has another digest")
        found = losses_of(storage)
        if found.keys() != job.losses.keys():
            self.broken.append(f"steps {[*found]} were logged")
        for step, losses in found.items():
            self.near(losses, job.losses[step], step)
        if self.engine == "ddp" and training.weights(self.storage) != job.weights:
            self.broken.append("the weights differ")
        if self.engine == "ddp" and training.evaluation(self.storage) != job.evaluation:
            self.broken.append("the evaluation differs")


class ComesBack(WholeJob):
    """Always two ranks: they wait for the machine that was cut off."""

    @property
    def name(self) -> str:
        return f"{super().name}, one machine is cut off and comes back"

    def play(self, machines: Machines) -> None:
        machines.slow_down(100)
        self.drive(machines, "-m", "pipeline", *self._words)
        self.until(lambda: bool(self.checkpoints.steps()), "a checkpoint")
        time.sleep(self.rng.uniform(0, 3))
        machines.cut()
        time.sleep(self.rng.uniform(0, 10))
        machines.restart()
        self.end(DONE)


SCENARIOS: tuple[tuple[type[Scenario], Engine], ...] = (
    (Resized, "ddp"),
    (Resized, "deepspeed"),
    (Replaced, "ddp"),
    (Replaced, "deepspeed"),
    (WholeJob, "ddp"),
    (WholeJob, "deepspeed"),
    (ComesBack, "ddp"),
    (ComesBack, "deepspeed"),
)
"""In turn, by seed."""
SEEDS = len(SCENARIOS)


def outcomes(seeds: Iterable[int]) -> Iterator[Outcome]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = LeftAlone(folder / "alone")
        for seed in seeds:
            started = time.perf_counter()
            kind, engine = SCENARIOS[seed % len(SCENARIOS)]
            scenario = kind(engine, seed, folder / f"seed-{seed}", alone)
            with silent("pipeline"), crash_as_broken(scenario.broken):
                scenario.run()
            seconds = time.perf_counter() - started
            yield Outcome(seed, scenario.name, CONTINUED, tuple(scenario.broken), seconds)
            shutil.rmtree(scenario.folder)


def losses_of(storage: RunStorage) -> dict[int, dict[str, float]]:
    """The losses that were logged at each step, without the adversarial one."""
    found: dict[int, dict[str, float]] = {}
    for name, curve in read_history(storage.run).curves.items():
        if name.startswith("loss/l1") or name == "loss/discriminator":
            for step, value in zip(curve.steps, curve.values, strict=True):
                found.setdefault(int(step), {})[name] = float(value)
    return dict(sorted(found.items()))
