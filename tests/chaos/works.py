"""What a scenario does to storage: each leaves everything whole, whatever goes wrong meanwhile."""

from __future__ import annotations

import abc
import contextlib
import functools
import io
import random
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save as save_tensors

from cluster.storage import Store, join, open_store
from data_prep.build import SerialScheduler
from data_prep.shards import Dataset, RawSample, read_samples, verify
from pipeline import lease
from pipeline.checkpoints import CheckpointStore
from pipeline.checkpoints.pull import pull
from pipeline.cli import main
from pipeline.data.shard_cache import ShardCache
from tests.data_prep.settings import build

BEFORE = (10, 20)  # finished before anything goes wrong
NEXT = 30
BIG = 6 * 2**20  # bytes of a file that goes to S3 in parts


@dataclass(frozen=True)
class Place:
    """Where a scenario happens: an empty URL, a folder of this machine, and its chances."""

    url: str
    folder: Path
    rng: random.Random
    album: Path
    """The images of datasets."""
    big: bool = False
    """Whether checkpoints hold a file of ``BIG`` bytes."""


@functools.cache
def files_of(step: int, big: bool = False) -> Mapping[str, bytes]:
    """The files of a checkpoint; equal steps have equal bytes."""
    rng = np.random.default_rng(step)
    files = {
        "ema.safetensors": save_tensors({"kernel": rng.random(3000, dtype=np.float32)}),
        "optimizer.safetensors": save_tensors({"moments": rng.random(9000, dtype=np.float32)}),
        "state.json": b'{"step": %d}' % step,
    }
    return files | ({"more.bin": rng.bytes(BIG)} if big else {})


class Work(abc.ABC):
    """One thing that people do; ``place`` is as it was before, or as trouble left it."""

    def __init__(self, place: Place) -> None:
        self.place = place

    @abc.abstractmethod
    def prepare(self) -> None:
        """What is there before."""

    @abc.abstractmethod
    def run(self) -> None:
        """The work, while something goes wrong; it may stop."""

    def repeat(self) -> None:
        """The same once all is well, which ends."""
        self.run()

    @abc.abstractmethod
    def broken(self) -> Iterator[str]:
        """Promises that were not held, once it was repeated."""


class OnCheckpoints(Work):
    """What every work on the checkpoints of a run begins with, and must leave."""

    @property
    def run_url(self) -> str:
        return join(self.place.url, "runs", "one")

    @contextlib.contextmanager
    def opened(self, deadline_s: float = 10.0) -> Iterator[CheckpointStore]:
        """The checkpoints as a trainer has them, which holds the run's lease."""
        run = open_store(self.run_url)
        with lease.held(run, job="", job_has_ended=lambda job: False) as held:
            checkpoints = CheckpointStore(
                open_store(join(self.run_url, "checkpoints")),
                keep=2,
                best=("val/l1_percent", "min"),
                save_deadline_s=deadline_s,
                before_commit=held.check,
            )
            yield checkpoints
            checkpoints.close()

    def read(self) -> CheckpointStore:
        return CheckpointStore(open_store(join(self.run_url, "checkpoints")), keep=2)

    def save(self, checkpoints: CheckpointStore, step: int) -> None:
        metrics = {"val/l1_percent": 100.0 / step}
        files = files_of(step, self.place.big)
        checkpoints.save(step, files, manifest={"metrics": metrics})

    def prepare(self) -> None:
        with self.opened() as checkpoints:
            for step in BEFORE:
                self.save(checkpoints, step)

    def broken(self) -> Iterator[str]:
        checkpoints = self.read()
        for step in checkpoints.steps():
            if faults := checkpoints.verify(step):
                yield f"step {step} is listed and torn: {faults[0]}"
        newest = checkpoints.load_newest()
        if newest is None or newest[0] < BEFORE[-1]:
            yield f"the newest whole checkpoint is gone: {newest and newest[0]} is left"
        elif newest[1] != files_of(newest[0], self.place.big):
            yield f"step {newest[0]} loads with other bytes than were saved"
        prune = ["checkpoints", "prune", self.run_url, "--keep", "2", "--yes"]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = main(prune)
        if code:
            yield f"prune ended with {code}: {printed.getvalue()}"
        named = {
            checkpoints.key(step, name)
            for step, manifest in checkpoints.manifests().items()
            for name in (*manifest.files, "manifest.json")
        }
        if orphans := set(checkpoints.store.list_keys()) - named:
            yield f"prune left {', '.join(sorted(orphans))}"
        yield from _unfinished(open_store(self.place.url))


class Save(OnCheckpoints):
    def run(self) -> None:
        with self.opened(self.place.rng.choice([0.3, 10.0])) as checkpoints:
            self.save(checkpoints, NEXT)

    def repeat(self) -> None:
        with self.opened() as checkpoints:
            self.save(checkpoints, NEXT)


class Resume(OnCheckpoints):
    def run(self) -> None:
        with self.opened() as checkpoints:
            open_store(self.run_url).clear_unfinished()
            found = checkpoints.load_newest()
            assert found is not None, "it started afresh"
            assert found[1] == files_of(found[0], self.place.big), "it resumed from torn bytes"
            for step in range(found[0] + 10, NEXT + 20, 10):
                self.save(checkpoints, step)


class Pull(OnCheckpoints):
    @property
    def out(self) -> Path:
        return self.place.folder / "pulled"

    def run(self) -> None:
        pull(self.read(), BEFORE[-1], self.out)

    def broken(self) -> Iterator[str]:
        found = {path.name: path.read_bytes() for path in self.out.iterdir()}
        found.pop("manifest.json", None)
        if found != files_of(BEFORE[-1], self.place.big):
            yield "what was pulled differs from what was saved"
        others = {path.name for path in self.place.folder.iterdir()} - {"pulled", "storage"}
        if others := {name for name in others if not name.startswith("credentials")}:
            yield f"pull left {', '.join(sorted(others))}"
        yield from super().broken()


class Verify(OnCheckpoints):
    def run(self) -> None:
        checkpoints = self.read()
        for step in checkpoints.steps():
            checkpoints.verify(step)

    def repeat(self) -> None:
        checkpoints = self.read()
        faults = [fault for step in checkpoints.steps() for fault in checkpoints.verify(step)]
        assert not faults, faults[0]


class Prune(OnCheckpoints):
    def run(self) -> None:
        CheckpointStore(self.read().store, keep=1).prune()


class WriteDataset(Work):
    """Builds a dataset from a folder of images, as `prepare` does, in this process."""

    @property
    def url(self) -> str:
        return join(self.place.url, "datasets", "small")

    def prepare(self) -> None:
        pass

    def run(self) -> None:
        build_album(self.url, self.place.album)

    def broken(self) -> Iterator[str]:
        whole = Dataset.open(str(reference(self.place.album)))
        found = Dataset.open(self.url)
        if found.digest != whole.digest:
            yield "the dataset has another digest than one that was left alone"
        yield from verify(found)
        if strangers := set(found.store.list_keys()) - set(whole.store.list_keys()):
            yield f"the build left {', '.join(sorted(strangers))}"
        yield from _unfinished(open_store(self.place.url))


class ReadDataset(Work):
    """Reads every sample as training does, through the cache of this machine."""

    @property
    def url(self) -> str:
        return join(self.place.url, "datasets", "small")

    def prepare(self) -> None:
        source = open_store(str(reference(self.place.album)))
        target = open_store(self.url)
        for key in sorted(source.list_keys(), key=lambda key: key == "dataset.json"):
            target.put(key, source.get(key))

    def run(self) -> None:
        assert self.samples() == samples_of(reference(self.place.album)), "torn samples were read"

    def samples(self) -> list[RawSample]:
        dataset = Dataset.open(self.url)
        cache = ShardCache(dataset, cache=self.place.folder / "cache")
        try:
            opened = cache.open(dataset.index)
            return [
                RawSample(sample.key, *map(bytes, (sample.jpg, sample.sketch, sample.meta)))
                for shard in dataset.index
                for sample in opened[shard.name].result().samples
            ]
        finally:
            cache.close()

    def broken(self) -> Iterator[str]:
        yield from verify(Dataset.open(self.url))


WORKS: Mapping[str, type[Work]] = {
    "save": Save,
    "resume": Resume,
    "pull": Pull,
    "verify": Verify,
    "prune": Prune,
    "write dataset": WriteDataset,
    "read dataset": ReadDataset,
}


def _unfinished(store: Store) -> Iterator[str]:
    """Files and uploads that killed writers left and that nobody would ever remove."""
    if count := store.clear_unfinished(abandoned_s=0):
        keys = store.list_keys()
        if store.local_path() is not None or count > 2:
            yield f"{count} unfinished files or uploads were left beside {len(keys)} keys"


def make_album(folder: Path) -> Path:
    """A few small images that differ."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(coarse).resize((72, 64)).save(folder / f"{number}.png")
    return folder


def build_album(url: str, album: Path) -> Dataset:
    """No face is found in the album, which is quick; HED has its own tests."""
    return build(
        url,
        name="small",
        source="folder",
        root=str(album),
        subject="face",
        stored_px=64,
        shard_samples=4,
        val_fraction=0.25,
        scheduler=SerialScheduler(),
    )


@functools.cache
def reference(album: Path) -> Path:
    """The dataset of ``album`` that was left alone."""
    folder = Path(tempfile.mkdtemp(dir=album.parent)) / "small"
    build_album(str(folder), album)
    return folder


@functools.cache
def samples_of(folder: Path) -> list[RawSample]:
    dataset = Dataset.open(str(folder))
    return [sample for shard in dataset.index for sample in read_samples(folder / shard.name)]
