"""CelebA-HQ in the forms that exist of it, under the partition of CelebA."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping

from cluster.storage import open_store
from data_prep.files import Files, Picture, read_file
from data_prep.shards import Split

log = logging.getLogger(__name__)

PICTURES = 30_000
OFFICIAL_COUNTS = {"train": 24_183, "val": 2_993, "test": 2_824}
PARTITIONS = ("train", "val", "test")  # 0, 1, 2 in list_eval_partition.txt

# 0.jpg of CelebAMask-HQ, 00001.jpg of data256x256, imgHQ00000.npy, imgHQ00000.png
NAME = re.compile(r"(?:(?P<folder>.*)/)?(?:imgHQ)?(?P<number>\d{1,5})\.(?:jpg|jpeg|png|npy)")
NOT_PICTURES = re.compile(r"(?:.*/)?CelebAMask-?HQ-mask-anno/.*")
MAPPING, PARTITION = "CelebA-HQ-to-CelebA-mapping.txt", "list_eval_partition.txt"


def pictures(
    files: Files, root: str, *, split: str = "official", partial: bool = False
) -> Iterator[Picture]:
    """Train and val pictures under keys ``celebahq-00042``, counted from 0 in every form.

    ``split`` ``official`` is CelebA's partition, joined by the names of the original files (its
    test pictures are left out); it needs the mapping of CelebAMask-HQ and CelebA's partition file
    below ``root``. Else it is the URL of a list of held-out pictures, as numbers from 0 with or
    without ``.jpg`` (the 2,000 that DeepFill and LaMa hold out, for instance). Folders or orders of
    a mirror are never taken for a split. Unless ``partial``, the counts are asserted.
    """
    found = _numbered(files, root)
    if not found:
        raise ValueError(f"{root} holds no CelebA-HQ: 0.jpg, 00001.jpg or imgHQ00000.npy and on")
    if not partial and len(found) != PICTURES:
        raise ValueError(
            f"{root} holds {len(found):,} pictures of CelebA-HQ's {PICTURES:,}: "
            "complete it, or set data.partial"
        )
    if split == "official":
        splits = _official(files, root, partial)
    else:
        held_out = _held_out(split)
        splits = {number: "val" if number in held_out else "train" for number in found}
        if unknown := held_out - found.keys():
            message = f"{split} lists {len(unknown):,} pictures that {root} does not hold"
            if not partial:
                raise ValueError(f"{message}, {min(unknown)} for one")
            log.warning("%s", message)
    for number, path in sorted(found.items()):
        of: str | None = splits.get(number)
        if of is None:
            raise ValueError(f"{MAPPING} has no line for picture {number}: it is another file")
        if of != "test":
            kind: Split = "val" if of == "val" else "train"
            key = f"celebahq-{number:05d}"
            yield Picture(key, kind, "face", path, "celebahq", member=files[path])


def _numbered(files: Files, root: str) -> dict[int, str]:
    """Paths by picture number, counted from 0."""
    numbers: dict[int, str] = {}
    for path in files:
        match = NAME.fullmatch(path)
        if match is None or NOT_PICTURES.fullmatch(path):
            continue
        number = int(match["number"])
        if number in numbers:
            raise ValueError(
                f"{root} holds picture {number} twice, {numbers[number]} and {path}: "
                "point data.root at one of them"
            )
        numbers[number] = path
    if _counts_from_one(numbers):
        return {number - 1: path for number, path in numbers.items()}
    return numbers


def _counts_from_one(numbers: Mapping[int, str]) -> bool:
    if 0 in numbers or not numbers:
        if PICTURES in numbers:
            raise ValueError(
                f"pictures are numbered 0 to {PICTURES}: two numberings are mixed, "
                f"{numbers[0]} and {numbers[PICTURES]}"
            )
        return False
    # Of a part of the set, the name of the folder has to tell: data256x256 counts from 1.
    return PICTURES in numbers or "data256x256/" in next(iter(numbers.values()))


def _official(files: Files, root: str, partial: bool) -> dict[int, str]:
    partition = {
        name: PARTITIONS[int(number)] for name, number in _table(files, root, PARTITION, 2)
    }
    splits = {}
    # idx orig_idx orig_file: orig_idx counts from 0 and orig_file from 1, hence the join by file.
    for index, _, original in _table(files, root, MAPPING, 3):
        if original not in partition:
            raise ValueError(f"{MAPPING} names {original}, which {PARTITION} does not have")
        splits[int(index)] = partition[original]
    counts = {name: Counter(splits.values())[name] for name in PARTITIONS}
    if not partial and counts != OFFICIAL_COUNTS:
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


def _held_out(url: str) -> set[int]:
    folder, _, name = url.removeprefix("list:").rpartition("/")
    lines = open_store(folder or ".").get(name).decode().split()
    numbers = [re.fullmatch(r"(?:.*/)?(?:imgHQ)?(\d{1,5})(?:\.\w+)?", line) for line in lines]
    if not lines or not all(numbers):
        raise ValueError(f"{url} is no list of pictures: one number from 0 a line, as 193.jpg")
    return {int(match[1]) for match in numbers if match}
