"""Datasets of a few small images, written shard by shard as readers expect them."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from cluster.storage import open_store
from data_prep.shards import FORMAT, Dataset, RawSample, Split, digest_of, index_entry, write_shard


def image_of(number: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A smooth image that shows its number, and a sketch of its bright half."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([x * 200 / width, y * 200 / height, np.full_like(x, number * 3)], -1)
    return image.astype(np.uint8), ((x * 2 > width) * 255).astype(np.uint8)


def sample_of(number: int, height: int = 40, width: int = 56) -> RawSample:
    image, sketch = image_of(number, height, width)
    return RawSample(
        key=f"class/p{number:03d}",
        jpg=simplejpeg.encode_jpeg(image, quality=98, colorsubsampling="444"),
        sketch=cv2.imencode(".png", sketch, [cv2.IMWRITE_PNG_BILEVEL, 1])[1].tobytes(),
        meta=b"{}",
    )


def write_dataset(url: str, folder: Path, shards: Sequence[tuple[Split, list[RawSample]]]) -> None:
    """A dataset as readers see it: tars, the index, and dataset.json."""
    store, index = open_store(url), []
    folder.mkdir(exist_ok=True)
    for number, (split, samples) in enumerate(shards):
        name = f"tiny-{split}-{number:06d}.tar"
        index.append(write_shard(folder / name, samples, split=split, name=name))
        store.upload(folder / name, name)
    entries = [index_entry(shard) for shard in index]
    store.put("index.json", json.dumps({"shardlist": entries}).encode())
    record = {
        "format": FORMAT,
        "name": "tiny",
        "digest": digest_of({}, index),
        "settings": {"shaping": {}},
        "counts": {},
        "files": {},
    }
    store.put("dataset.json", json.dumps(record).encode())


def shards_of(counts: Sequence[int], split: Split) -> list[tuple[Split, list[RawSample]]]:
    numbers = itertools.count()
    return [(split, [sample_of(next(numbers)) for _ in range(count)]) for count in counts]


def copied(dataset: Dataset, url: str) -> Dataset:
    """A copy of a local dataset at ``url``."""
    store = open_store(url)
    for path in Path(dataset.url).iterdir():
        store.put(path.name, path.read_bytes())
    return Dataset.open(url)
