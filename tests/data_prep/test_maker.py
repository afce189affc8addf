"""From pictures to samples: how far a worker reads ahead."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from data_prep import maker
from data_prep.files import Picture
from data_prep.maker import CHUNK, Recipe, make_samples
from data_prep.pictures import encode_jpeg


def test_memory_holds_a_few_chunks_of_pictures_however_large_the_shard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encode_jpeg(np.zeros((64, 64, 3), np.uint8))
    read = []

    def read_picture(picture: Picture, root: str | None) -> bytes:
        read.append(picture.key)
        return data

    def start_edges(pictures: np.ndarray) -> Callable[[], np.ndarray]:
        return lambda: np.zeros(pictures.shape[:3], np.uint8)

    monkeypatch.setattr(maker, "read_picture", read_picture)
    recipe = Recipe(
        stored_px=64,
        jpeg_quality=95,
        max_pixels=10**6,
        threshold=0.6,
        line_width=1,
        hed_sha256=None,
        hed_precision="fp32",
        hed_output="fused",
        hed_device="cpu",
    )
    pictures = [
        Picture(f"k{number:03d}", "train", "scene", f"{number}.jpg", "folder")
        for number in range(20 * CHUNK)
    ]
    made = make_samples(pictures, recipe, root=None, start_edges=start_edges)
    ahead = [len(read) - number for number, _ in enumerate(made)]
    assert len(ahead) == len(pictures)
    assert max(ahead) <= 4 * CHUNK  # two to be decoded, two that wait for their edges
