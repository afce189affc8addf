"""Sources of images: every image, its key and its split."""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.storage import one_line, open_store
from data_prep import celebahq, places2, webdataset_source
from data_prep.files import (
    Files,
    SourceImage,
    TarMember,
    key_of,
    list_files,
    read_file,
    split_by_name,
)
from data_prep.images import IMAGE_SUFFIXES
from data_prep.shards import Split

if TYPE_CHECKING:
    from data_prep.settings import DataSettings

log = logging.getLogger(__name__)

ListImages = Callable[["DataSettings"], Iterable[SourceImage]]
ReadImage = Callable[[SourceImage, str | None], bytes]
"""The bytes of an image's file, below the root of its source. Raises StorageError."""


def read_image(image: SourceImage, root: str | None) -> bytes:
    """The bytes of an image that lies below ``root``. Raises StorageError."""
    assert root is not None
    return read_file(root, image.path, image.place)


@dataclass(frozen=True)
class DataSource:
    """One kind of images: how to list and read them, and what belongs in the dataset's card."""

    about: str
    """What it is, in a line."""
    splits: str
    """How it divides its images into train and val, in a line."""
    license: str
    """What may be done with the images; the card says it."""
    list: ListImages
    """Every image, unopened, under a key that is unique in its split. Raises ValueError where
    images are missing, StorageError where ``root`` cannot be listed."""
    read: ReadImage = read_image
    """Called on the workers, so a function of a module that they can import."""
    needs_root: bool = True


def refuse_missing_root(data: DataSettings) -> None:
    """ValueError where ``data.root`` is a path at which nothing is; StorageError for other URLs
    than storage has. Asks no server."""
    if data.root is None:
        return
    path = open_store(data.root).local_path()
    if path is not None and not path.exists():
        place = "" if Path(data.root).is_absolute() else f" in {Path.cwd()}"
        raise ValueError(
            f"data.root={data.root} was not found{place}: give a folder, a tar, or an s3:// prefix"
        )


def list_images(data: DataSettings) -> list[SourceImage]:
    """Every image of ``data.source``, sorted by key; the images are not opened.

    Raises ValueError where images are missing, StorageError where ``root`` cannot be listed.
    """
    return sorted(DATA_SOURCES[data.source].list(data), key=lambda image: image.key)


def _root(data: DataSettings) -> str:
    assert data.root is not None  # DataSettings asks for it
    return data.root


def _list_folder(data: DataSettings) -> Iterator[SourceImage]:
    root = _root(data)
    files = list_files(root)
    paths = _chosen(files, root)
    if not paths:
        raise ValueError(f"{root} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))})")
    if data.split not in ("official", "val_fraction"):
        raise ValueError(
            f"data.split={data.split} is for CelebA-HQ: a folder takes official (folders train and "
            "val, where there are any) or val_fraction"
        )
    splits = None
    if data.split == "official":
        splits = folder_splits(paths, root) or _tar_splits(
            {path: files[path] for path in paths}, root
        )
    for path, split in (splits or split_by_name(paths, data.val_fraction)).items():
        yield SourceImage(key_of(path), split, data.subject, path, data.source, place=files[path])


def _list_places2(data: DataSettings) -> Iterator[SourceImage]:
    root = _root(data)
    return places2.list_images(list_files(root), root, allow_partial=data.allow_partial)


def _list_celebahq(data: DataSettings) -> Iterator[SourceImage]:
    root = _root(data)
    return celebahq.list_images(
        list_files(root),
        root,
        split=data.split,
        val_fraction=data.val_fraction,
        allow_partial=data.allow_partial,
    )


def _list_webdataset(data: DataSettings) -> Iterator[SourceImage]:
    return webdataset_source.list_images(
        _root(data), subject=data.subject, val_fraction=data.val_fraction
    )


def _chosen(paths: Iterable[str], root: str) -> list[str]:
    """The paths with the suffix of an image; the others are counted in the log."""
    chosen, others = [], Counter[str]()
    for path in paths:
        suffix = Path(path).suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            chosen.append(path)
        else:
            others[suffix or "no suffix"] += 1
    if others:
        log.warning(
            "files left out that are not images count=%d (%s) root=%s",
            others.total(),
            one_line(", ".join(f"{suffix} {count}" for suffix, count in others.most_common(5))),
            root,
        )
    return chosen


# Photographs inside the wheels of scikit-image and scikit-learn. The images of the two splits
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


def _list_bundled(_: DataSettings) -> Iterator[SourceImage]:
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


def _read_bundled(image: SourceImage, _: str | None) -> bytes:
    package, _, name = image.path.partition("/")
    return open_store(str(_package_folder(package))).get(name)


def _windows(width: int, height: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Two rows of square windows that reach into the corners, each of at least 256 pixels."""
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


TRAIN_FOLDERS = ("train", "training")
HELD_OUT_FOLDERS = ("val", "valid", "validation", "dev", "eval", "held_out", "holdout", "heldout")
TEST_FOLDERS = ("test", "testing")
# In lower case, the folders that a dataset of others may have; the first name there counts.


def folder_splits(paths: Sequence[str], root: str) -> dict[str, Split] | None:
    """The splits that folders name: ``train`` and ``val``, or what others call them.

    The folders lie directly in ``root``, or one folder down, as in ``cats/train/1.jpg``.
    Where there are several for held-out images, a validation folder counts and ``test`` is left
    out. Images outside these folders are left out, with a warning. None where no folder names a
    split, or all images are in one that does.

    Raises ValueError where folders hold images out that would be mixed with the others.
    """
    for depth in range(2):
        names: dict[str, list[str]] = {}  # in lower case, as they are spelled
        for path in paths:
            folders = path.split("/")[:-1]
            if len(folders) > depth and folders[depth] not in names.setdefault(
                folders[depth].lower(), []
            ):
                names[folders[depth].lower()].append(folders[depth])
        train = next((name for name in TRAIN_FOLDERS if name in names), None)
        held_out = next((n for n in (*HELD_OUT_FOLDERS, *TEST_FOLDERS) if n in names), None)
        if train and held_out:
            return _by_folder(paths, root, depth, {train: "train", held_out: "val"})
        if held_out and not all(
            len(folders := path.lower().split("/")[:-1]) > depth and folders[depth] == held_out
            for path in paths
        ):
            raise ValueError(
                one_line(
                    f"{root} has a folder {names[held_out][0]}, whose images seem held out, and no "
                    f"folder train beside it: move the others to a folder train, or set "
                    "data.split=val_fraction to draw from all of them"
                )
            )
    return None


def _tar_splits(files: Files, root: str) -> dict[str, Split] | None:
    """The splits that the names of tars say, where every image is in a tar of such a name."""
    tars = {place.tar for place in files.values() if isinstance(place, TarMember)}
    named = webdataset_source.named_splits(sorted(tars), root)
    if not named:
        return None
    splits: dict[str, Split] = {}
    for path, place in files.items():
        if not isinstance(place, TarMember):
            raise ValueError(
                one_line(
                    f"{root} has tars that name a split and images outside of tars (first: {path}):"
                    " move those into folders train and val, or away"
                )
            )
        splits[path] = named[place.tar]
    return splits


def _by_folder(
    paths: Sequence[str], root: str, depth: int, kinds: Mapping[str, Split]
) -> dict[str, Split]:
    splits: dict[str, Split] = {}
    for path in paths:
        folders = path.split("/")[:-1]
        if len(folders) > depth and (split := kinds.get(folders[depth].lower())):
            splits[path] = split
    if others := len(paths) - len(splits):
        log.warning(
            "images outside %s left out count=%d root=%s",
            *(" and ".join(f"{name}/" for name in kinds), others, root),
        )
    return splits


DATA_SOURCES = {
    "bundled": DataSource(
        about="Photographs inside the packages scikit-image and scikit-learn.",
        splits="Fixed: train and val are different photographs.",
        license="Photographs in the packages scikit-image and scikit-learn, under the licenses "
        "stated there (public domain, CC0, CC BY); keep those licenses with every copy.",
        list=_list_bundled,
        read=_read_bundled,
        needs_root=False,
    ),
    "folder": DataSource(
        about="Any tree of images, also inside tars.",
        splits="Folders train and val or alike where both exist; else val_fraction, by name.",
        license="That of the images in the folder, which was not stated when this was made.",
        list=_list_folder,
    ),
    "webdataset": DataSource(
        about="Tars of samples with a jpg, jpeg, png or webp member, as img2dataset writes them.",
        splits="As the names of the tars say; else the share val_fraction, by name.",
        license="That of the images in the tars; nothing was said about it when this was made.",
        list=_list_webdataset,
    ),
    "places2": DataSource(
        about="Places2 (Places365), as its archives or unpacked.",
        splits="The published ones.",
        license="Places365: the images belong to their owners; for non-commercial research "
        "and education. Keep this dataset inside your institution.",
        list=_list_places2,
    ),
    "celebahq": DataSource(
        about="CelebA-HQ, as files or in Parquet.",
        splits="Chosen by split: CelebA's partition, a share, or a list of held-out images.",
        license="CelebA-HQ: for non-commercial research; no redistribution, copies at one "
        "site only. This dataset is internal.",
        list=_list_celebahq,
    ),
}
"""Every source of images by the name that a recipe gives it; add an entry for another one."""
