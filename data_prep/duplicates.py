"""Images in both splits: training must not see what evaluation measures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.images import Pixels

NEAR_BITS = 3  # of 64: a copy scaled or compressed again differs by less, other images by more
BANDS = 4  # where no more than 3 bits differ, one of the bands is equal
_PLAIN = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("source_sha256", pa.string()),
        ("phash", pa.int64()),
    ]
)
COLUMNS = _PLAIN.names  # of the manifest, all that the search needs


def perceptual_hash(pixels: Pixels) -> int:
    """64 bits that similar images share: signs of the lowest frequencies, as a signed integer."""
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(gray, (32, 32), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small.astype(np.float32))[:8, :8].ravel()
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), signed=True)


def find_duplicates(tables: Iterable[pa.Table]) -> dict[str, str]:
    """Keys of train images that are also held out, with the reason: equal bytes or near hashes.

    ``tables`` are rows of manifests; images without a perceptual hash are left out.
    """
    # Split table by table, so that memory holds one copy of the strings of millions.
    found_in: dict[str, list[pa.Table]] = {"train": [], "val": []}
    for table in tables:
        rows = table.select(COLUMNS).cast(_PLAIN)
        rows = rows.filter(pc.is_valid(rows["phash"]))
        for split, parts in found_in.items():
            parts.append(rows.filter(pc.equal(rows["split"], split)))
    train, val = (pa.concat_tables([_PLAIN.empty_table(), *parts]) for parts in found_in.values())
    val_keys = val["key"].to_pylist()
    found: dict[str, str] = {}
    for train_row, val_row, bits in _near_pairs(_hashes(train), _hashes(val)):
        key = train["key"][train_row].as_py()
        reason = f"near duplicate of {val_keys[val_row]} ({bits} of 64 bits differ)"
        found[key] = min(reason, found.get(key, reason))
    by_bytes = dict(zip(val["source_sha256"].to_pylist(), val_keys, strict=True))
    same = np.flatnonzero(pc.is_in(train["source_sha256"], val["source_sha256"]).to_numpy())
    for train_row in same.tolist():
        other = by_bytes[train["source_sha256"][train_row].as_py()]
        found[train["key"][train_row].as_py()] = f"the same file as {other}"
    return found


def _hashes(rows: pa.Table) -> np.ndarray:
    hashes: np.ndarray = rows["phash"].to_numpy().view(np.uint64)
    return hashes


def _near_pairs(train: np.ndarray, val: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Rows whose hashes differ in few bits. Compares only those that agree in a band."""
    width = 64 // BANDS
    for band in range(BANDS):
        shift = np.uint64(band * width)
        mask = np.uint64(2**width - 1)
        of_val = (val >> shift) & mask
        order = np.argsort(of_val, kind="stable")
        of_train = (train >> shift) & mask
        first = np.searchsorted(of_val[order], of_train, "left")
        counts = np.searchsorted(of_val[order], of_train, "right") - first
        train_rows = np.repeat(np.arange(len(train)), counts)
        # Within each run of equal train rows: first, first + 1, ...
        steps = np.arange(len(train_rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        val_rows = order[np.repeat(first, counts) + steps]
        bits = np.bitwise_count(train[train_rows] ^ val[val_rows])
        for index in np.flatnonzero(bits <= NEAR_BITS).tolist():
            yield int(train_rows[index]), int(val_rows[index]), int(bits[index])
