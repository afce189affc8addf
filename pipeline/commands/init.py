"""A first recipe for a folder of images: look at some of them, and write sizes that fit."""

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.storage import StorageError, open_store, replacing
from data_prep.files import SourceImage, split_by_name
from data_prep.images import Decoded, ImageError, decode
from data_prep.landmarks import FaceDetector
from data_prep.settings import DataSettings
from data_prep.sources import list_images, read_image
from pipeline import config

log = logging.getLogger(__name__)

SAMPLED = 64  # images that are decoded
SEARCHED = 16  # of those, searched for faces, at up to a second each
SIZES_PX = (64, 96, 128, 192, 256)  # the paper's is the last
SMALLEST_SHARE = 0.1  # of the images may be smaller than what is stored, and are skipped
MIN_TRAIN, EPOCHS = 4, 200
VAL_FRACTION = 0.05
FACES_IN = 0.5  # of the images searched, from where on they are faces


@dataclass(frozen=True)
class FolderReport:
    """What a look at a folder found."""

    root: str
    train: int
    val: int
    by_name: bool
    """Whether val_fraction drew the split; else folders or tars name it."""
    looked_at: int
    unusable: dict[str, int]
    short_px: list[int]
    """Short sides of the images looked at, ascending."""
    subject: str
    why_subject: str


def write_recipe(folder: str, out: Path, *, name: str | None = None) -> list[str]:
    """Write a commented recipe for the images in ``folder``; returns lines about it.

    ``folder`` is a path or URL. Raises ValueError where there are no images, or too few, where
    ``out`` exists, and for a name that is none.
    """
    if out.exists():
        raise ValueError(f"{out} is there already: give another --out, or move it away")
    root = open_store(folder).url
    chosen = name or re.sub(r"[^A-Za-z0-9_-]+", "-", Path(root).name).strip("-").lower() or "images"
    report = look_at(root, chosen)
    text = recipe(report, chosen)
    with replacing(out) as target:
        target.write(text.encode())
    try:
        config.load(out)
    except config.ConfigError:
        out.unlink()
        raise
    return [
        f"{report.train:,} images to train, {report.val:,} held out, mostly of "
        f"{_median(report)} px on the short side; {report.why_subject}",
        f"written: {out}; next: python -m pipeline run {out}",
    ]


def look_at(root: str, name: str) -> FolderReport:
    """List the images below ``root``, and decode some of them."""
    images = list_images(DataSettings(name=name, source="folder", root=root, val_fraction=0.0))
    splits = Counter(image.split for image in images)
    by_name = not splits["val"]
    if by_name:
        splits = Counter(split_by_name([image.path for image in images], VAL_FRACTION).values())
    if splits["train"] < MIN_TRAIN:
        raise ValueError(
            f"{root} holds {splits['train']} images to train: give {MIN_TRAIN} or more"
        )
    sampled = images[:: max(1, len(images) // SAMPLED)][:SAMPLED]
    decoded, unusable = _decoded(sampled, root)
    if not decoded:
        raise ValueError(f"none of {len(sampled)} images looked at in {root} can be decoded")
    subject, why = _subject(decoded)
    return FolderReport(
        root=root,
        train=splits["train"],
        val=splits["val"],
        by_name=by_name,
        looked_at=len(sampled),
        unusable=dict(unusable),
        short_px=sorted(min(image.width, image.height) for image in decoded),
        subject=subject,
        why_subject=why,
    )


def recipe(report: FolderReport, name: str) -> str:
    """The recipe as YAML, with a comment on each choice."""
    enough = report.short_px[int(SMALLEST_SHARE * len(report.short_px))]
    size_px = max((size for size in SIZES_PX if size <= enough), default=8 * (enough // 8))
    if size_px < SIZES_PX[0]:
        raise ValueError(
            f"images of {report.root} have {enough} px on the short side: "
            f"{SIZES_PX[0]} or more are needed"
        )
    # Room for crops to move in, where the images have it.
    smallest = report.short_px[0]
    stored_px = min(smallest if smallest >= size_px else enough, size_px * 9 // 8)
    batch = next(batch for batch in (16, 8, 4, 2, 1) if report.train >= 4 * batch)
    steps = min(300_000, max(1000, EPOCHS * report.train // batch // 100 * 100))
    unusable = ", ".join(f"{count} {reason}" for reason, count in report.unusable.items())
    split = (
        "the share held out, drawn by the images' names"
        if report.by_name
        else "not used: folders or tars name the splits"
    )
    text = f"""\
# {name}: written by `python -m pipeline init` from a look at the images; change what you like.
#
# {report.train:,} images to train and {report.val:,} held out.
# {report.looked_at} looked at: {_median(report)} px on the short side in the middle, \
{report.short_px[0]} to {report.short_px[-1]}; not usable: {unusable or "none"}.
# `python -m pipeline show {{this file}} --describe` explains every setting there is.

name: {name}
storage: storage  # a folder, or s3://BUCKET/PREFIX where other machines take part

data:
  name: {name}
  source: folder
  root: {json.dumps(report.root, ensure_ascii=False)}
  subject: {report.subject}  # {report.why_subject}
  stored_px: {stored_px}  # short side; smaller images are skipped
  color: srgb  # images with another color profile are converted
  val_fraction: {VAL_FRACTION}  # {split}
  shard_samples: {max(8, min(2000, report.train // 8))}

model:
  guided: true  # takes sketches; false fills without

train:
  steps: {steps}  # about {max(1, steps * batch // report.train):,} passes over the images
  size_px: {size_px}  # the side of a crop; the paper's is 256
  global_batch: {batch}  # images per step over all GPUs; the paper's is 16
  streams: {batch}  # most GPUs that can share a batch
  precision: fp32  # bf16 is faster on GPUs of 2020 and later
  log_every_steps: 50
  save_every_steps: {max(100, min(5000, steps // 20))}

evaluate:
  samples_while_training: {min(64, max(1, report.val))}
  batch: {min(batch, 8)}

tracking:
  experiment: {name}
"""
    # In one column, whatever the values; a path may hold what looks like a comment.
    return re.sub(
        r"^( *(?!root:)\w+: \S+) +(# .*)$",
        lambda line: f"{line[1]:<26} {line[2]}",
        text,
        flags=re.M,
    )


def _median(report: FolderReport) -> int:
    return report.short_px[len(report.short_px) // 2]


def _decoded(images: Sequence[SourceImage], root: str) -> tuple[list[Decoded], Counter[str]]:
    decoded, unusable = [], Counter[str]()
    for image in images:
        try:
            decoded.append(decode(read_image(image, root), color="srgb"))
        except ImageError as error:
            unusable[error.reason] += 1
        except StorageError:
            unusable["unreadable"] += 1
    return decoded, unusable


def _subject(images: Sequence[Decoded]) -> tuple[str, str]:
    """``face`` or ``scene``, and why."""
    try:
        find = FaceDetector()
    except ValueError as error:  # dlib is an optional extra
        return "scene", f"not searched for faces: {error}"
    searched = images[:: max(1, len(images) // SEARCHED)][:SEARCHED]
    faces = sum(find(np.ascontiguousarray(image.pixels)) is not None for image in searched)
    why = f"faces in {faces} of {len(searched)} images searched"
    return ("face" if faces >= FACES_IN * len(searched) else "scene"), why
