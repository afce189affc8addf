"""A contact sheet: some images of a dataset, each beside its sketch."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

from cluster.storage import Store, join
from cluster.storage.records import RecordError, read_insisting
from data_prep.image_grid import image_grid
from data_prep.images import Decoded, ImageError, Pixels, decode, fit
from data_prep.shards import Shard, ShardError, read_samples

CELL_PX, PAIRS_PER_ROW, PAIRS = 128, 4, 16
BLACK = (0, 0, 0)


def contact_sheet(store: Store, shards: Sequence[Shard]) -> bytes:
    """A PNG of the first images of each split, cut square, with their strokes in white."""
    cells: list[Pixels] = []
    for split in ("train", "val"):
        pairs: list[tuple[Pixels, Pixels]] = []
        for shard in (shard for shard in shards if shard.split == split):
            if len(pairs) < PAIRS:
                pairs += _pairs(store, shard, PAIRS - len(pairs))
        cells += itertools.chain.from_iterable(pairs)
    columns = 2 * PAIRS_PER_ROW
    rows = [cells[first : first + columns] for first in range(0, len(cells), columns)]
    buffer = io.BytesIO()
    Image.fromarray(image_grid(rows, gap_px=0, background=BLACK)).save(buffer, "PNG")
    return buffer.getvalue()


def _pairs(store: Store, shard: Shard, at_most: int) -> list[tuple[Pixels, Pixels]]:
    """The first images of a shard with their sketches. Raises ShardError for a damaged shard."""

    def read(store: Store) -> list[tuple[Pixels, Pixels]]:
        try:
            with contextlib.closing(store.open(shard.name)) as file:
                samples = itertools.islice(read_samples(file, name=shard.name), at_most)
                return [(_cell(sample.jpg), _cell(sample.sketch)) for sample in samples]
        except (ShardError, ImageError) as error:
            raise RecordError(str(error)) from error

    try:
        return read_insisting(store, read, key=shard.name)
    except RecordError as error:
        raise ShardError(f"{join(store.url, shard.name)} is damaged: {error}") from error


def _cell(data: bytes) -> Pixels:
    pixels = decode(data).pixels
    height, width = pixels.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    square = Decoded(pixels, width, height).cropped((left, top, left + side, top + side))
    if side >= CELL_PX:
        return fit(square, CELL_PX)
    size = (CELL_PX, CELL_PX)
    return cv2.resize(square.pixels, size, interpolation=cv2.INTER_NEAREST).astype(np.uint8)
