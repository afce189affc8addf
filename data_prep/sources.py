"""Where pictures come from: which there are, under which keys, and in which split."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.storage import open_store
from data_prep.shards import Split

log = logging.getLogger(__name__)

Source = Literal["bundled", "folder"]
Subject = Literal["scene", "face"]

SUFFIXES = frozenset(
    [
        *(".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".webp", ".bmp"),
        *(".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"),
    ]
)
LONGEST_KEY = 80


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture to be: a file, or a fixed part of one."""

    key: str
    """Unique in the data set; letters, digits and _ - / = + only."""
    split: Split
    subject: Subject
    path: str
    """Relative to the root of the source, exactly as the file system or bucket has it."""
    source: Source
    crop: tuple[int, int, int, int] | None = None
    """Left, top, right, bottom in pixels of the upright picture."""


def list_pictures(
    source: Source, *, root: str | None = None, subject: Subject = "scene", val_fraction: float
) -> list[Picture]:
    """Every picture of a source, sorted by key; the files are not opened.

    ``root`` (path, ``file://`` or ``s3://``), ``subject`` and ``val_fraction`` are for ``folder``:
    the bundled photographs know their subjects and have a fixed split.
    Raises ValueError where there are none, StorageError where ``root`` cannot be listed.
    """
    if source == "bundled":
        return sorted(_bundled(), key=lambda picture: picture.key)
    if root is None:
        raise ValueError(f"source '{source}' needs a root: the folder of the pictures")
    return _folder(root, subject, val_fraction)


def read_picture(picture: Picture, root: str | None) -> bytes:
    """The bytes of a picture's file. Raises StorageError."""
    if picture.source == "bundled":
        package, _, name = picture.path.partition("/")
        return open_store(str(_package_folder(package))).get(name)
    assert root is not None
    return open_store(root).get(picture.path)


def key_of(path: str) -> str:
    """A key that no other path has: ``a b/c.d.jpg`` becomes ``a+20b/c=d``.

    A final ``.jpg`` goes away, other dots become ``=`` (a dot would end a key in a tar), other
    characters their bytes in hexadecimal; what is too long ends in its hash.
    """
    raw = path.removesuffix(".jpg").encode("utf-8", "surrogateescape")
    key = re.sub(rb"[^A-Za-z0-9_/-]", _escaped, raw).decode("ascii")
    if len(key) > LONGEST_KEY:
        digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        key = f"{key[: LONGEST_KEY - 33]}+{digest}"
    return key


def _escaped(match: re.Match[bytes]) -> bytes:
    return b"=" if match[0] == b"." else b"+%02X" % match[0][0]


# Photographs inside the wheels of scikit-image and scikit-learn. The pictures of the two splits
# are different photographs.
BUNDLED_TRAIN = {
    "skimage/data/camera.png": (512, 512),
    "skimage/data/coffee.png": (600, 400),
    "skimage/data/motorcycle_left.png": (741, 500),
    "skimage/data/motorcycle_right.png": (741, 500),
    "skimage/data/rocket.jpg": (640, 427),
    "sklearn/datasets/images/china.jpg": (640, 427),
}
BUNDLED_VAL = {
    "skimage/data/chelsea.png": (451, 300),
    "sklearn/datasets/images/flower.jpg": (640, 427),
}
BUNDLED_FACE = "skimage/data/astronaut.png"
FACE_CROPS = (
    (64, 0, 320, 256),
    (96, 0, 352, 256),
    (128, 16, 384, 272),
    (112, 0, 400, 288),
    (0, 0, 512, 512),
)


def _bundled() -> Iterator[Picture]:
    splits: list[tuple[Split, dict[str, tuple[int, int]], int]] = [
        ("train", BUNDLED_TRAIN, 3),
        ("val", BUNDLED_VAL, 2),
    ]
    for split, photographs, columns in splits:
        for path, (width, height) in photographs.items():
            windows = [(0, 0, width, height), *_windows(width, height, columns)]
            for number, crop in enumerate(windows):
                yield Picture(f"{Path(path).stem}-{number}", split, "scene", path, "bundled", crop)
    for number, crop in enumerate(FACE_CROPS):
        yield Picture(f"astronaut-{number}", "train", "face", BUNDLED_FACE, "bundled", crop)


def _windows(width: int, height: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Two rows of square windows that reach into the corners; at least 256 pixels each."""
    side = max(256, min(width, height) * 16 // 25)
    for row in range(2):
        for column in range(columns):
            left = (width - side) * column // (columns - 1)
            top = (height - side) * row
            yield left, top, left + side, top + side


def _package_folder(package: str) -> Path:
    """Found without importing the package, which takes a second."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"source 'bundled' needs {package}: pip install 'deepfill-pipeline[demo]'")
    return Path(spec.submodule_search_locations[0])


def _folder(root: str, subject: Subject, val_fraction: float) -> list[Picture]:
    """Any tree. Folders ``train`` and ``val``, where both exist, are the splits."""
    paths = [path for path in _files(root) if Path(path).suffix.lower() in SUFFIXES]
    if not paths:
        raise ValueError(f"{root} holds no pictures ({' '.join(sorted(SUFFIXES))})")
    tops = {path.partition("/")[0] for path in paths if "/" in path}
    splits: dict[str, Split]
    if {"train", "val"} <= tops:
        splits = {path: "train" for path in paths if path.startswith("train/")}
        splits |= {path: "val" for path in paths if path.startswith("val/")}
        if others := len(paths) - len(splits):
            log.warning(
                "pictures outside of train/ and val/ left out count=%d root=%s", others, root
            )
    else:
        splits = _split_by_hash(paths, val_fraction)
    pictures = [
        Picture(key_of(path), split, subject, path, "folder") for path, split in splits.items()
    ]
    return sorted(pictures, key=lambda picture: picture.key)


def _split_by_hash(paths: list[str], val_fraction: float) -> dict[str, Split]:
    """A picture's own name decides, so others that come or go do not move it.

    Where some are to be held out, at least one is.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}: give a share from 0 to less than 1")
    if val_fraction == 0 or len(paths) == 1:
        return dict.fromkeys(paths, "train")
    nearest = min(paths, key=_place)
    return {
        path: "val" if path == nearest or _place(path) < val_fraction else "train" for path in paths
    }


def _place(path: str) -> float:
    """A number in [0, 1) that depends on the path alone."""
    digest = hashlib.blake2b(
        path.encode("utf-8", "surrogateescape"), digest_size=6, person=b"split"
    )
    return int.from_bytes(digest.digest()) / 2**48


def _files(root: str) -> Iterator[str]:
    """Relative paths of every file below a directory or prefix; hidden ones are left out."""
    url = open_store(root).url
    if url.startswith("s3://"):
        for key in open_store(root).list_keys():
            if not any(part.startswith(".") for part in key.split("/")):
                yield key
        return
    if not Path(url).is_dir():
        raise ValueError(f"{root} is not a folder: data.root names the folder of the pictures")
    yield from _walk(url, "", frozenset())


def _walk(folder: str, below: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Links are followed, except those that lead back into a folder on the way here."""
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.name.startswith("."):
            continue
        try:
            if entry.is_dir():
                yield from _walk(entry.path, f"{below}{entry.name}/", above | {identity})
            elif entry.is_file() or not Path(entry.path).exists():
                yield below + entry.name  # a dead link counts: its picture will be missed by name
        except OSError as error:
            log.warning("left out path=%s: %s", entry.path, error.strerror)
