"""Where pictures come from: which there are, under which keys, and in which split."""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from cluster.storage import one_line, open_store
from data_prep import celebahq, places2
from data_prep.files import (
    SUFFIXES,
    SourceImage,
    Subject,
    key_of,
    list_files,
    read_file,
    split_by_name,
)
from data_prep.shards import Split

log = logging.getLogger(__name__)

Source = Literal["bundled", "folder", "places2", "celebahq"]


def list_images(
    source: Source,
    *,
    root: str | None = None,
    subject: Subject = "scene",
    val_fraction: float = 0.05,
    split: str = "official",
    partial: bool = False,
) -> list[SourceImage]:
    """Every picture of a source, sorted by key; the pictures are not opened.

    ``root`` is a path, ``file://`` or ``s3://``: a folder, or one tar. ``subject`` is for
    ``folder``: the others know theirs. ``val_fraction`` holds out a share of a ``folder``, and of
    ``celebahq`` where its ``split`` is ``val_fraction`` and not ``official`` or the URL of a list
    of the held-out pictures; the other sources have fixed splits.
    ``partial`` accepts a part of Places2 or CelebA-HQ, whose published counts are asserted else.
    Raises ValueError where pictures are missing, StorageError where ``root`` cannot be listed.
    """
    if source == "bundled":
        return _sorted(_bundled())
    if root is None:
        raise ValueError(f"source '{source}' needs a root: the folder of the pictures")
    files = list_files(root)
    if source == "places2":
        return _sorted(places2.pictures(files, root, partial=partial))
    if source == "celebahq":
        faces = celebahq.pictures(
            files, root, split=split, val_fraction=val_fraction, partial=partial
        )
        return _sorted(faces)
    splits = _folder_splits(_chosen(files, root), root, val_fraction)
    return _sorted(
        SourceImage(key_of(path), split_, subject, path, source, member=files[path])
        for path, split_ in splits.items()
    )


def read_image(picture: SourceImage, root: str | None) -> bytes:
    """The bytes of a picture's file. Raises StorageError."""
    if picture.source == "bundled":
        package, _, name = picture.path.partition("/")
        return open_store(str(_package_folder(package))).get(name)
    assert root is not None
    return read_file(root, picture.path, picture.member)


def _sorted(pictures: Iterable[SourceImage]) -> list[SourceImage]:
    return sorted(pictures, key=lambda picture: picture.key)


def _chosen(paths: Iterable[str], root: str) -> list[str]:
    """Those whose suffix is that of a picture; of the others it is told what they are."""
    chosen, others = [], Counter[str]()
    for path in paths:
        suffix = Path(path).suffix.lower()
        if suffix in SUFFIXES:
            chosen.append(path)
        else:
            others[suffix or "no suffix"] += 1
    if others:
        log.warning(
            "files that are no pictures left out count=%d (%s) root=%s",
            others.total(),
            one_line(", ".join(f"{suffix} {count}" for suffix, count in others.most_common(5))),
            root,
        )
    return chosen


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


def _bundled() -> Iterator[SourceImage]:
    splits: list[tuple[Split, dict[str, tuple[int, int]], int]] = [
        ("train", BUNDLED_TRAIN, 3),
        ("val", BUNDLED_VAL, 2),
    ]
    for split, photographs, columns in splits:
        for path, (width, height) in photographs.items():
            windows = [(0, 0, width, height), *_windows(width, height, columns)]
            for number, crop in enumerate(windows):
                yield SourceImage(
                    f"{Path(path).stem}-{number}", split, "scene", path, "bundled", crop
                )
    for number, crop in enumerate(FACE_CROPS):
        yield SourceImage(f"astronaut-{number}", "train", "face", BUNDLED_FACE, "bundled", crop)


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


def _folder_splits(paths: list[str], root: str, val_fraction: float) -> dict[str, Split]:
    """Folders ``train`` and ``val``, where both exist, are the splits; else the names decide."""
    if not paths:
        raise ValueError(f"{root} holds no pictures ({' '.join(sorted(SUFFIXES))})")
    tops = {path.partition("/")[0] for path in paths if "/" in path}
    if not {"train", "val"} <= tops:
        return split_by_name(paths, val_fraction)
    splits: dict[str, Split] = {path: "train" for path in paths if path.startswith("train/")}
    splits |= {path: "val" for path in paths if path.startswith("val/")}
    if others := len(paths) - len(splits):
        log.warning("pictures outside of train/ and val/ left out count=%d root=%s", others, root)
    return splits
