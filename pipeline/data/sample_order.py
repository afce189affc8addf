"""The order of training as pure integers: which samples make the k-th global batch."""

import itertools
import random
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple


class SampleRef(NamedTuple):
    """Where a sample is stored, by numbers."""

    shard: int
    """Index into the shards of its split."""
    sample: int
    """Index into the samples of its shard."""


class SampleOrder:
    """Which samples make the k-th global batch, for every epoch, without reading any data.

    An epoch shuffles the shards and lines their samples up. The line is cut into as many equal
    segments as there are streams. Each stream reads its own segment in blocks of ``shuffle_block``
    samples (or one step's share, if that is more), and shuffles each block. So a stream reads few
    shards at a time, one after the other, and any position is found without computing those before.

    ``counts`` is the number of samples in each shard. Raises ValueError where ``order_misfits``
    finds a fault.
    """

    def __init__(
        self,
        counts: Sequence[int],
        *,
        streams: int,
        global_batch: int,
        shuffle_block: int,
        seed: int,
    ) -> None:
        if faults := order_misfits(sum(counts), streams=streams, global_batch=global_batch):
            raise ValueError("; ".join(faults))
        self.steps = sum(counts) // global_batch
        """Global batches in an epoch."""
        self._counts, self._seed = counts, seed
        self._per_step = global_batch // streams
        self._length = self.steps * self._per_step  # samples of a stream in an epoch
        self._block = min(max(shuffle_block, self._per_step), self._length)
        self._line = lru_cache(2)(self._make_line)
        self._shuffled = lru_cache(2 * streams)(self._shuffle_block)

    def samples(self, epoch: int, step: int, stream: int) -> list[SampleRef]:
        """The samples that ``stream`` adds to the global batch of ``step``."""
        return [
            self._ref(epoch, stream, position)
            for position in range(step * self._per_step, (step + 1) * self._per_step)
        ]

    def block(self, step: int) -> int:
        """Number of the block that ``step`` begins in, the same for every stream."""
        return step * self._per_step // self._block

    def shards_ahead(self, epoch: int, step: int, stream: int) -> list[int]:
        """Shards that ``stream`` reads in ``step``, in the rest of its block, and in the next.

        They are in the order of reading; a shard may occur twice.
        """
        first = self.block(step) * self._block
        last = first + 2 * self._block  # a step reaches into one more block at most
        ahead = self._shards_between(epoch, stream, first, min(last, self._length))
        if last >= self._length:
            ahead += self._shards_between(epoch + 1, stream, 0, self._block)
        return ahead

    def _ref(self, epoch: int, stream: int, position: int) -> SampleRef:
        block, offset = divmod(position, self._block)
        shuffled = self._shuffled(epoch, stream, block)[offset]
        return self._at(epoch, stream * self._length + block * self._block + shuffled)

    def _at(self, epoch: int, index: int) -> SampleRef:
        shards, starts = self._line(epoch)
        k = bisect_right(starts, index) - 1
        return SampleRef(shards[k], index - starts[k])

    def _shards_between(self, epoch: int, stream: int, first: int, last: int) -> list[int]:
        shards, starts = self._line(epoch)
        begin, end = stream * self._length + first, stream * self._length + last
        touched = shards[bisect_right(starts, begin) - 1 : bisect_right(starts, end - 1)]
        return [number for number in touched if self._counts[number]]

    def _make_line(self, epoch: int) -> tuple[list[int], list[int]]:
        """The epoch's order of shards, and where on the line each begins."""
        shards = _shuffled(len(self._counts), f"shards/{self._seed}/{epoch}")
        return shards, [0, *itertools.accumulate(self._counts[number] for number in shards)][:-1]

    def _shuffle_block(self, epoch: int, stream: int, block: int) -> list[int]:
        size = min(self._block, self._length - block * self._block)
        return _shuffled(size, f"block/{self._seed}/{epoch}/{stream}/{block}")


def order_misfits(train_samples: int, *, streams: int, global_batch: int) -> list[str]:
    """Why these numbers give no order of training, one line for each fault; empty if they do."""
    faults = []
    if global_batch % streams:
        faults.append(
            f"a global batch of {global_batch} cannot take equally many samples from "
            f"{streams} streams: make it a multiple of {streams}"
        )
    if train_samples < global_batch:
        faults.append(
            f"{train_samples} training images cannot fill one global batch of {global_batch}: "
            "prepare more images, or make the batch smaller"
        )
    return faults


def dataset_misfits(
    *,
    train_samples: int,
    val_samples: int,
    stored_px: int,
    size_px: int,
    streams: int,
    global_batch: int,
) -> list[str]:
    """Why a dataset cannot serve a recipe, one line for each fault; empty if it can.

    ``train_samples``, ``val_samples`` and ``stored_px`` (the short side of stored images)
    describe the dataset. ``size_px`` (the side of a crop), ``streams`` and ``global_batch`` are the
    recipe's.
    """
    faults = order_misfits(train_samples, streams=streams, global_batch=global_batch)
    if not val_samples:
        faults.append("the dataset has no held-out images: raise data.val_fraction")
    if stored_px < size_px:
        faults.append(
            f"images are stored at {stored_px} pixels, fewer than train.size_px {size_px}: "
            "prepare larger images, or train on smaller crops"
        )
    return faults


def _shuffled(count: int, name: str) -> list[int]:
    # Sorting by random() instead of shuffle(): Python promises to keep random() as it is.
    rng = random.Random(name)
    numbers = [rng.random() for _ in range(count)]
    return sorted(range(count), key=numbers.__getitem__)
