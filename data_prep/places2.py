"""Places2 (Places365) in its common layouts."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import NamedTuple

from data_prep.files import Files, SourceImage, key_of, read_file
from data_prep.shards import Split

log = logging.getLogger(__name__)

# Published counts. The challenge's own notes give 8,097,967 in one place; 8,026,628 are listed.
TRAIN_COUNTS = {"standard": 1_803_460, "challenge": 8_026_628}
VAL_COUNT = 36_500


class Published(NamedTuple):
    md5: str
    bytes: int | None
    """None where no source states the exact size."""


# MD5 sums as torchvision has them; sizes from TensorFlow Datasets.
ARCHIVES = {
    "train_256_places365standard.tar": Published(
        "53ca1c756c3d1e7809517cc47c5561c5", 26_103_685_120
    ),
    "train_256_places365challenge.tar": Published("741915038a5e3471ec7332404dfb64ef", None),
    "val_256.tar": Published("e27b17d8d44f4af9a78502beb927f808", 525_158_400),
    "test_256.tar": Published("f532f6ad7b582262a2ec8009075e186b", 4_736_829_440),
    "train_large_places365standard.tar": Published("67e186b496a84c929568076ed01a8aa1", None),
    "train_large_places365challenge.tar": Published("605f18e68e510c82b958664ea134545f", None),
    "val_large.tar": Published("9b71c4993ad89d2d8bcbdc4aef38042f", None),
    "test_large.tar": Published("41a4b6b724b1d2cd862fb3871ed59913", None),
    "filelist_places365-standard.tar": Published("35a0585fee1fa656440f3ab298f8479c", 67_498_496),
    "filelist_places365-challenge.tar": Published("70a8307e459c3de41690a7c76c931734", None),
}
# The lists of the images in each split; MD5 sums as torchvision has them.
LISTS = {
    "places365_train_standard.txt": Published("30f37515461640559006b8329efbed1a", None),
    "places365_train_challenge.txt": Published("b2931dc997b8c33c27e7329c073a6b57", None),
    "places365_val.txt": Published("e9f2fd57bfd9d07630173f4e8708e4b1", None),
}

# As unpacked, and as torchvision renames it.
TRAIN = re.compile(
    r"(?:.*/)?data_(?P<size>256|large)(?:_(?P<kind>standard|challenge))?/(?P<name>\w/.+\.jpg)"
)
VAL = re.compile(r"(?:.*/)?val_(?P<size>256|large)/(?P<name>Places365_val_\d{8}\.jpg)")
# places365standard_easyformat.tar, LaMa's folders, and what else has a folder per split.
BY_FOLDER = re.compile(r"(?:.*/)?(?P<split>train|val)/(?P<name>.+\.(?:jpg|png))")
TRAIN_TAR = re.compile(r"(?:.*/)?train_(?:256|large)_places365(?P<kind>standard|challenge)\.tar")
TRAIN_LIST = re.compile(r"(?:.*/)?places365_train_(?P<kind>standard|challenge)\.txt")
VAL_LIST = re.compile(r"(?:.*/)?places365_val\.txt")


def list_images(files: Files, root: str, *, allow_partial: bool) -> Iterator[SourceImage]:
    """Train and val images; official lists below ``root`` decide which ones.

    Keys are the same for archives and for unpacked folders of any name:
    ``data_256/a/airfield/00000001``. A listed image without a file stays, and is reported as
    missing. The published counts are checked unless ``allow_partial``.
    """
    train, val, kind = _found(files, root)
    train_lists = {match["kind"]: path for path in files if (match := TRAIN_LIST.fullmatch(path))}
    if kind:  # of two lists, the one of these images
        train_lists = {of: path for of, path in train_lists.items() if of == kind}
    if len(train_lists) > 1:
        raise ValueError(
            f"{root} holds the lists of both editions, {' and '.join(train_lists.values())}, and "
            "the images could be either: remove one list"
        )
    for of, path in train_lists.items():
        kind = of
        train = _as_listed(train, _listed(root, path, files), "data", path)
    for path in filter(VAL_LIST.fullmatch, files):
        val = _as_listed(val, _listed(root, path, files), "val", path)
    if not train:
        raise ValueError(f"{root} holds no Places2: data_256, data_large or places365_standard")
    if not allow_partial:
        _assert_counts(root, len(train), len(val), kind)
    splits: list[tuple[Split, dict[str, str]]] = [("train", train), ("val", val)]
    for split, of_split in splits:
        for name, path in of_split.items():
            yield SourceImage(key_of(name), split, "scene", path, "places2", place=files.get(path))


def _found(files: Files, root: str) -> tuple[dict[str, str], dict[str, str], str | None]:
    """Canonical names to paths for train and val, and the edition if the names say it."""
    train: dict[str, str] = {}
    val: dict[str, str] = {}
    sizes, folders, tars = set(), set(), set()
    for path, member in files.items():
        if match := TRAIN.fullmatch(path):
            train[f"data_{match['size']}/{match['name']}"] = path
            sizes.add(match["size"])
            if member is None:
                folders.add(match["kind"])
            elif tar := TRAIN_TAR.fullmatch(member.tar or root):
                tars.add(tar["kind"])
        elif match := VAL.fullmatch(path):
            val[f"val_{match['size']}/{match['name']}"] = path
            sizes.add(match["size"])
    if len(sizes) > 1:
        raise ValueError(
            f"{root} holds the 256 and the large images: point data.root at one of them"
        )
    kinds = (folders | tars) - {None}
    if len(folders) > 1 or len(kinds) > 1:
        raise ValueError(f"{root} holds more than one edition: point data.root at one")
    if not train:
        for path in files:
            if match := BY_FOLDER.fullmatch(path):
                of_split = train if match["split"] == "train" else val
                of_split[f"{match['split']}/{match['name']}"] = path
    return train, val, next(iter(kinds), None)


def _listed(root: str, path: str, files: Files) -> list[str]:
    """Names of an official list; lines are ``/a/airfield/00000001.jpg 0`` or without the slash."""
    lines = read_file(root, path, files[path]).decode().splitlines()
    return [line.split()[0].removeprefix("/") for line in lines if line.strip()]


def _as_listed(
    found: dict[str, str], names: list[str], folder: str, list_path: str
) -> dict[str, str]:
    """Canonical names to paths of exactly the listed images."""
    if not found:
        return found
    top = next(iter(found)).partition("/")[0]
    if not top.startswith(folder):
        return found  # another layout, whose class names are not in the list
    place = next(iter(found.values()))
    above = place[: -len(next(iter(found)).partition("/")[2])]
    wanted = {f"{top}/{name}": found.get(f"{top}/{name}", above + name) for name in names}
    missing = sum(name not in found for name in wanted)
    if missing or len(found) > len(wanted):
        log.warning(
            "list=%s names=%d missing=%d not_listed=%d",
            *(list_path, len(wanted), missing, len(found) - len(wanted) + missing),
        )
    return wanted


def _assert_counts(root: str, train: int, val: int, kind: str | None) -> None:
    expected = [TRAIN_COUNTS[kind]] if kind else list(TRAIN_COUNTS.values())
    if train not in expected or val != VAL_COUNT:
        wanted = " or ".join(f"{number:,}" for number in expected)
        raise ValueError(
            f"{root} holds {train:,} train and {val:,} val images; Places2 has {wanted} and "
            f"{VAL_COUNT:,} (files of one name overwritten, or an archive missing?): "
            "complete it, or set data.allow_partial"
        )
