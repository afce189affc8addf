"""Sources: which images there are, their keys and their splits."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cluster.storage import StorageError, open_store
from data_prep.files import SourceImage, key_of
from data_prep.images import decode, fit
from data_prep.shards import KEY
from tests.data_prep.settings import list_source, read_listed
from tests.data_prep.tars import tar_of


def folder(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode("utf-8", "surrogateescape"))
    return root


def listed(root: Path | str, val_fraction: float = 0.0) -> list[SourceImage]:
    return list_source("folder", root=str(root), subject="scene", val_fraction=val_fraction)


def test_bundled_photographs_are_real_and_split_by_photograph() -> None:
    images = list_source("bundled", val_fraction=0.5)
    splits = Counter(image.split for image in images)
    assert 40 <= splits["train"] <= 60
    assert 8 <= splits["val"] <= 12
    photographs = {
        split: {p.path for p in images if p.split == split} for split in ("train", "val")
    }
    assert not photographs["train"] & photographs["val"]
    assert len({image.key for image in images}) == len(images)
    assert {p.path for p in images if p.subject == "face"} == {"skimage/data/astronaut.png"}
    for image in images:
        decoded = decode(read_listed(image, None))
        assert image.crop is not None
        assert min(fit(decoded.cropped(image.crop), 256).shape[:2]) == 256


def test_a_folder_is_listed_recursively_and_read(tmp_path: Path) -> None:
    root = folder(tmp_path, "a.jpg", "b/c.PNG", "b/notes.txt", ".hidden/d.jpg", "b/._e.jpg")
    (root / "empty").mkdir()
    images = listed(root)
    assert [(p.key, p.path) for p in images] == [("a", "a.jpg"), ("b/c=PNG", "b/c.PNG")]
    assert read_listed(images[1], str(root)) == b"b/c.PNG"
    assert [p.key for p in listed(f"file://{root}")] == ["a", "b/c=PNG"]


def test_what_is_left_out_of_a_folder_is_counted_by_its_suffix(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listed(folder(tmp_path, "a.jpg"))
    assert not caplog.messages
    names = ["iphone.HEIC", "b/c.heic", "d.heic", "noext", "x/noext", "n.txt", "a.jpg.b\nc"]
    assert [p.path for p in listed(folder(tmp_path, *names))] == ["a.jpg"]
    assert caplog.messages == [
        "files left out that are not images count=7 "
        rf"(.heic 3, no suffix 2, .b\nc 1, .txt 1) root={tmp_path}"
    ]


def test_an_avif_is_listed_and_comes_out_upright(tmp_path: Path) -> None:
    coffee = SourceImage("coffee", "train", "scene", "skimage/data/coffee.png", "bundled")
    pixels = decode(read_listed(coffee, None)).pixels
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned to the right
    turned = Image.fromarray(np.rot90(pixels))
    turned.save(tmp_path / "a.avif", quality=95, exif=exif)
    (found,) = listed(tmp_path)
    read = decode(read_listed(found, str(tmp_path)))
    assert (read.width, read.height) == (600, 400)
    assert np.abs(read.pixels.astype(int) - pixels).mean() < 3


def test_a_prefix_on_s3_is_listed_and_read(s3_url: str) -> None:
    store = open_store(s3_url)
    for key in ("train/a b.jpg", "val/c.jpg", "train/notes.txt"):
        store.put(key, key.encode())
    images = listed(s3_url)
    assert [(p.key, p.split) for p in images] == [("train/a+20b", "train"), ("val/c", "val")]
    assert read_listed(images[0], s3_url) == b"train/a b.jpg"


def test_odd_names_get_valid_and_different_keys(tmp_path: Path) -> None:
    names = [
        "a b.jpg",
        "a+20b.jpg",
        "a.b.jpg",
        "a=b.jpg",
        "ä.jpg",
        "new\nline.jpg",
        "x" * 200 + ".jpg",
    ]
    names += ["same.jpg", "same.jpeg", "same.JPG", "same.png", os.fsdecode(b"latin-\xe4.jpg")]
    images = listed(folder(tmp_path, *names))
    assert sorted(p.path for p in images) == sorted(names)
    assert len({p.key for p in images}) == len(names)
    assert all(KEY.fullmatch(p.key) for p in images)
    for image in images:
        data = read_listed(image, str(tmp_path))
        assert data == image.path.encode("utf-8", "surrogateescape")


@given(st.lists(st.text("aA.=+ /ä\n2E", max_size=12), unique=True))
def test_no_two_paths_share_a_key(paths: list[str]) -> None:
    named = [f"{path}.png" for path in paths] + [f"{path}.jpg" for path in paths]
    assert len({key_of(path) for path in named}) == len(named)


def test_folders_train_and_val_are_the_splits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = folder(tmp_path, "train/a.jpg", "train/x/b.jpg", "val/a.jpg", "c.jpg")
    images = listed(root, 0.5)
    assert {p.key: p.split for p in images} == {
        "train/a": "train",
        "train/x/b": "train",
        "val/a": "val",
    }
    assert "left out count=1" in caplog.text


@pytest.mark.parametrize("held_out", ["validation", "valid", "test", "Val", "dev"])
@pytest.mark.parametrize("above", ["", "dataset/", "cats/"])
def test_folders_that_others_call_so_are_the_splits(
    tmp_path: Path, held_out: str, above: str
) -> None:
    train = "Train" if held_out == "Val" else "train"
    names = [f"{above}{train}/{n}.jpg" for n in range(40)]
    names += [f"{above}{held_out}/{n}.jpg" for n in range(10)]
    images = listed(folder(tmp_path, *names), 0.2)
    assert Counter(image.split for image in images) == {"train": 40, "val": 10}
    assert all((held_out in image.path) == (image.split == "val") for image in images)


def test_a_validation_folder_counts_and_a_test_folder_beside_it_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = listed(folder(tmp_path, "train/a.jpg", "valid/b.jpg", "test/c.jpg"), 0.5)
    assert {image.path: image.split for image in images} == {
        "train/a.jpg": "train",
        "valid/b.jpg": "val",
    }
    assert "images outside train/ and valid/ left out count=1" in caplog.text


@pytest.mark.parametrize("name", ["val/a.jpg", "cats/test/a.jpg"])
def test_held_out_images_are_never_mixed_with_the_others(tmp_path: Path, name: str) -> None:
    root = folder(tmp_path, name, *(f"{n}.jpg" for n in range(9)))
    with pytest.raises(ValueError, match=r"seem held out.*or set data\.split=val_fraction"):
        listed(root, 0.2)
    images = list_source("folder", root=str(root), val_fraction=0.2, split="val_fraction")
    assert 1 <= Counter(image.split for image in images)["val"] <= 3


def test_images_that_are_all_in_one_folder_called_test_are_split_by_name(tmp_path: Path) -> None:
    images = listed(folder(tmp_path, *(f"test/{n}.jpg" for n in range(10))), 0.2)
    assert Counter(image.split for image in images)["train"] > 6


def test_names_of_tars_are_the_splits_of_the_images_in_them(tmp_path: Path) -> None:
    for name, count in (("train-0", 5), ("val-0", 2)):
        tar_of(tmp_path / f"{name}.tar", {f"{n}.jpg": name.encode() for n in range(count)})
    images = listed(tmp_path, 0.2)
    assert Counter(image.split for image in images) == {"train": 5, "val": 2}
    assert all(image.path.startswith("val-0.tar/") for image in images if image.split == "val")
    folder(tmp_path, "loose.jpg")
    with pytest.raises(ValueError, match=r"images outside of tars \(first: loose\.jpg\)"):
        listed(tmp_path, 0.2)


@pytest.mark.parametrize("count", [5, 10, 40, 100, 400])
def test_a_small_dataset_holds_out_nearly_the_share_it_was_asked_for(
    tmp_path: Path, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    images = listed(folder(tmp_path, *(f"{n}.jpg" for n in range(count))), 0.2)
    held_out = sum(image.split == "val" for image in images)
    assert abs(held_out - 0.2 * count) <= max(1, 0.05 * count)
    assert f"split drawn by name train={count - held_out} val={held_out}" in caplog.text


def test_an_image_stays_in_its_split_when_others_come(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(200)]
    before = {p.key: p.split for p in listed(folder(tmp_path, *names[:100]), 0.2)}
    after = {p.key: p.split for p in listed(folder(tmp_path, *names), 0.2)}
    assert before.items() <= after.items()
    assert 20 <= Counter(after.values())["val"] <= 60


def test_where_some_are_held_out_at_least_one_is(tmp_path: Path) -> None:
    root = folder(tmp_path, "a.jpg", "b.jpg")
    assert Counter(p.split for p in listed(root, 0.0001)) == {"train": 1, "val": 1}
    assert Counter(p.split for p in listed(root, 0)) == {"train": 2}


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    root = folder(tmp_path / "root", "a/b.jpg")
    outside = folder(tmp_path / "outside", "c.jpg")
    (root / "a" / "up").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "linked").symlink_to(outside)
    (root / "gone.jpg").symlink_to(root / "nowhere.jpg")
    assert [p.path for p in listed(root)] == ["a/b.jpg", "gone.jpg", "linked/c.jpg"]


def test_a_folder_that_is_not_there_or_empty_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no images"):
        listed(tmp_path)
    with pytest.raises(ValueError, match=r"folder .*missing was not found: give a folder"):
        listed(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"source 'folder' needs data\.root"):
        list_source("folder", val_fraction=0.1)
    with pytest.raises(StorageError):
        read_listed(SourceImage("a", "train", "scene", "a.jpg", "folder"), str(tmp_path))
