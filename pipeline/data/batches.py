"""Shards to batches: the same ones whatever the ranks, threads and interruptions."""

import contextlib
import hashlib
import itertools
import logging
import mmap
import os
import random
import tempfile
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self, TypeVar, cast

import cv2
import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8

from cluster.storage import FileStore, join
from data_prep.images import ImageError, decode_sketch
from data_prep.masks import MaskSampler
from data_prep.shards import BLOCK, Dataset, RawSample, Shard, ShardError, read_samples
from pipeline.data.batch import Batch

log = logging.getLogger(__name__)

T = TypeVar("T")
Picture = UInt8[np.ndarray, "height width 3"]
Plane = UInt8[np.ndarray, "height width"]

CACHE_BYTES = 32 * 2**30
ABANDONED_S = 3600  # a copy that nobody went on writing for so long never will be whole
DOWNLOADS = 4  # shards at a time; a big one comes in parallel parts besides


class SampleRef(NamedTuple):
    """Where a sample lies."""

    shard: int
    sample: int


class TrainLoader:
    """Batches of one rank, for ever; a position among them is (epoch, step).

    The k-th global batch of an epoch, which is the ranks' batches one after the other, depends on
    the data set, ``seed``, ``streams``, ``global_batch`` and ``shuffle_block``: never on
    ``world_size``, ``threads``, or where a run was taken up again. An epoch leaves out the few
    samples that do not fill a global batch, other ones each time. Crop, mirroring and mask of a
    picture depend on (seed, epoch, key) alone; with ``mask_per_sample`` false a global batch shares
    one mask, as the authors' do.

    Crops are squares of ``size_px`` from the stored picture; one whose short side is smaller is
    first scaled up to it (bilinear; its sketch by nearest neighbour). Shards on S3 are copied to
    ``cache`` ahead of their use, checked, and the oldest removed beyond ``cache_bytes``; what is
    there at the end stays for the next run.

    Raises ValueError where the numbers do not divide; from ``batches`` also ShardError for a shard
    that is damaged and StorageError for storage that fails. No sample is left out in silence.
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
    ) -> None:
        if streams % world_size:
            raise ValueError(
                f"{world_size} ranks cannot share {streams} streams: "
                "the world size must divide the number of streams"
            )
        self._shards = dataset.shards("train")
        self._order = SampleOrder(
            [shard.samples for shard in self._shards],
            streams=streams,
            global_batch=global_batch,
            shuffle_block=shuffle_block,
            seed=seed,
        )
        share = streams // world_size
        self._streams = range(rank * share, (rank + 1) * share)
        self._size_px, self._seed, self._flip = size_px, seed, flip
        self._masks, self._mask_per_sample = masks, mask_per_sample
        self._files = ShardCache(dataset, cache=cache, cache_bytes=cache_bytes)
        self._threads = threads
        self._decoders = ThreadPoolExecutor(threads, "decode")

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps

    def batches(self, epoch: int = 0, step: int = 0) -> Iterator[tuple[int, int, Batch]]:
        """Yield (epoch, step, batch) from exactly this position on, across epochs, for ever.

        Step ``steps_per_epoch`` of an epoch is step 0 of the next.
        """
        passed, step = divmod(step, self.steps_per_epoch)
        return in_order(self._tasks(epoch + passed, step), self._decoders, ahead=self._threads + 1)

    def close(self) -> None:
        """End the threads; batches in the making are dropped."""
        self._files.close()  # first: decoders may be waiting for shards
        self._decoders.shutdown(cancel_futures=True)

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
                opened = self._files.open(
                    self._shards[number] for number in soonest_first if number is not None
                )
            samples = [
                StoredSample(opened[self._shards[place.shard].name], place.sample)
                for stream in self._streams
                for place in self._order.samples(epoch, step, stream)
            ]
            yield partial(self._batch, epoch, step, samples)
            step += 1
            if step == self.steps_per_epoch:
                epoch, step = epoch + 1, 0

    def _batch(
        self, epoch: int, step: int, samples: Sequence["StoredSample"]
    ) -> tuple[int, int, Batch]:
        size = self._size_px
        buffers, scratch = Buffers(len(samples), size), Scratch()
        if not self._mask_per_sample:
            rng = random.Random(f"batch/{self._seed}/{epoch}/{step}")
            buffers.mask[:] = self._masks(size, size, rng)
        for row, stored in enumerate(samples):
            key, image, sketch = stored.decoded(scratch, at_least_px=size)
            rng = random.Random(f"sample/{self._seed}/{epoch}/{key}")
            top = int((image.shape[0] - size + 1) * rng.random())
            left = int((image.shape[1] - size + 1) * rng.random())
            mirrored = rng.random() < 0.5 and self._flip
            buffers.put(row, key, image, sketch, top=top, left=left, mirrored=mirrored)
            if self._mask_per_sample:
                buffers.mask[row] = self._masks(size, size, rng)
        return epoch, step, buffers.batch()


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
) -> Iterator[Batch]:
    """This rank's part of the first ``limit`` held-out pictures, in the order of the shards.

    Centre crops (scaled up first where too small), masks keyed by (seed, key): always the same, for
    every world size. The ranks' parts follow one another and share no picture; a rank has none
    where there are fewer pictures than ranks. The last batch may be smaller.
    """
    shards = dataset.shards("val")
    places = [
        SampleRef(number, sample)
        for number, shard in enumerate(shards)
        for sample in range(shard.samples)
    ][:limit]
    mine = places[rank * len(places) // world_size : (rank + 1) * len(places) // world_size]

    def fixed_batch(samples: Sequence[StoredSample]) -> Batch:
        buffers, scratch = Buffers(len(samples), size_px), Scratch()
        for row, stored in enumerate(samples):
            key, image, sketch = stored.decoded(scratch, at_least_px=size_px)
            top, left = (image.shape[0] - size_px) // 2, (image.shape[1] - size_px) // 2
            buffers.put(row, key, image, sketch, top=top, left=left, mirrored=False)
            buffers.mask[row] = masks(size_px, size_px, random.Random(f"val/{seed}/{key}"))
        return buffers.batch()

    def tasks(files: ShardCache) -> Iterator[Callable[[], Batch]]:
        for first in range(0, len(mine), batch):
            ahead = mine[first : first + 2 * batch]
            opened = files.open([shards[number] for number in sorted({p.shard for p in ahead})])
            samples = [StoredSample(opened[shards[p.shard].name], p.sample) for p in ahead[:batch]]
            yield partial(fixed_batch, samples)

    def batches() -> Iterator[Batch]:
        files = ShardCache(dataset, cache=cache, cache_bytes=cache_bytes)
        decoders = ThreadPoolExecutor(threads, "decode")
        try:
            yield from in_order(tasks(files), decoders, ahead=threads + 1)
        finally:
            files.close()  # first: decoders may be waiting for shards
            decoders.shutdown(cancel_futures=True)

    return batches()


class SampleOrder:
    """Which samples make the k-th global batch: the order of training, without any of the data.

    An epoch shuffles the shards and lines their samples up. The line is cut into as many equal
    segments as there are streams; each stream goes along its own in blocks of ``shuffle_block``
    samples (or a step's share, if that is more), shuffled. So a stream reads few shards at a time,
    one after the other, and any position is found without going through those before it.
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
        if global_batch % streams:
            raise ValueError(
                f"a global batch of {global_batch} cannot take equally many samples from "
                f"{streams} streams: it must be a multiple of their number"
            )
        self.steps = sum(counts) // global_batch
        """Global batches in an epoch."""
        if self.steps == 0:
            raise ValueError(
                f"{sum(counts)} training pictures cannot fill one global batch of {global_batch}: "
                "prepare more of them, or make the batch smaller"
            )
        self._counts, self._seed = counts, seed
        self._per_step = global_batch // streams
        self._length = self.steps * self._per_step  # samples of a stream in an epoch
        self._block = min(max(shuffle_block, self._per_step), self._length)
        self._line = lru_cache(2)(self._make_line)
        self._shuffled = lru_cache(2 * streams)(self._shuffle_block)

    def samples(self, epoch: int, step: int, stream: int) -> list[SampleRef]:
        """What ``stream`` gives to the global batch of ``step``."""
        return [
            self._place(epoch, stream, position)
            for position in range(step * self._per_step, (step + 1) * self._per_step)
        ]

    def block(self, step: int) -> int:
        """Number of the block that ``step`` begins in, the same for every stream."""
        return step * self._per_step // self._block

    def shards_ahead(self, epoch: int, step: int, stream: int) -> list[int]:
        """Shards that ``stream`` reads in ``step``, in the rest of its block and in the next.

        In the order in which it comes to them; one may stand there twice.
        """
        first = self.block(step) * self._block
        last = first + 2 * self._block  # a step reaches into one more block at most
        ahead = self._shards_between(epoch, stream, first, min(last, self._length))
        if last >= self._length:
            ahead += self._shards_between(epoch + 1, stream, 0, self._block)
        return ahead

    def _place(self, epoch: int, stream: int, position: int) -> SampleRef:
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


def _shuffled(count: int, name: str) -> list[int]:
    # Sorting by random() instead of shuffle(): Python promises to keep random() as it is.
    rng = random.Random(name)
    numbers = [rng.random() for _ in range(count)]
    return sorted(range(count), key=numbers.__getitem__)


class ShardCache:
    """Shards as memory maps: of the data set's own files, or of checked copies in ``cache``.

    Copies are named by their SHA-256, which is checked as they arrive, so ranks, runs and data sets
    share them; removing one that another process reads does it no harm. Of the data set's own
    files only the sizes are checked: ``dataset verify`` reads them whole.
    """

    def __init__(
        self, dataset: Dataset, *, cache: Path | None = None, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self._store, self._url = dataset.store, dataset.url
        default = Path(tempfile.gettempdir(), f"deepfill-shards-{os.getuid()}")
        self._cache, self._cache_bytes = cache or default, cache_bytes
        self._openers = ThreadPoolExecutor(DOWNLOADS, "shard")
        self._opened: dict[str, Future[OpenShard]] = {}

    def open(self, shards: Iterable[Shard]) -> dict[str, "Future[OpenShard]"]:
        """Begin to open ``shards``, in this order, and let go of all others; by their names."""
        opened: dict[str, Future[OpenShard]] = {}
        for shard in shards:
            if shard.name not in opened:
                known = self._opened.get(shard.name)
                opened[shard.name] = known or self._openers.submit(self._open, shard)
        self._opened = opened
        return opened

    def close(self) -> None:
        self._openers.shutdown(cancel_futures=True)
        self._opened = {}

    def _open(self, shard: Shard) -> "OpenShard":
        url = join(self._url, shard.name)
        with self._file(shard, url) as file:
            size = os.fstat(file.fileno()).st_size
            if size != shard.bytes:
                raise ShardError(f"{url} has {size} bytes instead of {shard.bytes}")
            # The views in the samples keep the map alive, and nothing else does.
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        samples = list(read_samples(_Views(content), name=url))
        if len(samples) != shard.samples:
            raise ShardError(f"{url} has {len(samples)} samples instead of {shard.samples}")
        return OpenShard(url, samples)

    def _file(self, shard: Shard, url: str) -> BinaryIO:
        if isinstance(self._store, FileStore):
            return self._store.open(shard.name)
        path = self._cache / f"{shard.sha256}.tar"
        try:
            os.utime(path)  # used now, so removed last
            return path.open("rb")
        except FileNotFoundError:
            return self._fetched(shard, url, path)

    def _fetched(self, shard: Shard, url: str, path: Path) -> BinaryIO:
        started = time.perf_counter()
        self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        arriving = path.with_suffix(f".{os.getpid()}")
        self._store.download(shard.name, arriving)
        file = arriving.open("rb")
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            file.close()
            arriving.unlink()
            raise ShardError(f"{url} has other content than was written (SHA-256 differs)")
        arriving.replace(path)
        log.debug("shard fetched url=%s seconds=%.1f", url, time.perf_counter() - started)
        self._evict()
        return file

    def _evict(self) -> None:
        """Remove the copies that were used longest ago, beyond the bound."""
        copies = []
        for path in self._cache.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another rank was faster
                status = path.stat()
                if path.suffix == ".tar":
                    copies.append((status.st_mtime, status.st_size, path))
                elif time.time() - status.st_mtime > ABANDONED_S:
                    path.unlink()
        used = 0
        for _, size, path in sorted(copies, reverse=True):
            used += size
            if used > self._cache_bytes:
                path.unlink(missing_ok=True)


class OpenShard(NamedTuple):
    url: str
    samples: list[RawSample]
    """Their bytes are views of the mapped file."""


class StoredSample(NamedTuple):
    """One sample of a shard that is open, or about to be."""

    shard: "Future[OpenShard]"
    number: int

    def decoded(self, scratch: "Scratch", *, at_least_px: int) -> tuple[str, Picture, Plane]:
        """Key, picture and sketch (0 or 1), scaled up where the short side is too small.

        The picture lies in ``scratch``, until the next one is decoded.
        """
        url, samples = self.shard.result()
        sample = samples[self.number]
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(sample.jpg)
            memory = scratch.at_least(height * width * 3)
            image = simplejpeg.decode_jpeg(sample.jpg, "RGB", buffer=memory)
        except ValueError as error:
            raise ShardError(f"{url}: the picture of {sample.key} is damaged: {error}") from error
        try:
            sketch = decode_sketch(sample.sketch)
        except ImageError as error:
            raise ShardError(f"{url}: the sketch of {sample.key} is damaged: {error}") from error
        if sketch.shape != image.shape[:2]:
            raise ShardError(f"{url}: the sketch of {sample.key} has another size than its picture")
        return sample.key, *_at_least(at_least_px, image, sketch)


class Scratch:
    """Memory for one picture after the other: mapping it anew costs a quarter of the decoding."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def at_least(self, size: int) -> UInt8[np.ndarray, " bytes"]:
        if self._memory.size < size:
            self._memory = np.empty(size, np.uint8)
        return self._memory


def _at_least(size_px: int, image: Picture, sketch: Plane) -> tuple[Picture, Plane]:
    height, width = image.shape[:2]
    short = min(height, width)
    if short >= size_px:
        return image, sketch
    size = round(width * size_px / short), round(height * size_px / short)
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    return image, cv2.resize(sketch, size, interpolation=cv2.INTER_NEAREST)


class Buffers:
    """A batch in the making."""

    def __init__(self, count: int, size_px: int) -> None:
        self._size_px = size_px
        self.image = np.empty((count, size_px, size_px, 3), np.uint8)
        self.sketch = np.empty((count, size_px, size_px), np.uint8)
        self.mask = np.empty((count, size_px, size_px), np.uint8)
        self._keys: list[str] = []

    def put(
        self,
        row: int,
        key: str,
        image: Picture,
        sketch: Plane,
        *,
        top: int,
        left: int,
        mirrored: bool,
    ) -> None:
        """Copy the crop at ``top``, ``left``; rows come in order."""
        rows, columns = slice(top, top + self._size_px), slice(left, left + self._size_px)
        image, sketch = image[rows, columns], sketch[rows, columns]
        if mirrored:  # by OpenCV, ten times as fast as a view with a negative step
            image, sketch = cv2.flip(image, 1), cv2.flip(sketch, 1)
        self.image[row], self.sketch[row] = image, sketch
        self._keys.append(key)

    def batch(self) -> Batch:
        image, mask, sketch = map(torch.from_numpy, (self.image, self.mask, self.sketch))
        batch = Batch(image, mask, sketch, tuple(self._keys))
        return batch.pinned() if torch.cuda.is_available() else batch


class _Views:
    """A file in memory whose reads are views of it: only the tar's headers are copied."""

    def __init__(self, content: memoryview) -> None:
        self._content, self._position = content, 0

    def read(self, size: int, /) -> bytes:
        piece = self._content[self._position : self._position + size]
        self._position += len(piece)
        return bytes(piece) if size == BLOCK else cast(bytes, piece)


def in_order(
    tasks: Iterable[Callable[[], T]], pool: ThreadPoolExecutor, *, ahead: int
) -> Iterator[T]:
    """Results of ``tasks`` in their order, with up to ``ahead`` more of them begun.

    A task that raises does so where its result would have come.
    """
    begun: deque[Future[T]] = deque()
    try:
        for task in tasks:
            begun.append(pool.submit(task))
            if len(begun) > ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()
