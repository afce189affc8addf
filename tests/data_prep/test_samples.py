"""From pictures to samples: how far a worker reads ahead, and what it takes over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import samples as maker
from data_prep.files import SourceImage
from data_prep.images import encode_jpeg
from data_prep.samples import CHUNK, ReusableSample, make_samples
from data_prep.shards import RawSample
from tests.data_prep.recipe import RECIPE


def start_edges(pictures: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: np.zeros(pictures.shape[:3], np.uint8)


def test_memory_holds_a_few_chunks_of_pictures_however_large_the_shard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encode_jpeg(np.zeros((64, 64, 3), np.uint8))
    read = []

    def read_image(picture: SourceImage, root: str | None) -> bytes:
        read.append(picture.key)
        return data

    monkeypatch.setattr(maker, "read_image", read_image)
    pictures = [
        SourceImage(f"k{number:03d}", "train", "scene", f"{number}.jpg", "folder")
        for number in range(20 * CHUNK)
    ]
    made = make_samples(pictures, RECIPE, root=None, start_edges=start_edges)
    ahead = [len(read) - number for number, _ in enumerate(made)]
    assert len(ahead) == len(pictures)
    assert max(ahead) <= 4 * CHUNK  # two to be decoded, two that wait for their edges


def test_a_picture_at_which_our_own_code_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(pixels: np.ndarray, quality: int) -> bytes:
        raise ValueError("not so")

    (tmp_path / "a b.jpg").write_bytes(encode_jpeg(np.zeros((128, 128, 3), np.uint8)))
    monkeypatch.setattr(maker, "encode_jpeg", fail)
    picture = SourceImage("a+20b", "train", "scene", "a b.jpg", "folder")
    made = make_samples([picture], RECIPE, root=str(tmp_path), start_edges=start_edges)
    with pytest.raises(RuntimeError, match=r"^a b\.jpg \(key a\+20b\): ValueError: not so$"):
        list(made)


def test_what_is_only_for_faces_leaves_sketches_of_scenes_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encode_jpeg(np.zeros((64, 64, 3), np.uint8)))
    scene = SourceImage("a", "train", "scene", "a.jpg", "folder")
    [(row, sample)] = make_samples([scene], RECIPE, root=str(tmp_path), start_edges=start_edges)
    assert sample is not None
    (tmp_path / "a.jpg").unlink()

    def again(**changed: Any) -> RawSample | None:
        [(_, made)] = make_samples(
            [scene],
            dataclasses.replace(RECIPE, **changed),
            root=str(tmp_path),
            start_edges=lambda pictures: lambda: np.ones(pictures.shape[:3], np.uint8),
            known={"a": ReusableSample(dict(row), sample)},
            known_recipe=RECIPE.record(),
        )
        return made

    assert again(face_search="otherwise", landmarks_sha256=None, line_width=2) == sample
    assert again(threshold=0.5) != sample
