"""CelebA-HQ in the forms that exist of it, under the partition of CelebA."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from cluster.storage import folder_and_name, open_store
from data_prep.files import Files, Member, SourceImage, key_of, read_file, split_by_name
from data_prep.parquet import Row, list_rows
from data_prep.shards import Split

log = logging.getLogger(__name__)

PICTURES = 30_000
OFFICIAL_COUNTS = {"train": 24_183, "val": 2_993, "test": 2_824}
PARTITIONS = ("train", "val", "test")  # 0, 1, 2 in list_eval_partition.txt

# 0.jpg of CelebAMask-HQ, 00001.jpg of data256x256, imgHQ00000.npy, imgHQ00000.png
NAME = re.compile(r"(?:.*/)?(?P<form>imgHQ)?(?P<number>\d{1,5})\.(?:jpg|jpeg|png|npy)")
NOT_PICTURES = re.compile(r"(?:.*/)?CelebAMask-?HQ-mask-anno/.*")
MAPPING, PARTITION = "CelebA-HQ-to-CelebA-mapping.txt", "list_eval_partition.txt"


class _Found(NamedTuple):
    path: str
    name: str
    """Where its number is looked for: the path, or what a row of Parquet calls its picture."""
    place: Member | Row | None


def list_images(
    files: Files,
    root: str,
    *,
    split: str,
    val_fraction: float,
    allow_partial: bool,
) -> Iterator[SourceImage]:
    """Train and val pictures under keys ``celebahq-00042``, counted from 0 in every form.

    ``split`` ``official`` is CelebA's partition, joined by the names of the original files (its
    test pictures are left out); it needs the mapping of CelebAMask-HQ and CelebA's partition file
    below ``root``. ``val_fraction`` holds out that share, chosen by the keys. Else it is the URL of
    a list of held-out pictures, as numbers from 0 with or without ``.jpg`` (the 2,000 that DeepFill
    and LaMa hold out, for instance). Unless ``allow_partial``, the counts are asserted.

    Folders, files or orders of a mirror are never taken for a split or for numbers. So pictures in
    Parquet are CelebA-HQ's numbers where all rows have names that tell them. Where they do not,
    keys come from file and row, ``data/train-00000-of-00006=parquet/00042``; there is no official
    split, and a list has such rows: ``data/train-00000-of-00006.parquet/00042``.
    """
    found = _found(files, root)
    if not found:
        raise ValueError(
            f"{root} holds no CelebA-HQ: 0.jpg, 00001.jpg, imgHQ00000.npy or .parquet and on"
        )
    if not allow_partial and len(found) != PICTURES:
        raise ValueError(
            f"{root} holds {len(found):,} pictures of CelebA-HQ's {PICTURES:,}: "
            "complete it, or set data.allow_partial"
        )
    numbered = _numbered(found, root)
    if numbered is None:
        if split == "official":
            raise ValueError(
                f"{found[0].path} and on do not tell their numbers, so there is no official split: "
                "set data.split to val_fraction, or to a list of held-out rows"
            )
        keyed = {key_of(picture.path): picture for picture in found}
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
            message = f"{split} lists {len(unknown):,} pictures that {root} does not hold"
            if not allow_partial:
                raise ValueError(f"{message}, {unknown[0]} for one")
            log.warning("%s", message)
        splits = {key: "val" if key in held_out else "train" for key in keyed}
    for key, picture in keyed.items():
        of = splits.get(key)
        if of is None:
            raise ValueError(f"{MAPPING} has no line for {key}: it is another file")
        if of != "test":
            kind: Split = "val" if of == "val" else "train"
            yield SourceImage(key, kind, "face", picture.path, "celebahq", member=picture.place)


def _found(files: Files, root: str) -> list[_Found]:
    """Pictures as files, or as rows of Parquet files."""
    found = [
        _Found(path, path, member)
        for path, member in files.items()
        if NAME.fullmatch(path) and not NOT_PICTURES.fullmatch(path)
    ]
    rows = [
        _Found(f"{path}/{number:05d}", name or "", row)
        for path in sorted(files)
        if path.endswith(".parquet")
        for number, (name, row) in enumerate(list_rows(root, path))
    ]
    if found and rows:
        raise ValueError(
            f"{root} holds pictures as files, {found[0].path}, and in {rows[0].path}: "
            "point data.root at one of them"
        )
    return found or rows


def _numbered(found: Sequence[_Found], root: str) -> dict[int, _Found] | None:
    """Pictures by number, counted from 0; None for Parquet that does not tell the numbers."""
    in_parquet = isinstance(found[0].place, Row)
    numbers: dict[int, _Found] = {}
    forms = set()
    for picture in found:
        match = NAME.fullmatch(picture.name)
        if match is None:
            return None
        number = int(match["number"])
        if number in numbers:
            if in_parquet:
                return None  # counted anew in each split
            raise ValueError(
                f"{root} holds picture {number} twice, {numbers[number].path} and {picture.path}: "
                "point data.root at one of them"
            )
        numbers[number] = picture
        forms.add(match["form"])
    if _counts_from_one(numbers, forms, root):
        return {number - 1: picture for number, picture in numbers.items()}
    return numbers


def _counts_from_one(
    numbers: Mapping[int, _Found], forms: Collection[str | None], root: str
) -> bool:
    if 0 in numbers or "imgHQ" in forms:
        if PICTURES in numbers:
            raise ValueError(
                f"pictures are numbered 0 to {PICTURES}: two numberings are mixed, "
                f"{next(iter(numbers.values())).path} and {numbers[PICTURES].path}"
            )
        return False
    # Of a part of the set, the name of the folder has to tell: data256x256 counts from 1.
    return PICTURES in numbers or "data256x256/" in f"{root}/{next(iter(numbers.values())).name}"


def _official(files: Files, root: str, allow_partial: bool) -> dict[str, str]:
    """Partitions by key."""
    partition = {
        name: PARTITIONS[int(number)] for name, number in _table(files, root, PARTITION, 2)
    }
    splits = {}
    # idx orig_idx orig_file: orig_idx counts from 0 and orig_file from 1, hence the join by file.
    for index, _, original in _table(files, root, MAPPING, 3):
        if original not in partition:
            raise ValueError(f"{MAPPING} names {original}, which {PARTITION} does not have")
        splits[f"celebahq-{int(index):05d}"] = partition[original]
    counts = {name: Counter(splits.values())[name] for name in PARTITIONS}
    if not allow_partial and counts != OFFICIAL_COUNTS:
        raise ValueError(
            f"the partition of {root} comes out as {counts}; it has to be {OFFICIAL_COUNTS}: "
            f"{MAPPING} or {PARTITION} is not the published one"
        )
    return splits


def _table(files: Files, root: str, name: str, columns: int) -> Iterator[list[str]]:
    """Rows of a file with columns between blanks; a header, which only one of them has, goes."""
    paths = [path for path in files if path.rpartition("/")[2] == name]
    if not paths:
        raise ValueError(
            f"the official split of CelebA-HQ needs {name} below {root}: "
            "put it there, or give a list of held-out pictures"
        )
    for line in read_file(root, paths[0], files[paths[0]]).decode().splitlines():
        fields = line.split()
        if not fields or fields[0] == "idx":
            continue
        if len(fields) != columns:
            raise ValueError(f"{paths[0]} has a line of {len(fields)} columns: {line[:60]!r}")
        yield fields


def _held_out(url: str, numbered: bool) -> set[str]:
    """Keys of the pictures in a list."""
    folder, name = folder_and_name(url)
    lines = open_store(folder).get(name).decode().splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    if not numbered:
        if not lines or not all(re.fullmatch(r".+\.parquet/\d{5}", line) for line in lines):
            raise ValueError(
                f"{url} is no list of rows: one a line, as train-00000-of-00001.parquet/00042"
            )
        return {key_of(line) for line in lines}
    numbers = [re.fullmatch(r"(?:.*/)?(?:imgHQ)?(\d{1,5})(?:\.\w+)?", line) for line in lines]
    if not lines or not all(numbers):
        raise ValueError(f"{url} is no list of pictures: one number from 0 a line, as 193.jpg")
    return {f"celebahq-{int(match[1]):05d}" for match in numbers if match}
