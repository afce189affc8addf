"""Stored samples to batches: decoding ahead on threads, crops, masks. Training and validation."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8

from data_prep.images import ImageError, Pixels, Strokes, decode_sketch
from data_prep.masks import MaskPixels
from data_prep.shards import Dataset, RawSample, ShardError, Split
from pipeline.data.batch import Batch
from pipeline.data.sample_order import SampleRef
from pipeline.data.shard_cache import CACHE_BYTES, OpenShard, ShardCache

T = TypeVar("T")


class View(NamedTuple):
    """What of a stored image a batch shows, and the hole in it."""

    top: int
    left: int
    mirrored: bool
    mask: MaskPixels


ChooseView = Callable[[str, int, int], View]
"""The view of an image, from its key, height and width."""


class StoredSample(NamedTuple):
    """One sample of a shard that is open, or about to be."""

    shard: Future[OpenShard]
    number: int


class BatchReader:
    """Reads the samples of one split, in threads; which ones and in which order the caller says.

    ``cache``, ``cache_bytes`` and ``away_s`` as in ``ShardCache``.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        *,
        threads: int = 2,
        cache: Path | None = None,
        cache_bytes: int = CACHE_BYTES,
        away_s: float = 0,
    ) -> None:
        self._shards = dataset.shards(split)
        self._cache = ShardCache(dataset, cache=cache, cache_bytes=cache_bytes, away_s=away_s)
        self._opened: dict[str, Future[OpenShard]] = {}
        self._ahead = threads + 1
        self._decoders = ThreadPoolExecutor(threads, "decode", initializer=_use_device_of_caller())

    def open(self, shards: Iterable[int]) -> None:
        """Start to open the shards of these numbers, in this order, and release all others."""
        self._opened = self._cache.open(self._shards[number] for number in shards)

    def samples(self, refs: Iterable[SampleRef]) -> list[StoredSample]:
        """The samples at ``refs``, whose shards ``open`` was asked for."""
        return [
            StoredSample(self._opened[self._shards[ref.shard].name], ref.sample) for ref in refs
        ]

    def in_order(self, tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
        """Results of ``tasks`` in their order, while threads work on the next ones.

        A task that raises does so where its result would have come.
        """
        begun: deque[Future[T]] = deque()
        try:
            for task in tasks:
                begun.append(self._decoders.submit(task))
                if len(begun) > self._ahead:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()

    def close(self) -> None:
        """End the threads; batches that are not finished are dropped."""
        self._cache.close()  # first: decoders may be waiting for shards
        self._decoders.shutdown(cancel_futures=True)


def _use_device_of_caller() -> Callable[[], None] | None:
    """For threads that pin memory: torch has one current GPU per thread, and begins with GPU 0.

    A rank on another GPU would open a context of several hundred MB there.
    """
    if not torch.cuda.is_available():
        return None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


def read_batch(samples: Sequence[StoredSample], choose: ChooseView, *, size_px: int) -> Batch:
    """Decode ``samples``, cut a square of ``size_px`` from each, and stack them.

    An image whose short side is smaller is first scaled up to it (bilinear; its sketch by nearest
    neighbor). Raises ShardError for a damaged sample, and what opening its shard raised.
    """
    count = len(samples)
    image = np.empty((count, size_px, size_px, 3), np.uint8)
    sketch = np.empty((count, size_px, size_px), np.uint8)
    mask = np.empty((count, size_px, size_px), np.uint8)
    keys, scratch = [], ScratchMemory()
    for row, stored in enumerate(samples):
        url, opened = stored.shard.result()
        sample = opened[stored.number]
        pixels, strokes = decode_sample(sample, url, scratch)
        pixels, strokes = resized_to_at_least(size_px, pixels, strokes)
        view = choose(sample.key, *pixels.shape[:2])
        rows, columns = slice(view.top, view.top + size_px), slice(view.left, view.left + size_px)
        pixels, strokes = pixels[rows, columns], strokes[rows, columns]
        if view.mirrored:  # by OpenCV, ten times as fast as a view with a negative step
            pixels, strokes = cv2.flip(pixels, 1), cv2.flip(strokes, 1)
        image[row], sketch[row], mask[row] = pixels, strokes, view.mask
        keys.append(sample.key)
    images, masks, sketches = map(torch.from_numpy, (image, mask, sketch))
    batch = Batch(images, masks, sketches, tuple(keys))
    return batch.pinned() if torch.cuda.is_available() else batch


def decode_sample(
    sample: RawSample, url: str, scratch: "ScratchMemory | None" = None
) -> tuple[Pixels, Strokes]:
    """Image (height, width, 3) as 8-bit RGB and sketch (height, width) of 0 and 1.

    ``url`` names the shard in messages. With ``scratch`` the image stays there until the next call.
    Raises ShardError where image or sketch are damaged, or differ in size.
    """
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(sample.jpg)
        memory = (scratch or ScratchMemory()).at_least(height * width * 3)
        pixels = simplejpeg.decode_jpeg(sample.jpg, "RGB", buffer=memory)
    except ValueError as error:
        raise ShardError(f"{url}: the image of {sample.key} is damaged: {error}") from error
    try:
        strokes = decode_sketch(sample.sketch)
    except ImageError as error:
        raise ShardError(f"{url}: the sketch of {sample.key} is damaged: {error}") from error
    if strokes.shape != pixels.shape[:2]:
        raise ShardError(f"{url}: the sketch of {sample.key} has another size than its image")
    return pixels, strokes


def resized_to_at_least(size_px: int, pixels: Pixels, strokes: Strokes) -> tuple[Pixels, Strokes]:
    height, width = pixels.shape[:2]
    short = min(height, width)
    if short >= size_px:
        return pixels, strokes
    size = round(width * size_px / short), round(height * size_px / short)
    pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
    return pixels, cv2.resize(strokes, size, interpolation=cv2.INTER_NEAREST)


class ScratchMemory:
    """Memory for one image after the other: allocating it anew costs a quarter of the decoding."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def at_least(self, size: int) -> UInt8[np.ndarray, " bytes"]:
        if self._memory.size < size:
            self._memory = np.empty(size, np.uint8)
        return self._memory
