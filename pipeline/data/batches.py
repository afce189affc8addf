"""Batches of training and of validation: equal for every world size, thread count and restart."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Self

from data_prep.masks import MaskSampler
from data_prep.shards import Dataset
from pipeline.data.batch import Batch
from pipeline.data.reader import BatchReader, StoredSample, View, read_batch
from pipeline.data.sample_order import SampleOrder, SampleRef
from pipeline.data.shard_cache import CACHE_BYTES
from pipeline.ranks import Ranks


class TrainLoader:
    """Endless training batches of one rank; a position is (epoch, step).

    The k-th global batch of an epoch is the ranks' batches one after the other. It depends on the
    dataset, ``seed``, ``streams``, ``global_batch`` and ``shuffle_block`` alone, and is equal for
    every ``world_size``, number of ``threads`` and resume. An epoch leaves out the few samples that
    do not fill a global batch, different ones each time. Crop, mirroring and mask of an image
    depend on (seed, epoch, key) alone; with ``mask_per_sample`` false one mask serves a whole
    global batch.

    Crops are squares of ``size_px``, as ``read_batch`` cuts them. ``cache``, ``cache_bytes`` and
    ``away_s`` as in ``ShardCache``.

    Ranks serve equally many streams, or one more, so their batches may differ in size. Raises
    ValueError where there are more ranks than streams. ``batches`` raises ShardError for a damaged
    shard and StorageError where storage fails: no sample is skipped silently.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        size_px: int,
        global_batch: int,
        streams: int,
        seed: int,
        masks: MaskSampler,
        mask_per_sample: bool = True,
        flip: bool = False,
        shuffle_block: int = 2000,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 2,
        cache: Path | None = None,
        cache_bytes: int = CACHE_BYTES,
        away_s: float = 0,
    ) -> None:
        if world_size > streams:
            raise ValueError(
                f"{world_size} ranks cannot share {streams} streams: start at most {streams}"
            )
        self._order = SampleOrder(
            [shard.samples for shard in dataset.shards("train")],
            streams=streams,
            global_batch=global_batch,
            shuffle_block=shuffle_block,
            seed=seed,
        )
        self._streams = Ranks(rank, world_size=world_size).share(streams)
        self._size_px, self._seed, self._flip = size_px, seed, flip
        self._masks, self._mask_per_sample = masks, mask_per_sample
        self._reader = BatchReader(
            dataset,
            "train",
            threads=threads,
            cache=cache,
            cache_bytes=cache_bytes,
            away_s=away_s,
        )

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps

    def batches(self, epoch: int = 0, step: int = 0) -> Iterator[tuple[int, int, Batch]]:
        """Yield (epoch, step, batch) from exactly this position, across epochs, without end.

        Step ``steps_per_epoch`` of an epoch is step 0 of the next.
        """
        passed, step = divmod(step, self.steps_per_epoch)
        return self._reader.in_order(self._tasks(epoch + passed, step))

    def close(self) -> None:
        """End the threads; batches that are not finished are dropped."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tasks(self, epoch: int, step: int) -> Iterator[Callable[[], tuple[int, int, Batch]]]:
        opened_for = None
        while True:
            if opened_for != (epoch, self._order.block(step)):
                opened_for = epoch, self._order.block(step)
                ahead = [self._order.shards_ahead(epoch, step, each) for each in self._streams]
                soonest_first = itertools.chain(*itertools.zip_longest(*ahead))
                self._reader.open(number for number in soonest_first if number is not None)
            samples = self._reader.samples(
                ref for stream in self._streams for ref in self._order.samples(epoch, step, stream)
            )
            yield partial(self._batch, epoch, step, samples)
            step += 1
            if step == self.steps_per_epoch:
                epoch, step = epoch + 1, 0

    def _batch(
        self, epoch: int, step: int, samples: Sequence[StoredSample]
    ) -> tuple[int, int, Batch]:
        size, shared = self._size_px, None
        if not self._mask_per_sample:
            shared = self._masks(size, size, random.Random(f"batch/{self._seed}/{epoch}/{step}"))

        def random_view(key: str, height: int, width: int) -> View:
            rng = random.Random(f"sample/{self._seed}/{epoch}/{key}")
            top = int((height - size + 1) * rng.random())
            left = int((width - size + 1) * rng.random())
            mirrored = rng.random() < 0.5 and self._flip
            mask = self._masks(size, size, rng) if shared is None else shared
            return View(top, left, mirrored, mask)

        return epoch, step, read_batch(samples, random_view, size_px=size)


def val_batches(
    dataset: Dataset,
    *,
    size_px: int,
    batch: int,
    masks: MaskSampler,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    threads: int = 2,
    cache: Path | None = None,
    cache_bytes: int = CACHE_BYTES,
    away_s: float = 0,
) -> Iterator[Batch]:
    """This rank's share of the first ``limit`` held-out images, in the order of the shards.

    Center crops, with masks keyed by (seed, key): equal every time and for every world size. The
    ranks' shares follow one another and have no image in common. With fewer images than ranks, the
    shares of some ranks are empty, but never that of the first. The last batch may be smaller.
    Crops, ``cache`` and errors as in ``TrainLoader``.
    """
    refs = [
        SampleRef(number, sample)
        for number, shard in enumerate(dataset.shards("val"))
        for sample in range(shard.samples)
    ][:limit]
    # Rounded up: the first rank draws the sheet of samples, so it is the last to get no image.
    first, last = (-(-number * len(refs) // world_size) for number in (rank, rank + 1))
    mine = refs[first:last]

    def centered_view(key: str, height: int, width: int) -> View:
        mask = masks(size_px, size_px, random.Random(f"val/{seed}/{key}"))
        return View((height - size_px) // 2, (width - size_px) // 2, False, mask)

    def tasks(reader: BatchReader) -> Iterator[Callable[[], Batch]]:
        for first in range(0, len(mine), batch):
            ahead = mine[first : first + 2 * batch]
            reader.open(sorted({ref.shard for ref in ahead}))
            samples = reader.samples(ahead[:batch])
            yield partial(read_batch, samples, centered_view, size_px=size_px)

    def batches() -> Iterator[Batch]:
        reader = BatchReader(
            dataset, "val", threads=threads, cache=cache, cache_bytes=cache_bytes, away_s=away_s
        )
        try:
            yield from reader.in_order(tasks(reader))
        finally:
            reader.close()

    return batches()
