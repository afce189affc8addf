"""From one shard's plan to its samples: read, decode, scale, sketch, encode."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from cluster.storage import MissingKeyError, StorageError
from data_prep.catalogue import SCHEMA
from data_prep.files import Picture
from data_prep.landmarks import PACKAGED_SHA256 as LANDMARKS_SHA256
from data_prep.landmarks import FaceDetector, rescaled
from data_prep.pictures import (
    Decoded,
    PictureError,
    Pixels,
    Strokes,
    decode,
    encode_jpeg,
    encode_sketch,
    fit,
)
from data_prep.shards import RawSample, canonical_json
from data_prep.sketch import face_strokes
from data_prep.sources import read_picture

log = logging.getLogger(__name__)

CHUNK = 16  # pictures that are read ahead, and that may wait for their edges together
BATCH = 8  # pictures of one size that go through the network together
READERS = 8  # threads, for storage that answers slowly

Row = dict[str, Any]
Batch = UInt8[np.ndarray, "batch height width 3"]
StartEdges = Callable[[Batch], Callable[[], UInt8[np.ndarray, "batch height width"]]]
"""Begins to look for edges; calling what comes back waits for the strokes."""


@dataclass(frozen=True)
class Recipe:
    """Every setting that shapes the bytes of a sample; part of the digest."""

    stored_px: int
    jpeg_quality: int
    max_pixels: int
    threshold: float
    line_width: int
    hed_sha256: str | None
    hed_precision: str
    hed_device: str

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"landmarks_sha256": LANDMARKS_SHA256}


@dataclass
class _Work:
    """A picture on its way through the steps."""

    picture: Picture
    row: Row
    jpg: bytes = b""
    pixels: Pixels | None = None
    strokes: Strokes | None = None


def make_samples(
    pictures: Sequence[Picture], recipe: Recipe, *, root: str | None, start_edges: StartEdges
) -> Iterator[tuple[Row, RawSample | None]]:
    """One row of the manifest per picture, in order, and a sample where there is one.

    A picture that cannot be used becomes a row that says why. While the edges of some pictures
    are found, the next are decoded; memory holds two chunks of pictures at most.
    Raises StorageError where the storage, not a picture, is at fault.
    """
    with ThreadPoolExecutor(READERS) as readers:
        waiting: deque[tuple[list[_Work], Callable[[], None]]] = deque()
        for chunk in _read_ahead(pictures, root, readers):
            works = [_begin(picture, data, recipe) for picture, data in chunk]
            waiting.append((works, _start(works, start_edges)))
            if len(waiting) == 2:
                yield from _finished(*waiting.popleft(), recipe)
        for works, wait in waiting:
            yield from _finished(works, wait, recipe)


def _read_ahead(
    pictures: Sequence[Picture], root: str | None, readers: ThreadPoolExecutor
) -> Iterator[list[tuple[Picture, Future[bytes]]]]:
    chunks = [pictures[start : start + CHUNK] for start in range(0, len(pictures), CHUNK)]
    ahead: deque[list[tuple[Picture, Future[bytes]]]] = deque()
    for chunk in chunks:
        ahead.append([(picture, readers.submit(read_picture, picture, root)) for picture in chunk])
        if len(ahead) == 2:
            yield ahead.popleft()
    yield from ahead


def _begin(picture: Picture, data: Future[bytes], recipe: Recipe) -> _Work:
    """Everything up to the edges."""
    work = _Work(picture, _empty_row(picture))
    try:
        _decode_and_encode(work, _content(data), recipe)
    except PictureError as error:
        status = "skipped" if error.reason == "too_small" else "failed"
        work.row |= {
            "status": status,
            "error_type": error.reason,
            "error_message": str(error),
        }
    return work


def _content(data: Future[bytes]) -> bytes:
    """What was read; faults of one file are the picture's, others are not ours to record."""
    try:
        return data.result()
    except MissingKeyError:
        raise PictureError("missing", "the file is gone") from None
    except StorageError as error:
        if isinstance(error.__cause__, PermissionError | IsADirectoryError):
            raise PictureError("unreadable", str(error.__cause__.strerror)) from None
        raise


def _decode_and_encode(work: _Work, data: bytes, recipe: Recipe) -> None:
    picture, row = work.picture, work.row
    row["source_sha256"] = hashlib.sha256(data).hexdigest()
    # Twice the size is enough to scale down well; a crop is given in pixels of the whole picture.
    enough_px = None if picture.crop else 2 * recipe.stored_px
    decoded = decode(data, enough_px=enough_px, max_pixels=recipe.max_pixels)
    row |= {"source_width": decoded.width, "source_height": decoded.height}
    if picture.crop:
        decoded = decoded.cropped(picture.crop)
    pixels = fit(decoded, recipe.stored_px)
    height, width = pixels.shape[:2]
    # A JPEG that is stored as it is loses nothing.
    as_it_is = decoded.plain_jpeg and (width, height) == (decoded.width, decoded.height)
    work.jpg = data if as_it_is else encode_jpeg(pixels, recipe.jpeg_quality)
    row |= {
        "width": width,
        "height": height,
        "bytes": len(work.jpg),
        "phash": perceptual_hash(pixels),
        "status": "ok",
    }
    if picture.subject == "face":
        _join_landmarks(work, decoded, (height, width), recipe)
    else:
        work.pixels = pixels
        row |= {
            "sketch_kind": "hed",
            "sketch_status": "ok",
            "detector": f"hed {recipe.hed_precision} {recipe.hed_device}",
            "detector_weights_sha256": recipe.hed_sha256,
            "threshold": recipe.threshold,
        }


def _join_landmarks(work: _Work, decoded: Decoded, stored: tuple[int, int], recipe: Recipe) -> None:
    # On the larger picture: at the stored size, faces may be too small to be found.
    face = _face_detector()(decoded.pixels)
    work.row |= {"detector": "dlib", "detector_weights_sha256": LANDMARKS_SHA256}
    if face is None:
        work.strokes = np.zeros(stored, np.uint8)
        work.row |= {"sketch_kind": "empty", "sketch_status": "no_face"}
        return
    points = rescaled(face.points, decoded.pixels.shape[:2], stored)
    box = rescaled(np.array(face.box).reshape(2, 2), decoded.pixels.shape[:2], stored)
    work.strokes = face_strokes(points, *stored, line_width=recipe.line_width)
    work.row |= {
        "sketch_kind": "landmarks68",
        "sketch_status": "ok",
        "face_box": [round(value, 2) for value in box.ravel().tolist()],
        "landmarks": [round(value, 2) for value in points.ravel().tolist()],
    }


@cache
def _face_detector() -> FaceDetector:
    return FaceDetector()  # half a second and 100 MB: once per process


def _start(works: list[_Work], start_edges: StartEdges) -> Callable[[], None]:
    """Send the scenes off in batches of one size; the result waits for and keeps their strokes."""
    scenes = sorted(
        (work for work in works if work.pixels is not None),
        key=lambda work: (work.row["width"], work.row["height"], work.picture.key),
    )
    started = []
    for _, same_size in itertools.groupby(
        scenes, key=lambda work: (work.row["width"], work.row["height"])
    ):
        group = list(same_size)
        for first in range(0, len(group), BATCH):
            batch = group[first : first + BATCH]
            stacked = np.stack([work.pixels for work in batch if work.pixels is not None])
            started.append((batch, start_edges(stacked)))

    def wait() -> None:
        for batch, finish in started:
            for work, strokes in zip(batch, finish(), strict=True):
                work.strokes = strokes

    return wait


def _finished(
    works: list[_Work], wait: Callable[[], None], recipe: Recipe
) -> Iterator[tuple[Row, RawSample | None]]:
    wait()
    for work in works:
        if work.strokes is None:
            yield work.row, None
            continue
        work.row["sketch_density"] = float(work.strokes.mean(dtype=np.float64))
        meta = canonical_json(_provenance(work.row, recipe))
        sketch = encode_sketch(work.strokes)
        yield work.row, RawSample(work.picture.key, work.jpg, sketch, meta)


PROVENANCE = (
    *("key", "source_path", "source_sha256", "source_width", "source_height", "crop"),
    *(
        "width",
        "height",
        "sketch_kind",
        "sketch_status",
        "detector",
        "detector_weights_sha256",
        "threshold",
    ),
    *("face_box", "landmarks"),
)


def _provenance(row: Row, recipe: Recipe) -> dict[str, Any]:
    """The sample's JSON; every sample has every field, with null where it does not apply."""
    line_width = recipe.line_width if row["sketch_kind"] == "landmarks68" else None
    return {name: row[name] for name in PROVENANCE} | {"line_width": line_width}


def _empty_row(picture: Picture) -> Row:
    row: Row = dict.fromkeys(SCHEMA.names)
    # A file name need not be UTF-8, a column of text must.
    path = picture.path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    crop = list(picture.crop) if picture.crop else None
    return row | {"key": picture.key, "split": picture.split, "source_path": path, "crop": crop}


def perceptual_hash(pixels: Pixels) -> int:
    """64 bits that similar pictures share: signs of the lowest frequencies, as a signed integer."""
    gray = cv2.cvtColor(
        cv2.resize(pixels, (32, 32), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY
    )
    low = cv2.dct(gray.astype(np.float32))[:8, :8].ravel()
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), signed=True)
