"""A contact sheet: some images of a dataset, each beside its sketch."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from PIL import Image

from cluster.storage import Store
from data_prep.image_grid import image_grid
from data_prep.images import Decoded, Pixels, decode, fit
from data_prep.shards import RawSample, Shard, read_samples

CELL_PX, PAIRS_PER_ROW, PAIRS = 128, 4, 16
BLACK = (0, 0, 0)


def contact_sheet(store: Store, shards: Sequence[Shard]) -> bytes:
    """A PNG of the first images of each split, cut square, with their strokes in white."""
    cells = []
    for split in ("train", "val"):
        of_split = (shard for shard in shards if shard.split == split)
        for sample in itertools.islice(_samples(store, of_split), PAIRS):
            cells += [_cell(sample.jpg), _cell(sample.sketch)]
    columns = 2 * PAIRS_PER_ROW
    rows = [cells[first : first + columns] for first in range(0, len(cells), columns)]
    buffer = io.BytesIO()
    Image.fromarray(image_grid(rows, gap_px=0, background=BLACK)).save(buffer, "PNG")
    return buffer.getvalue()


def _samples(store: Store, shards: Iterable[Shard]) -> Iterable[RawSample]:
    for shard in shards:
        with contextlib.closing(store.open(shard.name)) as file:
            yield from read_samples(file, name=shard.name)


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
