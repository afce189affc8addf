"""A contact sheet: some pictures of a data set, each beside its sketch."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Sequence

import cv2
import numpy as np

from cluster.storage import Store
from data_prep.images import Decoded, Pixels, decode, fit
from data_prep.shards import RawSample, Shard, read_samples

TILE_PX, PAIRS_PER_ROW, PAIRS = 128, 4, 16


def contact_sheet(store: Store, shards: Sequence[Shard]) -> bytes:
    """A PNG of the first pictures of each split, cut square, with their strokes in white."""
    tiles = []
    for split in ("train", "val"):
        of_split = (shard for shard in shards if shard.split == split)
        for sample in itertools.islice(_samples(store, of_split), PAIRS):
            tiles.append(np.concatenate([_tile(sample.jpg), _tile(sample.sketch)], axis=1))
    empty = np.zeros((TILE_PX, 2 * TILE_PX, 3), np.uint8)
    tiles += [empty] * (-len(tiles) % PAIRS_PER_ROW)
    rows = [
        np.concatenate(tiles[first : first + PAIRS_PER_ROW], axis=1)
        for first in range(0, len(tiles), PAIRS_PER_ROW)
    ]
    _, encoded = cv2.imencode(".png", np.concatenate(rows)[:, :, ::-1])
    return encoded.tobytes()


def _samples(store: Store, shards: Iterable[Shard]) -> Iterable[RawSample]:
    for shard in shards:
        with contextlib.closing(store.open(shard.name)) as file:
            yield from read_samples(file, name=shard.name)


def _tile(data: bytes) -> Pixels:
    pixels = decode(data).pixels
    height, width = pixels.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    square = Decoded(pixels, width, height).cropped((left, top, left + side, top + side))
    if side >= TILE_PX:
        return fit(square, TILE_PX)
    size = (TILE_PX, TILE_PX)
    return cv2.resize(square.pixels, size, interpolation=cv2.INTER_NEAREST).astype(np.uint8)
