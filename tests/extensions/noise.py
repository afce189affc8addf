"""A toy source: images of noise, computed instead of stored."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from data_prep.files import SourceImage
from data_prep.settings import DataSettings
from data_prep.shards import Split
from data_prep.sources import DATA_SOURCES, DataSource


def list_noise(data: DataSettings) -> Iterator[SourceImage]:
    for number in range(8):
        split: Split = "val" if number < 2 else "train"
        yield SourceImage(f"noise-{number}", split, data.subject, str(number), data.source)


def read_noise(image: SourceImage, root: str | None) -> bytes:
    pixels = np.random.default_rng(int(image.path)).integers(0, 256, (80, 96, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


DATA_SOURCES["noise"] = DataSource(
    about="Images of noise.",
    splits="Fixed: the first two images are val.",
    license="CC0: nobody drew them.",
    list=list_noise,
    read=read_noise,
    needs_root=False,
)
