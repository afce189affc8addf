"""An existing WebDataset as a source: which images, under which keys, in which split."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from cluster.storage import open_store
from data_prep.files import SourceImage
from data_prep.shards import ShardError
from tests.data_prep.settings import list_source, read_listed
from tests.data_prep.tars import tar_of


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG")
    return data.getvalue()


def shard(path: Path, *samples: Mapping[str, object]) -> Path:
    """Written by the library itself, as img2dataset does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(dict(sample))
    return path


def listed(root: Path | str, val_fraction: float = 0.0) -> list[SourceImage]:
    return list_source("webdataset", root=str(root), val_fraction=val_fraction)


def test_what_img2dataset_writes_is_listed_and_read(tmp_path: Path) -> None:
    images = [jpeg(seed) for seed in range(4)]
    for number in range(2):
        shard(
            tmp_path / f"{number:05d}.tar",
            *(
                {
                    "__key__": f"{number:05d}000{index}",
                    "jpg": images[2 * number + index],
                    "txt": "a caption",
                    "json": {"url": "of the image"},
                }
                for index in range(2)
            ),
        )
        (tmp_path / f"{number:05d}.parquet").write_bytes(b"img2dataset writes one beside each tar")
    found = listed(tmp_path)
    assert [image.key for image in found] == [
        "00000/000000000",
        "00000/000000001",
        "00001/000010000",
        "00001/000010001",
    ]
    assert [read_listed(image, str(tmp_path)) for image in found] == images
    assert {image.split for image in found} == {"train"}


def test_one_tar_and_a_prefix_on_s3_are_roots_too(tmp_path: Path, s3_url: str) -> None:
    path = shard(
        tmp_path / "a.tar", {"__key__": "x/1", "webp": b"one"}, {"__key__": "2", "png": b"two"}
    )
    assert {image.key: read_listed(image, str(path)) for image in listed(path)} == {
        "2": b"two",
        "x/1": b"one",
    }
    open_store(s3_url).upload(path, "deep/a.tar")
    found = listed(s3_url)
    assert {image.key: read_listed(image, s3_url) for image in found} == {
        "deep/a/2": b"two",
        "deep/a/x/1": b"one",
    }


def test_equal_keys_in_two_tars_stay_two_images(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", {"__key__": "0", "jpg": b"first"})
    shard(tmp_path / "b.tar", {"__key__": "0", "jpg": b"second"})
    found = listed(tmp_path)
    assert [read_listed(image, str(tmp_path)) for image in found] == [b"first", b"second"]


def test_the_image_of_a_sample_is_not_its_sketch_or_its_label(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard(
        tmp_path / "a.tar",
        {"__key__": "ours", "jpg": b"image", "sketch.png": b"sketch", "json": b"{}"},
        {"__key__": "segmented", "png": b"label", "jpg": b"image"},
        {"__key__": "text only", "txt": b"no image"},
    )
    with caplog.at_level(logging.INFO, "data_prep.webdataset_source"):
        found = listed(tmp_path)
    assert [read_listed(image, str(tmp_path)) for image in found] == [b"image", b"image"]
    assert "samples without an image skipped count=1" in caplog.text
    assert "samples with several images count=1" in caplog.text


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train/000.tar", "val/000.tar"),
        ("set-train-000000.tar", "set-val-000000.tar"),
        ("imagenet_training_0.tar", "imagenet_validation_0.tar"),
        ("a/Train-0.tar", "a/Test-0.tar"),
        ("train2017/train-0.tar", "train2017/val-0.tar"),
    ],
)
def test_names_of_tars_say_the_split(tmp_path: Path, train: str, held_out: str) -> None:
    shard(tmp_path / train, {"__key__": "0", "jpg": b"0"})
    shard(tmp_path / held_out, {"__key__": "1", "jpg": b"1"})
    splits = {read_listed(image, str(tmp_path)): image.split for image in listed(tmp_path, 0.5)}
    assert splits == {b"0": "train", b"1": "val"}


def test_words_within_words_name_no_split(tmp_path: Path) -> None:
    shard(tmp_path / "valley.tar", *({"__key__": f"v{n}", "jpg": b"0"} for n in range(20)))
    shard(tmp_path / "constraint.tar", *({"__key__": f"c{n}", "jpg": b"1"} for n in range(20)))
    assert {image.split for image in listed(tmp_path)} == {"train"}
    assert {image.split for image in listed(tmp_path, 0.5)} == {"train", "val"}


def test_tars_that_name_no_split_beside_those_that_do_are_refused(tmp_path: Path) -> None:
    for name in ("train-0.tar", "val-0.tar", "extra.tar"):
        shard(tmp_path / name, {"__key__": name[0], "jpg": b"0"})
    with pytest.raises(ValueError, match=r"1 of 3 tars name no split .*extra\.tar"):
        listed(tmp_path)


def test_a_source_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "0.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has no \.tar file \(it has 1 gz\)"):
        listed(tmp_path)
    shard(tmp_path / "b" / "0.tar", {"__key__": "0", "txt": b"0"})
    with pytest.raises(ValueError, match="has no sample with an image"):
        listed(tmp_path / "b")
    tar_of(tmp_path / "c" / "0.tar", {"0.jpg": b"0", "1.jpg": b"1", "0.png": b"2"})
    with pytest.raises(ShardError, match=r"0\.png and 0\.jpg are one sample"):
        listed(tmp_path / "c")
    tar_of(tmp_path / "e" / "0.tar", {"0.jpg": b"0", "0.JPG": b"1"})
    with pytest.raises(ShardError, match="duplicate file name"):
        listed(tmp_path / "e")
    whole = shard(tmp_path / "d" / "0.tar", {"__key__": "0", "jpg": bytes(5000)})
    whole.write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(ValueError, match="is not a complete tar"):
        listed(tmp_path / "d")
