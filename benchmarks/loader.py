"""Images per second and core of the training loader: image, sketch and a mask for each.

The anchor is the usual way: webdataset with ``decode("rgb")`` (Pillow, floats), a Pillow mask for
every image (``benchmarks/reference/masks.py``), a random crop, a DataLoader. Both read the same
shards: photographs at the stored size and their HED sketches, as data preparation writes them.

Run: ``python -m benchmarks.loader [FOLDER OF IMAGES]``; without a folder it takes the bundled
photographs. Written to ``results/loader.json``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.reference.masks import random_mask
from benchmarks.timing import interleaved, needs, write_result

SIZE, BATCH, WORKERS = 256, 32, 2
SHARDS, SHARD_SAMPLES = 4, 512
DISTINCT = 64  # images
BATCHES = 24  # in one measurement


def main() -> None:
    needs("cv2", "simplejpeg", "webdataset")
    import cv2

    from data_prep.masks import MaskSampler, MaskSettings
    from data_prep.shards import Dataset
    from pipeline.data.batches import TrainLoader

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder), sys.argv[1] if sys.argv[1:] else None)
        loader = TrainLoader(
            Dataset.open(folder),
            size_px=SIZE,
            global_batch=BATCH,
            streams=4,
            seed=0,
            masks=MaskSampler(MaskSettings({"corrected": 1.0})),
            flip=True,
            threads=WORKERS,
        )
        with loader:
            one_process, ours = anchor(folder, workers=0), loader.batches()
            cpu_s = interleaved(
                {"webdataset": partial(take, one_process), "ours": partial(take, ours)}
            )
            several = anchor(folder, workers=WORKERS)
            wall_s = interleaved(
                {"webdataset": partial(take, several), "ours": partial(take, ours)},
                clock=time.perf_counter,
            )
            del several
    images = BATCH * BATCHES
    write_result(
        "loader",
        {
            "size_px": SIZE,
            "images": dataset,
            "cpu_microseconds_per_image": {n: s / images * 1e6 for n, s in cpu_s.items()},
            "cores_per_1000_images_per_s": {n: s / images * 1e3 for n, s in cpu_s.items()},
            "workers": WORKERS,
            "images_per_s": {name: images / s for name, s in wall_s.items()},
            "times_faster": {
                "cpu": cpu_s["webdataset"] / cpu_s["ours"],
                "wall": wall_s["webdataset"] / wall_s["ours"],
            },
        },
        packages=["torch", "webdataset", "pillow", "simplejpeg", "opencv-python-headless"],
    )


def take(batches: Iterator[Any]) -> None:
    for _ in islice(batches, BATCHES):
        pass


def anchor(folder: str, *, workers: int) -> Iterator[Any]:
    """Batches of (image, sketch, mask) floats, without end."""
    import webdataset as wds

    rng = np.random.default_rng(0)

    def cropped(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        image, sketch = sample["jpg"], sample["sketch.png"]
        top = rng.integers(0, image.shape[0] - SIZE + 1)
        left = rng.integers(0, image.shape[1] - SIZE + 1)
        window = slice(top, top + SIZE), slice(left, left + SIZE)
        image = image[window].transpose(2, 0, 1) * 2 - 1
        strokes = (sketch[window][None, ..., 0] > 0.6).astype(np.float32)
        return image, strokes, random_mask(SIZE, SIZE, rng)[0]

    shards = sorted(str(path) for path in Path(folder).glob("*.tar"))
    dataset = wds.WebDataset(shards, shardshuffle=False).repeat().decode("rgb").map(cropped)
    batches = torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=workers)
    return iter(batches)


def write_dataset(folder: Path, source: str | None) -> dict[str, Any]:
    """Real photographs at the stored size, each several times, as a finished dataset."""
    from data_prep.hed import EdgeDetector, load_network, read_weights
    from data_prep.images import encode_jpeg, encode_sketch
    from data_prep.shards import FORMAT, RawSample, index_entry, write_shard
    from data_prep.sketches import edge_strokes

    detector, encoded = EdgeDetector(load_network(read_weights(None))), []
    for pixels in islice(photographs(source), DISTINCT):
        strokes = edge_strokes(detector(pixels[None])[0], 0.6)
        encoded.append((encode_jpeg(pixels), encode_sketch(strokes), b"{}"))
    index = []
    for number in range(SHARDS):
        name = f"bench-train-{number:06d}.tar"
        samples = [
            RawSample(f"{number}-{i:05d}", *encoded[(number * SHARD_SAMPLES + i) % len(encoded)])
            for i in range(SHARD_SAMPLES)
        ]
        index.append(write_shard(folder / name, samples, split="train", name=name))
    entries = [index_entry(shard) for shard in index]
    (folder / "index.json").write_text(json.dumps({"shardlist": entries}))
    record = {"format": FORMAT, "name": "bench", "digest": "", "settings": {}, "counts": {}}
    (folder / "dataset.json").write_text(json.dumps(record | {"files": {}}))
    return {
        "distinct": len(encoded),
        "jpeg_bytes": round(sum(len(e[0]) for e in encoded) / len(encoded)),
        "sketch_bytes": round(sum(len(e[1]) for e in encoded) / len(encoded)),
    }


def photographs(root: str | None) -> Iterator[np.ndarray]:
    """Squares of the stored size from the middle of the images that are large enough."""
    from data_prep.images import ImageError, decode, fit
    from data_prep.settings import DataSettings
    from data_prep.sources import DATA_SOURCES, list_images

    data = DataSettings("photographs", "folder" if root else "bundled", root, val_fraction=0.0)
    for image in list_images(data):
        try:
            decoded = decode(DATA_SOURCES[data.source].read(image, root))
            pixels = fit(decoded.cropped(image.crop) if image.crop else decoded, SIZE)
        except ImageError:
            continue
        top, left = (pixels.shape[0] - SIZE) // 2, (pixels.shape[1] - SIZE) // 2
        yield np.ascontiguousarray(pixels[top : top + SIZE, left : left + SIZE])


if __name__ == "__main__":
    main()
