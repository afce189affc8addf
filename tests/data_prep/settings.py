"""Settings of small datasets, and builds whose settings a test names one by one."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from data_prep.build import build_dataset
from data_prep.files import SourceImage
from data_prep.samples import SampleSettings
from data_prep.settings import BuildOptions, DataSettings, SketchSettings
from data_prep.shards import Dataset
from data_prep.sources import DATA_SOURCES, list_images

SAMPLE_SETTINGS = SampleSettings(
    DataSettings(name="small", source="bundled", stored_px=64),
    SketchSettings(),
    hed_sha256="0" * 64,
    hed_device="cpu",
    faces=True,
)


def list_source(source: str, **settings: Any) -> list[SourceImage]:
    """Every image of a source under these settings."""
    return list_images(DataSettings(name="small", source=source, **settings))


def read_listed(image: SourceImage, root: str | None = None) -> bytes:
    return DATA_SOURCES[image.source].read(image, root)


def build(url: str | Path, **settings: Any) -> Dataset:
    """Build a dataset; ``settings`` are fields of any of the settings, or further arguments."""

    def chosen(kind: type) -> dict[str, Any]:
        names = {field.name for field in fields(kind)} & settings.keys()
        return {name: settings.pop(name) for name in names}

    return build_dataset(
        str(url),
        DataSettings(**chosen(DataSettings)),
        SketchSettings(**chosen(SketchSettings)),
        options=BuildOptions(**chosen(BuildOptions)),
        **settings,
    )
