"""Places2 in every layout that it comes in, and the traps of each."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cluster.storage import open_store
from data_prep import places2
from data_prep.files import Files
from tests.data_prep.settings import list_source, read_listed
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


def keys(root: Path | str, allow_partial: bool = True) -> dict[str, str]:
    images = list_source("places2", root=str(root), allow_partial=allow_partial)
    assert {image.subject for image in images} == {"scene"}
    return {image.key: image.split for image in images}


@pytest.mark.parametrize("train", ["data_256", "data_256_standard", "x/data_256_challenge"])
def test_folders_as_unpacked_and_as_renamed_have_the_same_keys(tmp_path: Path, train: str) -> None:
    assert keys(tree(tmp_path, train)) == KEYS


def test_the_large_images_have_keys_of_their_own(tmp_path: Path) -> None:
    found = keys(tree(tmp_path, "data_large_standard", "val_large"))
    assert next(iter(found)) == "data_large/a/airfield/00000001"
    assert found["val_large/Places365_val_00000001"] == "val"


def test_archives_that_nobody_unpacked_have_the_same_keys_and_bytes(tmp_path: Path) -> None:
    train = {f"data_256/{name}": name.encode() for name in TRAIN}
    tar_of(tmp_path / "train_256_places365standard.tar", train)
    tar_of(tmp_path / "val_256.tar", {f"val_256/{name}": name.encode() for name in VAL})
    tar_of(tmp_path / "test_256.tar", {"test_256/Places365_test_00000001.jpg": b"test"})
    assert keys(tmp_path) == KEYS
    images = list_source("places2", root=str(tmp_path), allow_partial=True)
    assert read_listed(images[2], str(tmp_path)) == TRAIN[2].encode()


def test_archives_on_s3_are_read_in_place(tmp_path: Path, s3_url: str) -> None:
    for name, members in {
        "train_256_places365standard.tar": {f"data_256/{n}": n.encode() for n in TRAIN},
        "val_256.tar": {f"val_256/{name}": name.encode() for name in VAL},
    }.items():
        open_store(s3_url).upload(tar_of(tmp_path / name, members), name)
    assert keys(s3_url) == KEYS
    images = list_source("places2", root=s3_url, allow_partial=True)
    assert [read_listed(image, s3_url) for image in images] == [
        name.encode() for name in TRAIN + VAL
    ]


def test_images_for_testing_are_left_out(tmp_path: Path) -> None:
    tree(tmp_path)
    for name in ("test_256/Places365_test_00000001.jpg", "places365_test.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("Places365_test_00000001.jpg")
    assert keys(tmp_path) == KEYS


@pytest.mark.parametrize("unpacked", [True, False])
def test_the_easy_format_keeps_its_splits(tmp_path: Path, unpacked: bool) -> None:
    tree(tmp_path / "places365_standard", "train", "val/airfield")
    if not unpacked:
        files = list(tmp_path.rglob("*.jpg"))
        members = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in files}
        tar_of(tmp_path / "places365standard_easyformat.tar", members)
        shutil.rmtree(tmp_path / "places365_standard")
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
    missing = list_source("places2", root=str(root), allow_partial=True)[1]
    with pytest.raises(FileNotFoundError, match=r"data_256/b/bakery/shop/00000009\.jpg"):
        read_listed(missing, str(root))


def test_the_layout_of_mmagic_with_its_lists_is_taken(tmp_path: Path) -> None:
    root = tree(tmp_path / "data" / "Places", "data_large", "val_large")
    (root / "meta").mkdir()
    lines = {"places365_train_challenge": TRAIN, "places365_val": VAL}
    for name, names in lines.items():
        (root / "meta" / f"{name}.txt").write_text("".join(f"{n} 7\r\n" for n in names))
    found = keys(root)
    assert next(iter(found)) == "data_large/a/airfield/00000001"
    assert len(found) == 5
    with pytest.raises(ValueError, match="Places2 has 8,026,628 and 36,500"):
        keys(root, allow_partial=False)


def test_the_flat_folder_of_lama_has_names_that_clash_and_is_noticed_by_its_count(
    tmp_path: Path,
) -> None:
    """Three classes have an image 00000001; unpacked into one folder, the last is left."""
    for name in TRAIN:
        path = tmp_path / "places_standard_dataset" / "train" / Path(name).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    assert keys(tmp_path) == {"train/00000001": "train"}
    with pytest.raises(ValueError, match=r"holds 1 train .*files of one name overwritten"):
        keys(tmp_path, allow_partial=False)


def test_lists_are_read_from_their_archive_too(tmp_path: Path) -> None:
    lists = {
        "places365_train_standard.txt": f"/{TRAIN[1]} 5\n/{TRAIN[2]} 311\n".encode(),
        "places365_val.txt": f"{VAL[0]} 165\n".encode(),
        "places365_test.txt": b"Places365_test_00000001.jpg\n",
        "categories_places365.txt": b"/a/airfield 0\n",
    }
    tar_of(tree(tmp_path) / "filelist_places365-standard.tar", lists)
    assert list(keys(tmp_path)) == [list(KEYS)[number] for number in (1, 2, 3)]


def test_of_the_lists_of_both_editions_that_of_the_images_counts(tmp_path: Path) -> None:
    tree(tmp_path / "named", "data_256_challenge")
    tree(tmp_path / "unnamed", "data_256")
    for root in (tmp_path / "named", tmp_path / "unnamed"):
        (root / "places365_train_standard.txt").write_text(f"/{TRAIN[0]} 0\n")
        (root / "places365_train_challenge.txt").write_text(f"/{TRAIN[1]} 1\n")
    assert next(iter(keys(tmp_path / "named"))) == "data_256/a/alley/00000001"
    with pytest.raises(ValueError, match="the lists of both editions"):
        keys(tmp_path / "unnamed")


def test_archives_of_two_editions_are_not_mixed(tmp_path: Path) -> None:
    for edition, names in {"challenge": TRAIN[:2], "standard": TRAIN[1:]}.items():
        members = {f"data_256/{name}": b"" for name in names}
        tar_of(tmp_path / f"train_256_places365{edition}.tar", members)
    with pytest.raises(ValueError, match="more than one edition"):
        keys(tmp_path)


def test_an_archive_shows_which_count_to_expect(tmp_path: Path) -> None:
    members = {f"data_256/{name}": b"" for name in TRAIN}
    tar = tar_of(tmp_path / "train_256_places365challenge.tar", members)
    for root in (tmp_path, tar):
        with pytest.raises(ValueError, match="holds 3 train and 0 val images; Places2 has 8,026"):
            keys(root, allow_partial=False)


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
    with pytest.raises(ValueError, match="holds 3 train and 2 val images; Places2 has 1,803,460"):
        keys(tree(tmp_path), allow_partial=False)
    # As after flattening the archive into one folder, where names of classes clash.
    with pytest.raises(ValueError, match="overwritten"):
        list(places2.list_images(published(5_000), "root", allow_partial=False))


def test_the_published_counts_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places2, "TRAIN_COUNTS", {"standard": 20_000})
    images = list(places2.list_images(published(20_000), "root", allow_partial=False))
    assert len(images) == 56_500
