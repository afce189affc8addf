"""Make the samples of a shard: read, decode, scale, sketch, encode."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from cluster.storage import MissingKeyError, StorageError, one_line
from data_prep.duplicates import perceptual_hash
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
from data_prep.landmarks import PACKAGED_SHA256 as LANDMARKS_SHA256
from data_prep.landmarks import SEARCH, FaceDetector, rescaled
from data_prep.manifest import PROVENANCE, SCHEMA, ManifestRow
from data_prep.settings import DataSettings, SketchSettings
from data_prep.shards import RawSample, canonical_json
from data_prep.sketches import face_strokes
from data_prep.sources import ReadImage

log = logging.getLogger(__name__)

CHUNK = 16  # images that are read ahead, and that wait for their edges together
BATCH = 8  # images of one size that go through the network together
READERS = 8  # threads, since storage may answer slowly
FAULTS_OF_A_FILE = {
    *(errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
}

ImageBatch = UInt8[np.ndarray, "batch height width 3"]
StartEdges = Callable[[ImageBatch], Callable[[], UInt8[np.ndarray, "batch height width"]]]
"""Starts the search for edges; the function it returns waits for the strokes."""


@dataclass(frozen=True)
class SampleSettings:
    """Everything that shapes the bytes of a sample; ``record`` is part of the digest.

    How edges or faces are found is None in the record where no image is a scene, or none a face:
    a dataset must not depend on hardware or files that it has no use for.
    """

    data: DataSettings
    sketch: SketchSettings
    hed_sha256: str | None
    """Digest of the HED weights; None where no image is a scene."""
    hed_device: Literal["cpu", "cuda"] | None
    """Where edges are found; None where no image is a scene."""
    faces: bool
    """Whether any image is a face."""

    def record(self) -> dict[str, Any]:
        """As shard records and ``dataset.json`` keep it."""
        scenes = self.hed_sha256 is not None
        # Left out at their defaults, which are older than these settings.
        newer: dict[str, Any] = {} if self.data.color == "keep" else {"color": self.data.color}
        if scenes and self.sketch.detect_px is not None:
            newer["detect_px"] = self.sketch.detect_px
        return newer | {
            "stored_px": self.data.stored_px,
            "jpeg_quality": self.data.jpeg_quality,
            "max_pixels": self.data.max_pixels,
            "threshold": self.sketch.threshold,
            "line_width": self.sketch.line_width_px,
            "hed_sha256": self.hed_sha256,
            "hed_precision": self.sketch.hed_precision if scenes else None,
            "hed_output": self.sketch.hed_output if scenes else None,
            "hed_device": self.hed_device,
            "landmarks_sha256": LANDMARKS_SHA256 if self.faces else None,
            "face_search": SEARCH if self.faces else None,
        }


IMAGE_SETTINGS = (
    "stored_px",
    "jpeg_quality",
    "max_pixels",
    "color",
)  # a stored JPEG follows from these
LANDMARK_SETTINGS = ("landmarks_sha256", "face_search")
SKETCH_SETTINGS: dict[Subject, tuple[str, ...]] = {
    "scene": (
        "threshold",
        "hed_sha256",
        "hed_precision",
        "hed_output",
        "hed_device",
        "detect_px",
    ),
    "face": ("line_width", *LANDMARK_SETTINGS),
}


@dataclass(frozen=True)
class ReusableSample:
    """A sample of an earlier build, with its row: its image need not be read again."""

    row: ManifestRow
    sample: RawSample

    def serves(self, image: SourceImage, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
        """Whether this is ``image``; ``old`` and ``new`` are records of the sample settings."""
        settings = IMAGE_SETTINGS + (LANDMARK_SETTINGS if image.subject == "face" else ())
        crop = list(image.crop) if image.crop else None
        return (
            self.row["source_path"] == _text(image.path)
            and self.row["crop"] == crop
            and (self.row["sketch_kind"] == "hed") == (image.subject == "scene")
            and _equal(settings, old, new)
        )


@dataclass(frozen=True)
class EarlierSamples:
    """What an earlier build stored of the same shard."""

    samples: Mapping[str, ReusableSample]
    """By key."""
    settings: Mapping[str, Any]
    """``SampleSettings.record()`` of the settings they were made with."""


def _equal(settings: Sequence[str], old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return all(old.get(setting) == new.get(setting) for setting in settings)


@dataclass
class _Work:
    """An image on its way through the steps."""

    image: SourceImage
    row: ManifestRow
    jpg: bytes = b""
    pixels: Pixels | None = None
    strokes: Strokes | None = None
    sample: RawSample | None = None


def make_samples(
    images: Sequence[SourceImage],
    settings: SampleSettings,
    *,
    read: ReadImage,
    start_edges: StartEdges,
    earlier: EarlierSamples | None = None,
    excluded: Mapping[str, str] | None = None,
) -> Iterator[tuple[ManifestRow, RawSample | None]]:
    """One row of the manifest per image, in order, and its sample unless the image is unusable.

    The row of an unusable image gives the reason, as do those of ``excluded``, reasons by key.
    Edges of some images are found while the next are decoded; memory holds at most two chunks of
    images. ``earlier`` samples are reused: whole where the settings of their sketches are the
    same, else with a new sketch. Raises StorageError for faults of the storage, as opposed to
    those of one file.
    """
    record = settings.record()
    reusable = {
        image.key: earlier.samples[image.key]
        for image in images
        if earlier
        and image.key in earlier.samples
        and earlier.samples[image.key].serves(image, earlier.settings, record)
    }
    old = earlier.settings if earlier else {}
    with ThreadPoolExecutor(READERS) as readers:
        waiting: deque[tuple[list[_Work], Callable[[], None]]] = deque()
        for chunk in _read_ahead(images, reusable, read, settings.data.root, readers):
            works = [
                _begin(image, data, settings)
                if isinstance(data, Future)
                else _reuse(
                    image,
                    data,
                    settings,
                    whole=_equal(SKETCH_SETTINGS[image.subject], old, record),
                )
                for image, data in chunk
            ]
            waiting.append((works, _start(works, start_edges)))
            if len(waiting) == 2:
                yield from _finished(*waiting.popleft(), settings, excluded or {})
        for works, wait in waiting:
            yield from _finished(works, wait, settings, excluded or {})


def _read_ahead(
    images: Sequence[SourceImage],
    reusable: Mapping[str, ReusableSample],
    read: ReadImage,
    root: str | None,
    readers: ThreadPoolExecutor,
) -> Iterator[list[tuple[SourceImage, Future[bytes] | ReusableSample]]]:
    ahead: deque[list[tuple[SourceImage, Future[bytes] | ReusableSample]]] = deque()
    for start in range(0, len(images), CHUNK):
        ahead.append(
            [
                (image, reusable.get(image.key) or readers.submit(read, image, root))
                for image in images[start : start + CHUNK]
            ]
        )
        if len(ahead) == 2:
            yield ahead.popleft()
    yield from ahead


def _begin(image: SourceImage, data: Future[bytes], settings: SampleSettings) -> _Work:
    """Everything up to the edges."""
    work = _Work(image, _empty_row(image))
    try:
        _decode_and_encode(work, _content(data), settings)
    except ImageError as error:
        status = "skipped" if error.reason in ("too_small", "too_long") else "failed"
        _refuse(work.row, status, error.reason, str(error))
    except StorageError:
        raise
    except Exception as error:
        what = f"{image.path} (key {image.key}): {type(error).__name__}: {error}"
        raise RuntimeError(one_line(what)) from error
    return work


def _refuse(row: ManifestRow, status: str, reason: str, message: str) -> None:
    row |= {"status": status, "error_type": reason, "error_message": message}


def _reuse(
    image: SourceImage, earlier: ReusableSample, settings: SampleSettings, *, whole: bool
) -> _Work:
    """Reuse an earlier sample, whole or without its sketch."""
    work = _Work(image, earlier.row, earlier.sample.jpg)
    if whole:
        work.sample = earlier.sample
        return work
    meta = json.loads(earlier.sample.meta)
    if image.subject == "scene":
        _await_edges(work, settings)
    elif meta["landmarks"] is None:
        work.strokes = np.zeros((meta["height"], meta["width"]), np.uint8)
    else:
        work.row |= {"landmarks": meta["landmarks"], "face_box": meta["face_box"]}
        _join_landmarks(work, settings)
    return work


def _content(data: Future[bytes]) -> bytes:
    """The bytes read; faults of one file become ImageError, faults of the storage are raised."""
    try:
        return data.result()
    except MissingKeyError:
        raise ImageError("missing", "the file is gone") from None
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in FAULTS_OF_A_FILE:
            raise ImageError("unreadable", str(cause.strerror)) from None
        raise


def _decode_and_encode(work: _Work, data: bytes, settings: SampleSettings) -> None:
    image, row = work.image, work.row
    row["source_sha256"] = hashlib.sha256(data).hexdigest()
    # Twice the size is enough to scale down well and to find faces in; a crop is in pixels of the
    # whole image.
    enough_px = None if image.crop else 2 * settings.data.stored_px
    decoded = decode(
        data,
        enough_px=enough_px,
        max_pixels=settings.data.max_pixels,
        color=settings.data.color,
    )
    row |= {"source_width": decoded.width, "source_height": decoded.height}
    if image.crop:
        decoded = decoded.cropped(image.crop)
    pixels = fit(decoded, settings.data.stored_px)
    height, width = pixels.shape[:2]
    # A JPEG of the right size is stored unchanged, without loss.
    unchanged = decoded.plain_jpeg and (width, height) == (decoded.width, decoded.height)
    work.jpg = data if unchanged else encode_jpeg(pixels, settings.data.jpeg_quality)
    row |= {
        "width": width,
        "height": height,
        "bytes": len(work.jpg),
        "phash": perceptual_hash(pixels),
        "status": "ok",
    }
    if image.subject == "face":
        _find_landmarks(work, decoded, settings)
    else:
        _await_edges(work, settings)


def _await_edges(work: _Work, settings: SampleSettings) -> None:
    # Edges of the stored image, so that the sketches can be made again from the shards.
    sketch = settings.sketch
    work.pixels = decode(work.jpg).pixels
    work.row |= {
        "sketch_kind": "hed",
        "sketch_status": "ok",
        "detector": f"hed {sketch.hed_output} {sketch.hed_precision} {settings.hed_device}",
        "detector_weights_sha256": settings.hed_sha256,
        "threshold": sketch.threshold,
    }


def _find_landmarks(work: _Work, decoded: Decoded, settings: SampleSettings) -> None:
    # In the larger image, since faces may be too small at the stored size.
    row = work.row
    face = _face_detector()(decoded.pixels)
    row |= {"detector": "dlib", "detector_weights_sha256": LANDMARKS_SHA256}
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
    _join_landmarks(work, settings)


def _join_landmarks(work: _Work, settings: SampleSettings) -> None:
    row = work.row
    points = np.array(row["landmarks"]).reshape(68, 2)
    work.strokes = face_strokes(
        points, row["height"], row["width"], line_width=settings.sketch.line_width_px
    )


@cache
def _face_detector() -> FaceDetector:
    return FaceDetector()  # half a second and 100 MB: once per process


def _start(works: list[_Work], start_edges: StartEdges) -> Callable[[], None]:
    """Start on the scenes in batches of one size; the result waits for their strokes."""
    scenes = sorted(
        (work for work in works if work.pixels is not None),
        key=lambda work: (work.row["width"], work.row["height"], work.image.key),
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
    settings: SampleSettings,
    excluded: Mapping[str, str],
) -> Iterator[tuple[ManifestRow, RawSample | None]]:
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
            meta = canonical_json(_provenance(row, settings))
            sketch = encode_sketch(work.strokes)
            yield row, RawSample(row["key"], work.jpg, sketch, meta)


def _provenance(row: ManifestRow, settings: SampleSettings) -> dict[str, Any]:
    """The sample's JSON; every sample has every field, with null where it does not apply."""
    line_width = settings.sketch.line_width_px if row["sketch_kind"] == "landmarks68" else None
    return {name: row.get(name) for name in PROVENANCE} | {"line_width": line_width}


def _empty_row(image: SourceImage) -> ManifestRow:
    row: ManifestRow = dict.fromkeys(SCHEMA.names)
    return row | {
        "key": image.key,
        "split": image.split,
        "source_path": _text(image.path),
        "crop": list(image.crop) if image.crop else None,
    }


def _text(path: str) -> str:
    """A path as UTF-8, which a column of text must be and a file name need not."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
