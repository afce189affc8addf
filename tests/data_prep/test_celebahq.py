"""CelebA-HQ in every form that it comes in; numbers from 0 and from 1; the official partition."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from data_prep import celebahq
from data_prep.files import Picture, list_files
from data_prep.sources import list_pictures
from tests.data_prep.tars import tar_of


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def listed(root: Path, split: str, partial: bool = True) -> list[Picture]:
    return list_pictures("celebahq", root=str(root), split=split, partial=partial)


@pytest.fixture
def held_out(tmp_path: Path) -> str:
    path = tmp_path / "lists" / "val.flist"
    path.parent.mkdir()
    path.write_text("2.jpg\n10.jpg\n")
    return str(path)


FORMS = {
    "CelebAMask-HQ/CelebA-HQ-img/{}.jpg": 0,
    "data256x256/{:05d}.jpg": 1,
    "celeba_hq_256/{:05d}.jpg": 0,
    "imgHQ{:05d}.npy": 0,
    "data1024x1024/imgHQ{:05d}.png": 0,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_keys(tmp_path: Path, form: str, held_out: str) -> None:
    names = [form.format(number + FORMS[form]) for number in range(12)]
    pictures = listed(touch(tmp_path / "root", *names), held_out)
    assert [picture.key for picture in pictures] == [f"celebahq-{n:05d}" for n in range(12)]
    assert [picture.path for picture in pictures] == names  # by number: 10.jpg is not after 1.jpg
    assert [p.key for p in pictures if p.split == "val"] == ["celebahq-00002", "celebahq-00010"]
    assert {picture.subject for picture in pictures} == {"face"}


def test_pictures_in_a_tar_are_found(tmp_path: Path, held_out: str) -> None:
    members = {f"data128x128/imgHQ{number:05d}.png": b"png" for number in range(12)}
    tar = tar_of(tmp_path / "data128x128.tar", members)
    assert len(listed(tar, held_out)) == 12


def test_annotations_of_celebamask_are_no_pictures(tmp_path: Path, held_out: str) -> None:
    root = tmp_path / "root"
    touch(root, *(f"CelebA-HQ-img/{number}.jpg" for number in range(12)))
    touch(root, "CelebAMask-HQ-mask-anno/0/00000_skin.png", "CelebAMaskHQ-mask-anno/0/00001.png")
    assert len(listed(root, held_out)) == 12


def test_two_forms_or_two_numberings_in_one_root_are_refused(tmp_path: Path, held_out: str) -> None:
    root = touch(tmp_path / "a", "x/00007.jpg", "y/7.jpg")
    with pytest.raises(ValueError, match="picture 7 twice"):
        listed(root, held_out)
    root = touch(tmp_path / "b", "x/00000.jpg", "x/30000.jpg")
    with pytest.raises(ValueError, match="two numberings are mixed"):
        listed(root, held_out)


def test_a_list_must_fit_the_pictures(tmp_path: Path) -> None:
    root = touch(tmp_path / "root", "0.jpg", "1.jpg")
    (tmp_path / "far.txt").write_text("29999\n")
    with pytest.raises(ValueError, match="holds 2 pictures of CelebA-HQ's 30,000"):
        listed(root, str(tmp_path / "far.txt"), partial=False)
    (tmp_path / "no.txt").write_text("smiling\n")
    with pytest.raises(ValueError, match="is no list of pictures"):
        listed(root, str(tmp_path / "no.txt"))


# Original files on both sides of the borders of CelebA's partition: 1-162770, -182637, -202599.
ORIGINALS = {0: 162_770, 1: 162_771, 2: 182_637, 3: 182_638, 4: 1, 5: 202_599}
SPLITS = {0: "train", 1: "val", 2: "val", 3: "test", 4: "train", 5: "test"}


def partitioned(root: Path, originals: dict[int, int]) -> Path:
    lines = ["idx orig_idx  orig_file"]
    lines += [f"{n} {original - 1}      {original:06d}.jpg" for n, original in originals.items()]
    (root / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(lines) + "\n")
    parts = [
        f"{n:06d}.jpg {0 if n <= 162_770 else 1 if n <= 182_637 else 2}" for n in range(1, 202_600)
    ]
    (root / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    return root


def test_the_official_partition_goes_by_the_original_file(tmp_path: Path) -> None:
    root = partitioned(touch(tmp_path, *(f"{n}.jpg" for n in ORIGINALS)), ORIGINALS)
    assert {p.key: p.split for p in listed(root, "official")} == {
        f"celebahq-{number:05d}": split for number, split in SPLITS.items() if split != "test"
    }


def test_the_official_counts_are_asserted(tmp_path: Path) -> None:
    first_val, first_test = 162_771, 182_638
    right = [*range(1, 24_184), *range(first_val, first_val + 2_993)]
    right += range(first_test, first_test + 2_824)
    root = partitioned(tmp_path, dict(enumerate(right)))
    files = list_files(str(root)) | {f"CelebA-HQ-img/{n}.jpg": None for n in range(30_000)}
    pictures = celebahq.pictures(files, str(root))
    assert Counter(picture.split for picture in pictures) == {"train": 24_183, "val": 2_993}
    wrong = [24_184 if original == first_val else original for original in right]
    partitioned(tmp_path, dict(enumerate(wrong)))
    with pytest.raises(ValueError, match="'train': 24184, 'val': 2992, 'test': 2824"):
        list(celebahq.pictures(files, str(root)))


def test_without_the_mapping_there_is_no_official_split(tmp_path: Path) -> None:
    root = touch(tmp_path, "train/0.jpg", "val/1.jpg")
    with pytest.raises(ValueError, match=r"needs list_eval_partition\.txt"):
        listed(root, "official")
