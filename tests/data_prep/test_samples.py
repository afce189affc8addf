"""From images to samples: how far a worker reads ahead, and what it takes over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import samples
from data_prep.files import SourceImage
from data_prep.images import encode_jpeg
from data_prep.samples import (
    CHUNK,
    EarlierSamples,
    ReusableSample,
    SampleSettings,
    make_samples,
)
from data_prep.shards import RawSample
from data_prep.sources import read_image
from tests.data_prep.settings import SAMPLE_SETTINGS


def start_edges(images: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: np.zeros(images.shape[:3], np.uint8)


def below(root: Path) -> SampleSettings:
    data = dataclasses.replace(SAMPLE_SETTINGS.data, source="folder", root=str(root))
    return dataclasses.replace(SAMPLE_SETTINGS, data=data)


def test_memory_holds_a_few_chunks_of_images_however_large_the_shard() -> None:
    data = encode_jpeg(np.zeros((64, 64, 3), np.uint8))
    keys = []

    def read(image: SourceImage, root: str | None) -> bytes:
        keys.append(image.key)
        return data

    images = [
        SourceImage(f"k{number:03d}", "train", "scene", f"{number}.jpg", "folder")
        for number in range(20 * CHUNK)
    ]
    made = make_samples(images, SAMPLE_SETTINGS, read=read, start_edges=start_edges)
    ahead = [len(keys) - number for number, _ in enumerate(made)]
    assert len(ahead) == len(images)
    assert max(ahead) <= 4 * CHUNK  # two to be decoded, two that wait for their edges


def test_an_image_at_which_our_own_code_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(pixels: np.ndarray, quality: int) -> bytes:
        raise ValueError("not so")

    (tmp_path / "a b.jpg").write_bytes(encode_jpeg(np.zeros((128, 128, 3), np.uint8)))
    monkeypatch.setattr(samples, "encode_jpeg", fail)
    image = SourceImage("a+20b", "train", "scene", "a b.jpg", "folder")
    made = make_samples([image], below(tmp_path), read=read_image, start_edges=start_edges)
    with pytest.raises(RuntimeError, match=r"^a b\.jpg \(key a\+20b\): ValueError: not so$"):
        list(made)


def test_what_is_only_for_faces_leaves_sketches_of_scenes_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encode_jpeg(np.zeros((64, 64, 3), np.uint8)))
    settings = below(tmp_path)
    scene = SourceImage("a", "train", "scene", "a.jpg", "folder")
    [(row, sample)] = make_samples([scene], settings, read=read_image, start_edges=start_edges)
    assert sample is not None
    (tmp_path / "a.jpg").unlink()

    def again(old: dict[str, Any]) -> RawSample | None:
        earlier = EarlierSamples({"a": ReusableSample(dict(row), sample)}, settings.record() | old)
        [(_, made)] = make_samples(
            [scene],
            settings,
            read=read_image,
            start_edges=lambda images: lambda: np.ones(images.shape[:3], np.uint8),
            earlier=earlier,
        )
        return made

    assert again({"face_search": "otherwise", "landmarks_sha256": None, "line_width": 2}) == sample
    assert again({"threshold": 0.5}) != sample


def test_the_side_of_detection_is_in_the_digest_of_scenes_only_when_set() -> None:
    found = dataclasses.replace(
        SAMPLE_SETTINGS, sketch=dataclasses.replace(SAMPLE_SETTINGS.sketch, detect_px=144)
    )
    assert "detect_px" not in SAMPLE_SETTINGS.record()
    assert found.record() == SAMPLE_SETTINGS.record() | {"detect_px": 144}
    faces = dataclasses.replace(SAMPLE_SETTINGS, hed_sha256=None)
    assert dataclasses.replace(found, hed_sha256=None).record() == faces.record()
