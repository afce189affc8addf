"""From one shard's plan to its samples: read, decode, scale, sketch, encode."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import cv2
import numpy as np
from jaxtyping import UInt8

from cluster.storage import MissingKeyError, StorageError, one_line
from data_prep.files import SourceImage, Subject
from data_prep.images import (
    Decoded,
    ImageError,
    Pixels,
    Strokes,
    decode,
    encode_jpeg,
    encode_sketch,
    fit,
)
from data_prep.landmarks import FaceDetector, rescaled
from data_prep.manifest import PROVENANCE, SCHEMA
from data_prep.shards import RawSample, canonical_json
from data_prep.sketches import face_strokes
from data_prep.sources import read_image

log = logging.getLogger(__name__)

CHUNK = 16  # pictures that are read ahead, and that may wait for their edges together
BATCH = 8  # pictures of one size that go through the network together
READERS = 8  # threads, for storage that answers slowly
FAULTS_OF_A_FILE = {
    *(errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
}

Row = dict[str, Any]
Batch = UInt8[np.ndarray, "batch height width 3"]
StartEdges = Callable[[Batch], Callable[[], UInt8[np.ndarray, "batch height width"]]]
"""Begins to look for edges; calling what comes back waits for the strokes."""


@dataclass(frozen=True)
class SampleSettings:
    """Every setting that shapes the bytes of a sample; part of the digest.

    How edges or faces are found is None where no picture is a scene, or none a face: a data set
    must not depend on hardware or files that it has no use for.
    """

    stored_px: int
    jpeg_quality: int
    max_pixels: int
    threshold: float
    line_width: int
    hed_sha256: str | None
    hed_precision: Literal["fp32", "bf16"] | None
    hed_output: Literal["fused", "averaged"] | None
    hed_device: str | None
    landmarks_sha256: str | None
    face_search: str | None

    def record(self) -> dict[str, Any]:
        return asdict(self)


PICTURE_SETTINGS = ("stored_px", "jpeg_quality", "max_pixels")  # a stored JPEG follows from these
LANDMARK_SETTINGS = ("landmarks_sha256", "face_search")
SKETCH_SETTINGS: dict[Subject, tuple[str, ...]] = {
    "scene": ("threshold", "hed_sha256", "hed_precision", "hed_output", "hed_device"),
    "face": ("line_width", *LANDMARK_SETTINGS),
}


@dataclass(frozen=True)
class ReusableSample:
    """A sample that an earlier build made, with its row: its picture need not be read again."""

    row: Row
    sample: RawSample

    def serves(self, picture: SourceImage, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
        """Whether this is ``picture``; ``old`` and ``new`` are the records of the two recipes."""
        settings = PICTURE_SETTINGS + (LANDMARK_SETTINGS if picture.subject == "face" else ())
        crop = list(picture.crop) if picture.crop else None
        return (
            self.row["source_path"] == _text(picture.path)
            and self.row["crop"] == crop
            and (self.row["sketch_kind"] == "hed") == (picture.subject == "scene")
            and _equal(settings, old, new)
        )


def _equal(settings: Sequence[str], old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return all(old.get(setting) == new[setting] for setting in settings)


@dataclass
class _Work:
    """A picture on its way through the steps."""

    picture: SourceImage
    row: Row
    jpg: bytes = b""
    pixels: Pixels | None = None
    strokes: Strokes | None = None
    sample: RawSample | None = None


def make_samples(
    pictures: Sequence[SourceImage],
    recipe: SampleSettings,
    *,
    root: str | None,
    start_edges: StartEdges,
    known: Mapping[str, ReusableSample] | None = None,
    known_recipe: Mapping[str, Any] | None = None,
    excluded: Mapping[str, str] | None = None,
) -> Iterator[tuple[Row, RawSample | None]]:
    """One row of the manifest per picture, in order, and a sample where there is one.

    A picture that cannot be used becomes a row that says why, as do those in ``excluded``, which
    gives the reasons by key. While the edges of some pictures are found, the next are decoded;
    memory holds two chunks of pictures at most. Samples in ``known``, made under ``known_recipe``,
    are taken over: whole where the settings of their sketches are the same, else with a new one.
    Raises StorageError where the storage, not a picture, is at fault.
    """
    record = recipe.record()
    found = {
        picture.key: known[picture.key]
        for picture in pictures
        if known
        and known_recipe is not None
        and picture.key in known
        and known[picture.key].serves(picture, known_recipe, record)
    }
    with ThreadPoolExecutor(READERS) as readers:
        waiting: deque[tuple[list[_Work], Callable[[], None]]] = deque()
        for chunk in _read_ahead(pictures, found, root, readers):
            works = [
                _begin(picture, data, recipe)
                if isinstance(data, Future)
                else _take_over(
                    picture,
                    data,
                    recipe,
                    whole=_equal(SKETCH_SETTINGS[picture.subject], known_recipe or {}, record),
                )
                for picture, data in chunk
            ]
            waiting.append((works, _start(works, start_edges)))
            if len(waiting) == 2:
                yield from _finished(*waiting.popleft(), recipe, excluded or {})
        for works, wait in waiting:
            yield from _finished(works, wait, recipe, excluded or {})


def _read_ahead(
    pictures: Sequence[SourceImage],
    known: Mapping[str, ReusableSample],
    root: str | None,
    readers: ThreadPoolExecutor,
) -> Iterator[list[tuple[SourceImage, Future[bytes] | ReusableSample]]]:
    ahead: deque[list[tuple[SourceImage, Future[bytes] | ReusableSample]]] = deque()
    for start in range(0, len(pictures), CHUNK):
        ahead.append(
            [
                (picture, known.get(picture.key) or readers.submit(read_image, picture, root))
                for picture in pictures[start : start + CHUNK]
            ]
        )
        if len(ahead) == 2:
            yield ahead.popleft()
    yield from ahead


def _begin(picture: SourceImage, data: Future[bytes], recipe: SampleSettings) -> _Work:
    """Everything up to the edges."""
    work = _Work(picture, _empty_row(picture))
    try:
        _decode_and_encode(work, _content(data), recipe)
    except ImageError as error:
        status = "skipped" if error.reason in ("too_small", "too_long") else "failed"
        _refuse(work.row, status, error.reason, str(error))
    except StorageError:
        raise
    except Exception as error:
        what = f"{picture.path} (key {picture.key}): {type(error).__name__}: {error}"
        raise RuntimeError(one_line(what)) from error
    return work


def _refuse(row: Row, status: str, reason: str, message: str) -> None:
    row |= {"status": status, "error_type": reason, "error_message": message}


def _take_over(
    picture: SourceImage, known: ReusableSample, recipe: SampleSettings, *, whole: bool
) -> _Work:
    """A sample that was made before, as it is or without its sketch."""
    work = _Work(picture, known.row, known.sample.jpg)
    if whole:
        work.sample = known.sample
        return work
    meta = json.loads(known.sample.meta)
    if picture.subject == "scene":
        _await_edges(work, recipe)
    elif meta["landmarks"] is None:
        work.strokes = np.zeros((meta["height"], meta["width"]), np.uint8)
    else:
        work.row |= {"landmarks": meta["landmarks"], "face_box": meta["face_box"]}
        _join_landmarks(work, recipe)
    return work


def _content(data: Future[bytes]) -> bytes:
    """What was read; faults of one file are the picture's, others are not ours to record."""
    try:
        return data.result()
    except MissingKeyError:
        raise ImageError("missing", "the file is gone") from None
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in FAULTS_OF_A_FILE:
            raise ImageError("unreadable", str(cause.strerror)) from None
        raise


def _decode_and_encode(work: _Work, data: bytes, recipe: SampleSettings) -> None:
    picture, row = work.picture, work.row
    row["source_sha256"] = hashlib.sha256(data).hexdigest()
    # Twice the size is enough to scale down well, and faces are looked for in that; a crop is
    # given in pixels of the whole picture.
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
        _find_landmarks(work, decoded, recipe)
    else:
        _await_edges(work, recipe)


def _await_edges(work: _Work, recipe: SampleSettings) -> None:
    # Edges of the picture as it is stored: whoever has the shards can make the sketches again.
    work.pixels = decode(work.jpg).pixels
    work.row |= {
        "sketch_kind": "hed",
        "sketch_status": "ok",
        "detector": f"hed {recipe.hed_output} {recipe.hed_precision} {recipe.hed_device}",
        "detector_weights_sha256": recipe.hed_sha256,
        "threshold": recipe.threshold,
    }


def _find_landmarks(work: _Work, decoded: Decoded, recipe: SampleSettings) -> None:
    # In the larger picture: at the stored size, faces may be too small to be found.
    row = work.row
    face = _face_detector()(decoded.pixels)
    row |= {"detector": "dlib", "detector_weights_sha256": recipe.landmarks_sha256}
    searched, stored = decoded.pixels.shape[:2], (row["height"], row["width"])
    if face is None:
        work.strokes = np.zeros(stored, np.uint8)
        row |= {"sketch_kind": "empty", "sketch_status": "no_face"}
        return
    box = rescaled(np.array(face.box).reshape(2, 2), searched, stored)
    row |= {
        "sketch_kind": "landmarks68",
        "sketch_status": "ok",
        "face_box": np.round(box, 2).ravel().tolist(),
        "landmarks": np.round(rescaled(face.points, searched, stored), 2).ravel().tolist(),
    }
    _join_landmarks(work, recipe)


def _join_landmarks(work: _Work, recipe: SampleSettings) -> None:
    row = work.row
    points = np.array(row["landmarks"]).reshape(68, 2)
    work.strokes = face_strokes(points, row["height"], row["width"], line_width=recipe.line_width)


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
    works: list[_Work],
    wait: Callable[[], None],
    recipe: SampleSettings,
    excluded: Mapping[str, str],
) -> Iterator[tuple[Row, RawSample | None]]:
    wait()
    for work in works:
        row = work.row
        if row["status"] == "ok" and row["key"] in excluded:
            _refuse(row, "skipped", "duplicate", excluded[row["key"]])
            yield row, None
        elif work.strokes is None:
            yield row, work.sample
        else:
            row["sketch_density"] = float(np.float32(work.strokes.mean(dtype=np.float64)))
            meta = canonical_json(_provenance(row, recipe))
            sketch = encode_sketch(work.strokes)
            yield row, RawSample(row["key"], work.jpg, sketch, meta)


def _provenance(row: Row, recipe: SampleSettings) -> dict[str, Any]:
    """The sample's JSON; every sample has every field, with null where it does not apply."""
    line_width = recipe.line_width if row["sketch_kind"] == "landmarks68" else None
    return {name: row.get(name) for name in PROVENANCE} | {"line_width": line_width}


def _empty_row(picture: SourceImage) -> Row:
    row: Row = dict.fromkeys(SCHEMA.names)
    return row | {
        "key": picture.key,
        "split": picture.split,
        "source_path": _text(picture.path),
        "crop": list(picture.crop) if picture.crop else None,
    }


def _text(path: str) -> str:
    """A file name need not be UTF-8, a column of text must."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def perceptual_hash(pixels: Pixels) -> int:
    """64 bits that similar pictures share: signs of the lowest frequencies, as a signed integer."""
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(gray, (32, 32), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small.astype(np.float32))[:8, :8].ravel()
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), signed=True)
