"""The build of a dataset: keep finished shards, make the others, then write the catalog."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import UInt8

from cluster.storage import MIB, Store, one_line, open_store
from data_prep.duplicates import COLUMNS, find_duplicates
from data_prep.files import SourceImage
from data_prep.manifest import (
    ShardRecord,
    count,
    publish,
    read_record,
    read_rows,
    record_key,
    rows_key,
)
from data_prep.samples import ImageBatch, SampleSettings
from data_prep.settings import (
    BuildOptions,
    DataSettings,
    HedDevice,
    SketchSettings,
    requested_record,
    shaping_record,
)
from data_prep.shard_job import EdgeFinder, ReportShard, ShardJob, make_shard, no_report
from data_prep.shards import Dataset, ShardError, Split, plan, shard_name
from data_prep.sources import DATA_SOURCES, list_images

log = logging.getLogger(__name__)

ImageProgress = Callable[[int, int, int], None]
"""Called with the number of images done, of all images, and of those that failed."""


DEFAULT_OPTIONS = BuildOptions()
SPLITS: tuple[Split, ...] = ("train", "val")


class Scheduler(Protocol):
    """Where shards are made."""

    def gpus(self) -> int: ...

    def run_shards(
        self, jobs: Sequence[ShardJob], report: ReportShard
    ) -> Generator[ShardRecord, None, None]:
        """Make every shard, giving each record once it is finished; closing this cancels the rest.

        All jobs have the same settings. ``report`` is called as images are done, every second or
        so.
        """


class SerialScheduler:
    """Makes one shard after another in this process, with edges on the CPU."""

    def gpus(self) -> int:
        return 0

    def run_shards(
        self, jobs: Sequence[ShardJob], report: ReportShard
    ) -> Generator[ShardRecord, None, None]:
        finder = EdgeFinder(jobs[0].settings) if jobs and jobs[0].settings.hed_sha256 else None

        def start_edges(
            images: ImageBatch,
        ) -> Callable[[], UInt8[np.ndarray, "batch height width"]]:
            assert finder is not None  # only scenes have edges, and they have weights
            strokes = finder.strokes(images)
            return lambda: strokes

        for job in jobs:
            yield make_shard(job, start_edges, report=report)


def build_dataset(
    url: str,
    data: DataSettings,
    sketch: SketchSettings,
    *,
    seed: int = 0,
    options: BuildOptions = DEFAULT_OPTIONS,
    progress: ImageProgress | None = None,
    scheduler: Scheduler | None = None,
) -> Dataset:
    """The dataset at ``url``; what is missing of it is built.

    A finished dataset of these settings comes back at once, and an interrupted build resumes with
    the shards that are missing. Equal images and settings give equal bytes, whatever the workers
    and interruptions. ``seed`` deals the images to shards. Train images that are held out as well,
    exactly or nearly, are counted, ten of them named in the log, and all dropped unless
    ``data.duplicates`` is ``keep``. Shards are made on Ray, which must be initialized, unless
    another ``scheduler`` is given; an interruption cancels them.

    ``options`` say what may happen to a finished dataset. Whatever would come out the same stays:
    shards, or else samples, or else (where only the settings of sketches changed) stored images.
    Images are known by root and name: a file replaced in place is not noticed.

    Raises ShardError for a finished dataset of other settings, where more than
    ``data.max_failed_fraction`` of the images fail, and where existing sketches were made on a GPU
    and none is left; StorageError; ValueError for bad arguments.
    """
    if scheduler is None:
        from data_prep.ray_build import RayScheduler

        scheduler = RayScheduler()
    data, sketch = _absolute(data, sketch)
    requested = requested_record(data, sketch, seed)
    store = open_store(url)
    if (finished := _finished_dataset(store, url, requested, options)) is not None:
        return finished

    images = list_images(data)
    settings = _sample_settings(store, images, data, sketch, scheduler)
    store.clear_unfinished()
    jobs = _jobs(images, settings, url=store.url, seed=seed)
    records = _finished_shards(store, jobs, options.retry_failed)
    held_in = sum(image.split == "train" for image in images)
    log.info(
        "prepare images=%d train=%d val=%d shards=%d finished=%d hed_device=%s url=%s",
        *(len(images), held_in, len(images) - held_in, len(jobs), len(records)),
        *(settings.hed_device, url),
    )
    store.delete("dataset.json")  # from here on the old dataset may change
    budget = _Budget(len(images), data.max_failed_fraction, progress)
    for record in records.values():
        budget.add(record)
    missing = [job for job in jobs if job.name not in records]
    with contextlib.closing(scheduler.run_shards(missing, budget.report)) as made:
        for record in made:
            records[record.shard.name] = record
            budget.add(record)
    found = find_duplicates(read_rows(store, [job.name for job in jobs], COLUMNS))
    if found:
        first = one_line(
            "; ".join(f"{key}: {reason}" for key, reason in sorted(found.items())[:10])
        )
        log.info("train images that are also held out count=%d first: %s", len(found), first)
    if data.duplicates == "drop":
        jobs = _without(jobs, found)
    # A second round for shards that held duplicates; their other samples are reused.
    changed = [job for job in jobs if job.excluded != records[job.name].excluded]
    with contextlib.closing(scheduler.run_shards(changed, no_report)) as made:
        records |= {record.shard.name: record for record in made}
    if not any(record.shard.samples for record in records.values()):
        counts = count(records.values())["reasons"]
        reasons = ", ".join(f"{number} {reason}" for reason, number in counts.items())
        raise ShardError(
            f"none of {len(images)} images could be used ({reasons}) {budget.reasons()}".rstrip()
        )

    ordered = [records[job.name] for job in jobs]
    _delete_others(store, {job.name for job in jobs}, data.name)
    publish(
        store,
        ordered,
        name=data.name,
        license=DATA_SOURCES[data.source].license,
        requested=requested,
        shaping=shaping_record(data, seed, settings.record()),
        duplicates=len(found),
    )
    dataset = Dataset.open(url)
    peak = max(record.peak_bytes for record in ordered)
    samples = {split: dataset.samples(split) for split in SPLITS}
    log.info(
        "dataset finished train=%d val=%d url=%s digest=%s peak_worker_mib=%d",
        *(samples["train"], samples["val"], url, dataset.digest, peak / MIB),
    )
    return dataset


def _absolute(data: DataSettings, sketch: SketchSettings) -> tuple[DataSettings, SketchSettings]:
    """The settings with absolute paths: Ray runs workers in other directories."""
    if data.root is not None:
        data = replace(data, root=open_store(data.root).url)
    if sketch.hed_weights is not None:
        path, *sha256 = sketch.hed_weights.split("#", 1)
        sketch = replace(sketch, hed_weights="#".join([open_store(path).url, *sha256]))
    return data, sketch


def _finished_dataset(
    store: Store, url: str, requested: Mapping[str, Any], options: BuildOptions
) -> Dataset | None:
    """The finished dataset, where there is nothing to build; ShardError if it must not change."""
    if not store.exists("dataset.json"):
        return None
    finished = Dataset.open(url)
    differing = _differences(finished.settings["requested"], requested)
    retry = options.retry_failed and finished.counts["pictures"]["failed"] > 0
    if not differing and not options.update and not retry:
        log.info("dataset is finished url=%s digest=%s", url, finished.digest)
        return finished
    if differing and not options.replace:
        raise ShardError(
            f"{url} holds a finished dataset of other settings ({', '.join(differing)}): "
            "give this one another name or URL, or build over it by `prepare` with --replace"
        )
    return None


def _differences(stored: Mapping[str, Any], requested: Mapping[str, Any]) -> list[str]:
    # Settings that are newer than the dataset have their defaults in it.
    defaults = requested_record(DataSettings("any", "bundled"), SketchSettings(), seed=0)
    stored = defaults | dict(stored)
    return [
        f"{setting} {stored[setting]} there, {value} requested"
        for setting, value in requested.items()
        if stored[setting] != value
    ]


def _sample_settings(
    store: Store,
    images: Sequence[SourceImage],
    data: DataSettings,
    sketch: SketchSettings,
    scheduler: Scheduler,
) -> SampleSettings:
    """What shapes the samples of these images, with the weights and the device of edges found."""
    subjects = {image.subject for image in images}
    scenes = "scene" in subjects
    weights = _weights(sketch.hed_weights) if scenes else None
    return SampleSettings(
        data,
        sketch,
        hed_sha256=hashlib.sha256(weights).hexdigest() if weights else None,
        hed_device=_device(store, sketch.hed_device, scheduler.gpus()) if scenes else None,
        faces="face" in subjects,
    )


def _jobs(
    images: Sequence[SourceImage], settings: SampleSettings, *, url: str, seed: int
) -> list[ShardJob]:
    data = settings.data
    read = DATA_SOURCES[data.source].read
    jobs = []
    for split in SPLITS:
        by_key = {image.key: image for image in images if image.split == split}
        if len(by_key) < sum(image.split == split for image in images):
            raise ShardError(f"two images of {split} have one key: keys must be unique")
        for number, keys in enumerate(plan(by_key, shard_samples=data.shard_samples, seed=seed)):
            chosen = [by_key[key] for key in keys]
            name = shard_name(data.name, split, number)
            jobs.append(ShardJob(name, split, url, chosen, settings, read))
    return jobs


def _device(store: Store, wanted: HedDevice, gpus: int) -> Literal["cpu", "cuda"]:
    """Where edges are found: on GPUs, sketches have other bits."""
    if wanted == "cuda" and not gpus:
        raise ValueError("hed_device is cuda, and this Ray cluster has no GPU: use cpu or auto")
    if wanted != "auto":
        return wanted
    device = _recorded_device(store)
    if device is None:
        device = "cuda" if gpus else "cpu"
        log.info("hed_device chosen for this dataset, from now on: %s gpus=%d", device, gpus)
    elif device == "cuda" and not gpus:
        raise ShardError(
            f"{store.url} has sketches that were made on a GPU, and this Ray cluster has none: "
            "add one, or set sketch.hed_device=cpu, which makes all sketches again"
        )
    return device


def _recorded_device(store: Store) -> Literal["cpu", "cuda"] | None:
    """Where the edges of a finished or interrupted build were found, if it has any."""
    if store.exists("dataset.json"):
        settings = iter([Dataset.open(store.url).settings["shaping"]])
    else:
        settings = _recorded_settings(store)
    return next((each["hed_device"] for each in settings if each["hed_device"]), None)


def _recorded_settings(store: Store) -> Iterator[dict[str, Any]]:
    """The sample settings of the finished shards."""
    for key in store.list_keys("parts/"):
        if key.endswith(".tar.json"):
            with contextlib.suppress(ValueError):
                shard = key.removeprefix("parts/").removesuffix(".json")
                yield read_record(store, shard).sample_settings


def _weights(source: str | None) -> bytes:
    """The content of the weights file, loaded once to be sure that it is one."""
    from data_prep.hed import load_network, read_weights  # torch, and only scenes need it

    weights = read_weights(source)
    try:
        load_network(weights)
    except ValueError as error:
        raise ValueError(f"HED weights {source}: {error}") from error
    return weights


def _finished_shards(
    store: Store, jobs: Sequence[ShardJob], retry_failed: bool
) -> dict[str, ShardRecord]:
    """The shards already on storage that were made from these same images and settings."""
    stored = set(store.list_keys())

    def finished(job: ShardJob) -> ShardRecord | None:
        if not {job.name, record_key(job.name), rows_key(job.name)} <= stored:
            return None
        try:
            record = read_record(store, job.name)
        except ValueError:
            return None
        if retry_failed and record.failed:
            return None
        return record if record.plan == job.plan else None

    with ThreadPoolExecutor(16) as pool:
        found = pool.map(finished, jobs)
    return {record.shard.name: record for record in found if record}


def _without(jobs: Sequence[ShardJob], duplicates: Mapping[str, str]) -> list[ShardJob]:
    """The jobs, each with those of its images excluded that are held out as well."""
    return [
        replace(
            job,
            excluded={
                image.key: duplicates[image.key] for image in job.images if image.key in duplicates
            },
        )
        for job in jobs
    ]


def _delete_others(store: Store, names: set[str], dataset: str) -> None:
    """Remove shards that belonged to an earlier plan but not to this one; records first."""
    ours = re.compile(
        rf"(?:parts/)?({re.escape(dataset)}-(?:train|val)-\d+\.tar)(\.json|\.parquet)?"
    )
    others = [
        (match[2] != ".json", key)
        for key in store.list_keys()
        if (match := ours.fullmatch(key)) and match[1] not in names
    ]
    for _, key in sorted(others):
        store.delete(key)


class _Budget:
    """Counts finished images, reports progress, and stops a build in which too many fail."""

    def __init__(self, images: int, share: float, progress: ImageProgress | None) -> None:
        self._images, self._share, self._progress = images, share, progress
        self._done, self._failed = 0, 0
        self._started: dict[str, tuple[int, int]] = {}
        self._errors: list[str] = []

    def add(self, record: ShardRecord) -> None:
        self._done += record.images
        self._failed += record.failed
        self._errors += record.errors
        self._started.pop(record.shard.name, None)
        self._show()
        if self._failed > self._share * self._images:
            raise ShardError(
                f"{self._failed} of {self._images} images failed, more than "
                f"data.max_failed_fraction={self._share}: {self.reasons()}: the dataset is "
                "unfinished now; repair them and run `prepare` with --retry-failed, or "
                "raise data.max_failed_fraction"
            )

    def report(self, shard: str, done: int, failed: int) -> None:
        """Images of a shard that is not finished yet."""
        self._started[shard] = done, failed
        self._show()

    def _show(self) -> None:
        if self._progress:
            done = self._done + sum(done for done, _ in self._started.values())
            failed = self._failed + sum(failed for _, failed in self._started.values())
            self._progress(done, self._images, failed)

    def reasons(self) -> str:
        return one_line("; ".join(self._errors[:10]))
