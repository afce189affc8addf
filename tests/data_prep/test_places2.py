"""Places2 in every layout that it comes in, and the traps of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep import places2
from data_prep.files import Files
from data_prep.sources import list_pictures, read_picture
from tests.data_prep.tars import tar_of

TRAIN = ["a/airfield/00000001.jpg", "a/alley/00000001.jpg", "s/swimming_pool/indoor/00000001.jpg"]
VAL = ["Places365_val_00000001.jpg", "Places365_val_00000002.jpg"]
KEYS = {
    "data_256/a/airfield/00000001": "train",
    "data_256/a/alley/00000001": "train",
    "data_256/s/swimming_pool/indoor/00000001": "train",
    "val_256/Places365_val_00000001": "val",
    "val_256/Places365_val_00000002": "val",
}


def tree(root: Path, train: str = "data_256", val: str = "val_256") -> Path:
    for name in [f"{train}/{name}" for name in TRAIN] + [f"{val}/{name}" for name in VAL]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def keys(root: Path, partial: bool = True) -> dict[str, str]:
    pictures = list_pictures("places2", root=str(root), partial=partial)
    assert {picture.subject for picture in pictures} == {"scene"}
    return {picture.key: picture.split for picture in pictures}


@pytest.mark.parametrize("train", ["data_256", "data_256_standard", "x/data_256_challenge"])
def test_folders_as_unpacked_and_as_renamed_have_the_same_keys(tmp_path: Path, train: str) -> None:
    assert keys(tree(tmp_path, train)) == KEYS


def test_the_large_pictures_have_keys_of_their_own(tmp_path: Path) -> None:
    found = keys(tree(tmp_path, "data_large_standard", "val_large"))
    assert next(iter(found)) == "data_large/a/airfield/00000001"
    assert found["val_large/Places365_val_00000001"] == "val"


def test_archives_that_nobody_unpacked_have_the_same_keys_and_bytes(tmp_path: Path) -> None:
    train = {f"data_256/{name}": name.encode() for name in TRAIN}
    tar_of(tmp_path / "train_256_places365standard.tar", train)
    tar_of(tmp_path / "val_256.tar", {f"val_256/{name}": name.encode() for name in VAL})
    tar_of(tmp_path / "test_256.tar", {"test_256/Places365_test_00000001.jpg": b"test"})
    assert keys(tmp_path) == KEYS
    pictures = list_pictures("places2", root=str(tmp_path), partial=True)
    assert read_picture(pictures[2], str(tmp_path)) == TRAIN[2].encode()


def test_the_easy_format_keeps_its_splits(tmp_path: Path) -> None:
    root = tmp_path / "places365_standard"
    tree(root, "train", "val/airfield")
    assert keys(tmp_path) == {
        "train/a/airfield/00000001": "train",
        "train/a/alley/00000001": "train",
        "train/s/swimming_pool/indoor/00000001": "train",
        "val/airfield/Places365_val_00000001": "val",
        "val/airfield/Places365_val_00000002": "val",
    }


def test_official_lists_decide_and_what_they_miss_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tree(tmp_path)
    (root / "meta").mkdir()
    listed = [TRAIN[0], TRAIN[2], "b/bakery/shop/00000009.jpg"]
    lines = "".join(f"/{name} {number}\n" for number, name in enumerate(listed))
    (root / "meta" / "places365_train_standard.txt").write_text(lines)
    (root / "meta" / "places365_val.txt").write_text(f"{VAL[1]} 165\n")
    found = keys(root)
    assert found == {
        "data_256/a/airfield/00000001": "train",
        "data_256/b/bakery/shop/00000009": "train",
        "data_256/s/swimming_pool/indoor/00000001": "train",
        "val_256/Places365_val_00000002": "val",
    }
    assert "names=3 missing=1 not_listed=1" in caplog.text
    missing = list_pictures("places2", root=str(root), partial=True)[1]
    with pytest.raises(FileNotFoundError, match=r"data_256/b/bakery/shop/00000009\.jpg"):
        read_picture(missing, str(root))


def test_two_sizes_or_editions_in_one_root_are_refused(tmp_path: Path) -> None:
    tree(tmp_path)
    with pytest.raises(ValueError, match="256 and the large"):
        keys(tree(tmp_path, "data_large", "val_large"))
    other = tmp_path / "other"
    tree(other, "data_256_standard")
    with pytest.raises(ValueError, match="more than one edition"):
        keys(tree(other, "data_256_challenge"))


def test_a_root_without_places2_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no Places2"):
        keys(tmp_path)


def published(train: int) -> Files:
    files: Files = {f"data_large/a/b{n % 365}/{n:08d}.jpg": None for n in range(train)}
    return files | {f"val_large/Places365_val_{n:08d}.jpg": None for n in range(1, 36_501)}


def test_counts_other_than_the_published_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds 3 train and 2 val pictures; Places2 has 1,803,460"):
        keys(tree(tmp_path), partial=False)
    # As after flattening the archive into one folder, where names of classes clash.
    with pytest.raises(ValueError, match="overwritten"):
        list(places2.pictures(published(5_000), "root"))


def test_the_published_counts_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places2, "TRAIN_COUNTS", {"standard": 20_000})
    pictures = list(places2.pictures(published(20_000), "root"))
    assert len(pictures) == 56_500
