"""One of our datasets as a webdataset pipeline, for training code that is not ours.

An example, shard by shard in two workers, shuffled twice::

    from torch.utils.data import DataLoader
    from pipeline.data.webdataset_pipeline import open_as_webdataset
    samples = open_as_webdataset("s3://bucket/datasets/places2", "train", shuffle_seed=0)
    for sample in DataLoader(samples.shuffle(1000), batch_size=None, num_workers=2):
        print(sample["__key__"], sample["image"].shape, sample["sketch"].shape, sample["meta"])
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import webdataset
from webdataset import tariterators

from cluster.storage import MIB, join
from data_prep.shards import Dataset, RawSample, Shard, ShardError, Split
from pipeline.data.reader import decode_sample
from pipeline.data.shard_cache import CACHE_BYTES, ShardCache


def open_as_webdataset(
    url: str,
    split: Split = "train",
    *,
    shuffle_seed: int | None = None,
    cache: Path | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> webdataset.FluidWrapper:
    """The samples of one split of the dataset at ``url`` (a path or ``s3://...``).

    A sample is a dict: ``__key__``, ``__url__`` (of its shard), ``image`` (height, width, 3) as
    8-bit RGB, ``sketch`` (height, width) with 1 on a stroke, and ``meta``, where the image came
    from and how its sketch was made. webdataset's own stages follow as usual: ``shuffle``, ``map``,
    ``batched``.

    Ranks and DataLoader workers share the shards, each shard going to one of them. With
    ``shuffle_seed`` the shards come in another order each epoch (in a DataLoader only with
    ``persistent_workers``). Credentials and endpoint of S3 are those of the environment; ``cache``
    and ``cache_bytes`` as in ``ShardCache``.

    Raises ShardError where ``url`` holds no finished dataset or no sample of ``split``. Iterating
    raises ShardError for a shard whose SHA-256 differs, before the first of its samples, and
    StorageError where storage fails.
    """
    dataset = Dataset.open(url)
    shards = {shard.name: shard for shard in dataset.shards(split) if shard.samples}
    if not shards:
        raise ShardError(f"{url} has no samples in the split {split!r}: give train or val")
    samples = webdataset.FluidWrapper(webdataset.SimpleShardList(list(shards)))
    if shuffle_seed is not None:
        size = len(shards)
        samples = samples.compose(
            webdataset.detshuffle(bufsize=size, initial=size, seed=shuffle_seed)
        )
    return samples.compose(
        webdataset.split_by_node,
        webdataset.split_by_worker,
        _OpenShards(dataset, shards, cache, cache_bytes),
        tariterators.tar_file_expander,
        tariterators.group_by_keys,
    ).map(_decoded)


@dataclass(frozen=True)
class _OpenShards:
    """The stage that opens shards, in place of webdataset's, which knows neither S3 nor digests."""

    dataset: Dataset
    shards: dict[str, Shard]
    cache: Path | None
    cache_bytes: int

    def __call__(self, source: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        # Made here and not before: DataLoader workers get a pickled copy of this stage.
        shards = ShardCache(self.dataset, cache=self.cache, cache_bytes=self.cache_bytes)
        with contextlib.closing(shards):
            for wanted in source:
                shard = self.shards[wanted["url"]]
                url = join(self.dataset.url, shard.name)
                with shards.file(shard) as file:
                    if _sha256(file) != shard.sha256:
                        raise ShardError(
                            f"{url} has other content than was written (SHA-256 differs)"
                        )
                    file.seek(0)
                    yield {"url": url, "stream": file}


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := file.read(MIB):
        digest.update(piece)
    return digest.hexdigest()


def _decoded(sample: dict[str, Any]) -> dict[str, Any]:
    key, url = sample["__key__"], sample["__url__"]
    raw = RawSample(key, sample["jpg"], sample["sketch.png"], sample["json"])
    image, sketch = decode_sample(raw, url)
    meta = json.loads(raw.meta)
    return {"__key__": key, "__url__": url, "image": image, "sketch": sketch, "meta": meta}
