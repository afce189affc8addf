"""The job of one shard: what it is made from, and making it in whichever process runs it."""

from __future__ import annotations

import hashlib
import resource
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from cluster.storage import MissingKeyError, Store, open_store, scratch_folder
from data_prep.files import SourceImage
from data_prep.manifest import (
    ManifestRow,
    ShardRecord,
    read_record,
    read_rows,
    record_key,
    write_record,
)
from data_prep.samples import (
    EarlierSamples,
    ImageBatch,
    ReusableSample,
    SampleSettings,
    StartEdges,
    make_samples,
)
from data_prep.shards import RawSample, Split, canonical_json, read_samples, write_shard
from data_prep.sketches import edge_strokes
from data_prep.sources import ReadImage


@dataclass(frozen=True)
class ShardJob:
    """One shard to be: all that a worker needs to make it."""

    name: str
    split: Split
    url: str
    """URL of the dataset."""
    images: list[SourceImage]
    settings: SampleSettings
    read: ReadImage
    excluded: dict[str, str] = field(default_factory=dict)
    """Images to leave out, with the reason. They are found once every shard is made, so they are
    no part of ``plan``."""

    @property
    def plan(self) -> str:
        """Hash of what the shard's bytes follow from, apart from the content of the files."""
        images = [
            [image.key, image.source, image.path, image.crop, image.subject]
            for image in self.images
        ]
        plan = [self.settings.record(), self.settings.data.root, images]
        return hashlib.sha256(canonical_json(plan)).hexdigest()


ReportShard = Callable[[str, int, int], None]
"""Called with the name of a shard, how many of its images are done, and how many of them failed."""


def no_report(shard: str, done: int, failed: int) -> None: ...


class EdgeFinder:
    """HED on one GPU, or on one thread of a CPU.

    Limits torch to one thread in the whole process. Without the GPU or the weights, ``strokes``
    raises the reason: an error of the constructor would end a Ray actor, and Ray prints that in
    hundreds of lines.
    """

    def __init__(self, settings: SampleSettings) -> None:
        self._threshold = settings.sketch.threshold
        self._fault: Exception | None = None
        try:
            self._load(settings)
        except (OSError, ValueError) as error:
            self._fault = error

    def _load(self, settings: SampleSettings) -> None:
        import torch  # a second or two, and only scenes need it

        from data_prep.hed import EdgeDetector, load_network, read_weights

        assert settings.hed_device  # set where there are scenes
        if settings.hed_device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"torch finds no GPU on {socket.gethostname()}: install its CUDA build and a "
                "driver, or set sketch.hed_device=cpu"
            )
        weights = read_weights(settings.sketch.hed_weights)
        if (found := hashlib.sha256(weights).hexdigest()) != settings.hed_sha256:
            raise ValueError(
                f"HED weights on this node have SHA-256 {found}, the driver's {settings.hed_sha256}"
            )
        torch.set_num_threads(1)
        # What is fastest may differ in the last bit from one run to the next; ours must not.
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False
        self._detect = EdgeDetector(
            load_network(weights),
            precision=settings.sketch.hed_precision,
            device=settings.hed_device,
            output=settings.sketch.hed_output,
            detect_px=settings.sketch.detect_px,
        )

    def strokes(self, images: ImageBatch) -> UInt8[np.ndarray, "batch height width"]:
        if self._fault:
            raise self._fault
        return edge_strokes(self._detect(images), self._threshold)


def make_shard(
    job: ShardJob,
    start_edges: StartEdges,
    edges_peak_bytes: Callable[[], int] = lambda: 0,
    report: ReportShard = no_report,
) -> ShardRecord:
    """Make one shard: the tar, then its rows, then the record that says it is finished.

    ``edges_peak_bytes`` asks how much memory the process behind ``start_edges`` has held.
    ``report`` is called after every image.
    """
    store = open_store(job.url)
    rows: list[ManifestRow] = []
    with scratch_folder() as folder:
        samples = make_samples(
            job.images,
            job.settings,
            read=job.read,
            start_edges=start_edges,
            earlier=_earlier(store, job, folder / "before.tar"),
            excluded=job.excluded,
        )
        path = folder / job.name
        shard = write_shard(
            path, _noted(samples, job, rows, report), split=job.split, name=job.name
        )
        store.delete(record_key(job.name))  # an older plan's record would be wrong from here on
        store.upload(path, job.name)
    record = ShardRecord.of(
        shard,
        rows,
        plan=job.plan,
        root=job.settings.data.root,
        sample_settings=job.settings.record(),
        excluded=job.excluded,
        peak_bytes=max(peak_bytes(), edges_peak_bytes()),
    )
    write_record(store, record, rows)
    return record


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _earlier(store: Store, job: ShardJob, path: Path) -> EarlierSamples | None:
    """The samples of the shard already stored under this name.

    None if it is incomplete, or holds images of another root.
    """
    try:
        record = read_record(store, job.name)
        if record.root != job.settings.data.root:
            return None
        store.download(job.name, path)
        (table,) = read_rows(store, [job.name])
    except (MissingKeyError, ValueError):
        return None
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != record.shard.sha256:
            return None
    rows = {row["key"]: row for row in table.to_pylist()}
    samples = {
        sample.key: ReusableSample(rows[sample.key], sample) for sample in read_samples(path)
    }
    return EarlierSamples(samples, record.sample_settings)


def _noted(
    samples: Iterator[tuple[ManifestRow, RawSample | None]],
    job: ShardJob,
    rows: list[ManifestRow],
    report: ReportShard,
) -> Iterator[RawSample]:
    """The samples of a shard; on the way, ``rows`` gets one row per image."""
    index, failed = 0, 0
    for row, sample in samples:
        row |= {"shard": job.name, "index_in_shard": None}
        rows.append(row)
        failed += row["status"] == "failed"
        report(job.name, len(rows), failed)
        if sample is not None:
            row["index_in_shard"] = index
            index += 1
            yield sample
