"""CelebA-HQ in its common forms, under the partition of CelebA."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from cluster.storage import folder_and_name, open_store
from data_prep.files import Files, SourceImage, TarMember, key_of, read_file, split_by_name
from data_prep.parquet import ParquetImage, list_parquet
from data_prep.shards import Split

log = logging.getLogger(__name__)

IMAGES = 30_000
OFFICIAL_COUNTS = {"train": 24_183, "val": 2_993, "test": 2_824}
PARTITIONS = ("train", "val", "test")  # 0, 1, 2 in list_eval_partition.txt

# 0.jpg of CelebAMask-HQ, 00001.jpg of data256x256, imgHQ00000.npy, imgHQ00000.png
NAME = re.compile(r"(?:.*/)?(?P<form>imgHQ)?(?P<number>\d{1,5})\.(?:jpg|jpeg|png|npy)")
NOT_IMAGES = re.compile(r"(?:.*/)?CelebAMask-?HQ-mask-anno/.*")
MAPPING, PARTITION = "CelebA-HQ-to-CelebA-mapping.txt", "list_eval_partition.txt"


class _Found(NamedTuple):
    path: str
    name: str
    """What holds its number: the path, or the name in a row of Parquet."""
    place: TarMember | ParquetImage | None


def list_images(
    files: Files,
    root: str,
    *,
    split: str,
    val_fraction: float,
    allow_partial: bool,
) -> Iterator[SourceImage]:
    """Train and val images under keys ``celebahq-00042``, counted from 0 in every form.

    ``split`` ``official`` is CelebA's partition without its test images, joined by the names of the
    original files; it needs the mapping of CelebAMask-HQ and CelebA's partition file below
    ``root``. ``val_fraction`` holds out that share, chosen by the keys. Any other ``split`` is the
    URL of a list of held-out images, as numbers from 0 with or without ``.jpg`` (for instance the
    2,000 that DeepFill and LaMa hold out). The counts are checked unless ``allow_partial``.

    The folders, files or order of a mirror never count as a split or as numbers. Rows of Parquet
    have CelebA-HQ's numbers if the names of all rows contain them. Otherwise keys come from file
    and row, ``data/train-00000-of-00006=parquet/00042``; the official split is then unavailable,
    and a list names such rows: ``data/train-00000-of-00006.parquet/00042``.
    """
    found = _found(files, root)
    if not found:
        raise ValueError(
            f"{root} holds no CelebA-HQ: files like 0.jpg, 00001.jpg, imgHQ00000.npy or *.parquet"
        )
    if not allow_partial and len(found) != IMAGES:
        raise ValueError(
            f"{root} holds {len(found):,} images of CelebA-HQ's {IMAGES:,}: "
            "complete it, or set data.allow_partial"
        )
    numbered = _numbered(found, root)
    if numbered is None:
        if split == "official":
            raise ValueError(
                f"the names of {found[0].path} and the other rows hold no numbers, so there is "
                "no official split: set data.split to val_fraction, or to a list of held-out rows"
            )
        keyed = {key_of(image.path): image for image in found}
    else:
        keyed = {f"celebahq-{number:05d}": numbered[number] for number in sorted(numbered)}
    splits: Mapping[str, str]
    if split == "official":
        splits = _official(files, root, allow_partial)
    elif split == "val_fraction":
        splits = split_by_name(keyed, val_fraction)
    else:
        held_out = _held_out(split, numbered is not None)
        if unknown := sorted(held_out - keyed.keys()):
            message = f"{split} lists {len(unknown):,} images that {root} does not hold"
            if not allow_partial:
                raise ValueError(f"{message}, such as {unknown[0]}")
            log.warning("%s", message)
        splits = {key: "val" if key in held_out else "train" for key in keyed}
    for key, image in keyed.items():
        of = splits.get(key)
        if of is None:
            raise ValueError(f"{MAPPING} has no line for {key}: it is not the published file")
        if of != "test":
            kind: Split = "val" if of == "val" else "train"
            yield SourceImage(key, kind, "face", image.path, "celebahq", place=image.place)


def _found(files: Files, root: str) -> list[_Found]:
    """Images as files, or as rows of Parquet files."""
    found = [
        _Found(path, path, member)
        for path, member in files.items()
        if NAME.fullmatch(path) and not NOT_IMAGES.fullmatch(path)
    ]
    rows = [
        _Found(f"{path}/{number:05d}", name or "", row)
        for path in sorted(files)
        if path.endswith(".parquet")
        for number, (name, row) in enumerate(list_parquet(root, path))
    ]
    if found and rows:
        raise ValueError(
            f"{root} holds images as files, {found[0].path}, and in {rows[0].path}: "
            "point data.root at one of them"
        )
    return found or rows


def _numbered(found: Sequence[_Found], root: str) -> dict[int, _Found] | None:
    """Images by number, counted from 0; None for Parquet without numbers."""
    in_parquet = isinstance(found[0].place, ParquetImage)
    numbers: dict[int, _Found] = {}
    forms = set()
    for image in found:
        match = NAME.fullmatch(image.name)
        if match is None:
            return None
        number = int(match["number"])
        if number in numbers:
            if in_parquet:
                return None  # each split counts from the start
            raise ValueError(
                f"{root} holds image {number} twice, {numbers[number].path} and {image.path}: "
                "point data.root at one of them"
            )
        numbers[number] = image
        forms.add(match["form"])
    if _counts_from_one(numbers, forms, root):
        return {number - 1: image for number, image in numbers.items()}
    return numbers


def _counts_from_one(
    numbers: Mapping[int, _Found], forms: Collection[str | None], root: str
) -> bool:
    if 0 in numbers or "imgHQ" in forms:
        if IMAGES in numbers:
            raise ValueError(
                f"images are numbered 0 to {IMAGES}: two numberings are mixed, "
                f"{next(iter(numbers.values())).path} and {numbers[IMAGES].path}"
            )
        return False
    # In a part of the set only the name of the folder shows it: data256x256 counts from 1.
    return IMAGES in numbers or "data256x256/" in f"{root}/{next(iter(numbers.values())).name}"


def _official(files: Files, root: str, allow_partial: bool) -> dict[str, str]:
    """Partitions by key."""
    partition = {
        name: PARTITIONS[int(number)] for name, number in _table(files, root, PARTITION, 2)
    }
    splits = {}
    # idx orig_idx orig_file: orig_idx counts from 0 and orig_file from 1, hence the join by file.
    for index, _, original in _table(files, root, MAPPING, 3):
        if original not in partition:
            raise ValueError(f"{MAPPING} names {original}, which {PARTITION} lacks")
        splits[f"celebahq-{int(index):05d}"] = partition[original]
    counts = {name: Counter(splits.values())[name] for name in PARTITIONS}
    if not allow_partial and counts != OFFICIAL_COUNTS:
        raise ValueError(
            f"the partition of {root} has {counts} instead of {OFFICIAL_COUNTS}: "
            f"{MAPPING} or {PARTITION} is not the published one"
        )
    return splits


def _table(files: Files, root: str, name: str, columns: int) -> Iterator[list[str]]:
    """Rows of a file with columns between blanks, without the header."""
    paths = [path for path in files if path.rpartition("/")[2] == name]
    if not paths:
        raise ValueError(
            f"the official split of CelebA-HQ needs {name} below {root}: "
            "put it there, or give a list of held-out images"
        )
    for line in read_file(root, paths[0], files[paths[0]]).decode().splitlines():
        fields = line.split()
        if not fields or fields[0] == "idx":
            continue
        if len(fields) != columns:
            raise ValueError(f"{paths[0]} has a line of {len(fields)} columns: {line[:60]!r}")
        yield fields


def _held_out(url: str, numbered: bool) -> set[str]:
    """Keys of the images in a list."""
    folder, name = folder_and_name(url)
    lines = open_store(folder).get(name).decode().splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    if not numbered:
        if not lines or not all(re.fullmatch(r".+\.parquet/\d{5}", line) for line in lines):
            raise ValueError(
                f"{url} should list rows, one a line, as train-00000-of-00001.parquet/00042"
            )
        return {key_of(line) for line in lines}
    numbers = [re.fullmatch(r"(?:.*/)?(?:imgHQ)?(\d{1,5})(?:\.\w+)?", line) for line in lines]
    if not lines or not all(numbers):
        raise ValueError(f"{url} should list images, one number from 0 a line, as 193.jpg")
    return {f"celebahq-{int(match[1]):05d}" for match in numbers if match}
