"""An existing WebDataset as a source of images: img2dataset's, Hugging Face's, or one of ours."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cluster.storage import one_line
from data_prep.files import (
    SourceImage,
    Subject,
    TarMember,
    key_of,
    list_tar,
    split_by_name,
    walk_files,
)
from data_prep.shards import ShardError, Split

log = logging.getLogger(__name__)

IMAGE_FIELDS = ("jpg", "jpeg", "webp", "png")
"""Extensions that hold the image of a sample, the preferred one first: where a sample has several,
a PNG is more often its mask or label."""

# A separate word in the path of a tar: data-train-0000.tar, validation/00000.tar, laion_val.tar.
_NAMED_SPLIT = re.compile(
    r"(?<![a-z])(?:(train|training)|(val|valid|validation|test|testing|dev|eval))(?![a-z])"
)


def list_images(root: str, *, subject: Subject, val_fraction: float) -> Iterator[SourceImage]:
    """The image of every sample in the tars below ``root``, a folder, an ``s3://`` prefix or a tar.

    The samples are those that the webdataset library finds: files whose paths agree up to the first
    dot, one after the other. Only headers are read here. Files besides the image, a ``json``
    among them, stay in the source; ``source_path`` in the manifest leads to them. Keys begin with
    the path of the tar, so that equal keys in two tars stay two images.

    Tars whose paths name a split (``train``, ``val``, ``test``, ...) belong to it, ``test`` and the
    like to ``val``. Where no two splits are named, the share ``val_fraction`` is held out by name.

    Raises ValueError without a tar, where a tar is cut short, a sample is there twice, or only
    some of the tars name a split; StorageError where ``root`` cannot be read.
    """
    tars = [""] if root.endswith(".tar") else _tars(root)
    splits = named_splits(tars, root)
    listed: dict[str, tuple[str, str, TarMember]] = {}  # by key: the tar, the path, where it lies
    without_image, several = 0, 0
    for tar in tars:
        for sample in _samples(root, tar):
            fields = [field for field in IMAGE_FIELDS if field in sample]
            if not fields:
                without_image += 1
                continue
            several += len(fields) > 1
            key = key_of(
                "/".join(part for part in (tar.removesuffix(".tar"), sample["__key__"]) if part)
            )
            path, place = sample[fields[0]]
            if key in listed:
                raise ShardError(f"{root}: {path} and {listed[key][1]} are one sample: rename one")
            listed[key] = tar, path, place
    if without_image:
        log.warning("samples without an image skipped count=%d root=%s", without_image, root)
    if several:
        log.info(
            "samples with several images count=%d: %s wins in this order root=%s",
            *(several, ", ".join(IMAGE_FIELDS), root),
        )
    if not listed:
        raise ValueError(f"{root} has no sample with an image ({', '.join(IMAGE_FIELDS)})")
    by_name = {} if splits else split_by_name(listed, val_fraction)
    for key, (tar, path, place) in listed.items():
        split = splits[tar] if splits else by_name[key]
        yield SourceImage(key, split, subject, path, "webdataset", place=place)


def _tars(root: str) -> list[str]:
    others: Counter[str] = Counter()
    tars = []
    for path in walk_files(root):
        if path.endswith(".tar"):
            tars.append(path)
        else:
            others[path.rpartition(".")[2]] += 1
    if not tars:
        found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(3))
        raise ValueError(one_line(f"{root} has no .tar file (it has {found or 'no file'})"))
    return sorted(tars)


def named_splits(tars: list[str], root: str) -> dict[str, Split]:
    """The split of every tar, or nothing where their paths do not name both.

    Raises ValueError where only some of the tars name a split, one of them a held-out one.
    """
    named: dict[str, Split | None] = {}
    for tar in tars:
        # The last word counts: train2017/val-0000.tar is held out.
        words = list(_NAMED_SPLIT.finditer(tar.lower()))
        named[tar] = ("train" if words[-1][1] else "val") if words else None
    found = set(named.values())
    if not {"train", "val"} <= found and found != {"val", None}:
        return {}
    splits: dict[str, Split] = {tar: split for tar, split in named.items() if split}
    if unnamed := [tar for tar in tars if tar not in splits]:
        raise ValueError(
            one_line(
                f"{root}: {len(unnamed)} of {len(tars)} tars name no split while others do "
                f"(first: {unnamed[0]}): put train or val into their names, or move them away"
            )
        )
    return splits


def _samples(root: str, tar: str) -> Iterator[dict[str, Any]]:
    """The samples of one tar; each extension stands for (path, where its bytes lie)."""
    from webdataset import tariterators  # imports torch, which only the driver needs here

    below = tar[: tar.rfind("/") + 1]
    name = tar or root
    entries = (
        {"fname": path.removeprefix(below), "data": (path, place), "__url__": name}
        for path, place in list_tar(root, tar).items()
    )
    try:
        yield from tariterators.group_by_keys(entries)
    except ValueError as error:
        raise ShardError(
            f"{name}: {error.args[0]}: each file of a sample may be there once"
        ) from None
