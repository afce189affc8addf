"""CelebA-HQ in every form that it comes in; numbers from 0 and from 1; the official partition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.storage import MissingKeyError, StorageError, open_store
from data_prep import celebahq
from data_prep.files import Files, SourceImage, list_files
from tests.data_prep.settings import list_source, read_listed
from tests.data_prep.tars import tar_of


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def from_files(files: Files, root: str, split: str = "official") -> Iterator[SourceImage]:
    return celebahq.list_images(files, root, split=split, val_fraction=0.05, allow_partial=False)


def listed(root: Path | str, split: str, allow_partial: bool = True) -> list[SourceImage]:
    return list_source("celebahq", root=str(root), split=split, allow_partial=allow_partial)


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
    images = listed(touch(tmp_path / "root", *names), held_out)
    assert [image.key for image in images] == [f"celebahq-{n:05d}" for n in range(12)]
    assert [image.path for image in images] == names  # by number: 10.jpg is not after 1.jpg
    assert [p.key for p in images if p.split == "val"] == ["celebahq-00002", "celebahq-00010"]
    assert {image.subject for image in images} == {"face"}


def test_png_tars_as_tfds_wants_them_are_read_one_size_at_a_time(
    tmp_path: Path, held_out: str
) -> None:
    """Their numbers are from 0, whatever the name says; of a part of them too."""
    for size in (128, 256):
        members = {f"data{size}x{size}/imgHQ{n:05d}.png": b"png %d" % size for n in range(1, 12)}
        tar_of(tmp_path / "manual" / f"data{size}x{size}.tar", members)
    root = str(tmp_path / "manual" / "data256x256.tar")
    images = listed(root, held_out)
    assert [image.key for image in images] == [f"celebahq-{n:05d}" for n in range(1, 12)]
    assert read_listed(images[0], root) == b"png 256"
    with pytest.raises(ValueError, match=r"image 1 twice, data128x128/.*point data.root at one"):
        listed(tmp_path / "manual", held_out)


def test_a_part_of_data256x256_counts_from_1_also_from_inside_its_folder(
    tmp_path: Path, held_out: str
) -> None:
    root = touch(tmp_path, *(f"data256x256/{number:05d}.jpg" for number in (3, 11)))
    for below in (root, root / "data256x256"):
        assert [p.key for p in listed(below, held_out)] == ["celebahq-00002", "celebahq-00010"]


@pytest.mark.parametrize("line", ["{}.jpg", "imgHQ{:05d}.npy", "/celeba_hq/img/{:05d}.png", "{}"])
def test_a_list_of_2000_as_deepfill_lama_or_taming_write_it_leaves_28000(
    tmp_path: Path, line: str
) -> None:
    held_out = range(7, 30_000, 15)
    path = tmp_path / "val.flist"
    path.write_text("".join(f"{line.format(number)}\n" for number in held_out))
    files: Files = {f"CelebA-HQ-img/{number}.jpg": None for number in range(30_000)}
    images = list(from_files(files, "root", str(path)))
    assert Counter(image.split for image in images) == {"train": 28_000, "val": 2_000}
    assert images[7].split == "val"


def test_annotations_of_celebamask_are_no_images(tmp_path: Path, held_out: str) -> None:
    root = tmp_path / "root"
    touch(root, *(f"CelebA-HQ-img/{number}.jpg" for number in range(12)))
    touch(root, "CelebAMask-HQ-mask-anno/0/00000_skin.png", "CelebAMaskHQ-mask-anno/0/00001.png")
    assert len(listed(root, held_out)) == 12


def test_two_forms_or_two_numberings_in_one_root_are_refused(tmp_path: Path, held_out: str) -> None:
    root = touch(tmp_path / "a", "x/00007.jpg", "y/7.jpg")
    with pytest.raises(ValueError, match="image 7 twice"):
        listed(root, held_out)
    root = touch(tmp_path / "b", "x/00000.jpg", "x/30000.jpg")
    with pytest.raises(ValueError, match="two numberings are mixed"):
        listed(root, held_out)


def test_a_list_must_fit_the_images(tmp_path: Path) -> None:
    root = touch(tmp_path / "root", "0.jpg", "1.jpg")
    (tmp_path / "far.txt").write_text("29999\n")
    with pytest.raises(ValueError, match="holds 2 images of CelebA-HQ's 30,000"):
        listed(root, str(tmp_path / "far.txt"), allow_partial=False)
    (tmp_path / "no.txt").write_text("smiling\n")
    with pytest.raises(ValueError, match="should list images"):
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
    images = from_files(files, str(root))
    assert Counter(image.split for image in images) == {"train": 24_183, "val": 2_993}
    wrong = [24_184 if original == first_val else original for original in right]
    partitioned(tmp_path, dict(enumerate(wrong)))
    with pytest.raises(ValueError, match="'train': 24184, 'val': 2992, 'test': 2824"):
        list(from_files(files, str(root)))


def test_without_the_mapping_there_is_no_official_split(tmp_path: Path) -> None:
    root = touch(tmp_path, "train/0.jpg", "val/1.jpg")
    with pytest.raises(ValueError, match=r"needs list_eval_partition\.txt"):
        listed(root, "official")


HF = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def mirror(root: Path, names: dict[str, list[str | None]], group: int = 4) -> dict[str, bytes]:
    """Parquet files as Hugging Face writes them; what the rows hold, by the paths they go by."""
    held: dict[str, bytes] = {}
    for file, of_rows in names.items():
        path = f"data/{file}.parquet"
        images = [f"{file} {row} ".encode() * 500 for row in range(len(of_rows))]
        held |= {f"{path}/{row:05d}": data for row, data in enumerate(images)}
        rows = [{"bytes": b, "path": n} for b, n in zip(images, of_rows, strict=True)]
        image = pa.array(rows, HF)
        table = pa.table({"image": image, "label": [row % 2 for row in range(len(rows))]})
        (root / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(table, root / path, row_group_size=group)
    return held


UNNAMED: dict[str, list[str | None]] = {
    "train-00000-of-00002": [None] * 9,
    "train-00001-of-00002": [None] * 3,
    "validation-00000-of-00001": [None] * 4,
}


@pytest.mark.parametrize("where", ["file", "s3"])
def test_rows_of_parquet_are_read_on_disk_and_on_s3(
    tmp_path: Path, where: str, request: pytest.FixtureRequest
) -> None:
    held = mirror(tmp_path, UNNAMED)
    root = str(tmp_path)
    if where == "s3":
        root = request.getfixturevalue("s3_url")
        for path in tmp_path.rglob("*.parquet"):
            open_store(root).upload(path, path.relative_to(tmp_path).as_posix())
    images = listed(root, "val_fraction")
    assert {p.path: read_listed(p, root) for p in images} == held
    assert images[1].key == "data/train-00000-of-00002=parquet/00001"


def test_a_split_of_a_mirror_is_never_taken_as_official(tmp_path: Path) -> None:
    held = mirror(tmp_path, UNNAMED)
    with pytest.raises(
        ValueError, match=r"00000-of-00002\.parquet/00000 and the other rows hold no n"
    ):
        listed(tmp_path, "official")
    listing = tmp_path / "rows.txt"
    listing.write_text("data/train-00000-of-00002.parquet/00003\n")
    held_out = [p.path for p in listed(tmp_path, str(listing)) if p.split == "val"]
    assert held_out == ["data/train-00000-of-00002.parquet/00003"]
    images = list_source(
        "celebahq", root=str(tmp_path), split="val_fraction", val_fraction=0.5, allow_partial=True
    )
    assert {p.path for p in images if p.split == "val" and "train-" in p.path}
    assert {p.path for p in images if p.split == "train" and "validation-" in p.path}
    assert len(images) == len(held)
    listing.write_text("3\n")
    with pytest.raises(ValueError, match=r"rows\.txt should list rows"):
        listed(tmp_path, str(listing))


def test_rows_that_name_their_numbers_are_celebahq_whatever_their_order(
    tmp_path: Path, held_out: str
) -> None:
    order = [7, 0, 10, 3, 2]
    names: list[str | None] = [f"celeba/imgHQ{number:05d}.png" for number in order]
    held = mirror(tmp_path, {"train-00000-of-00002": names[:3], "train-00001-of-00002": names[3:]})
    images = listed(tmp_path, held_out)
    assert [p.key for p in images] == [f"celebahq-{number:05d}" for number in sorted(order)]
    assert [p.key for p in images if p.split == "val"] == ["celebahq-00002", "celebahq-00010"]
    by_number = dict(zip(order, held.values(), strict=True))
    for image in images:
        assert read_listed(image, str(tmp_path)) == by_number[int(image.key[-5:])]
    partitioned(tmp_path, {number: 162_770 + number % 2 for number in order})
    assert [p.split for p in listed(tmp_path, "official")] == [
        "val" if number % 2 else "train" for number in sorted(order)
    ]


@pytest.mark.parametrize(
    "names", [["0.jpg", "1.jpg", "0.jpg"], ["0.jpg", None, "2.jpg"], ["0.jpg", "b.jpg", "2.jpg"]]
)
def test_names_that_repeat_or_are_missing_are_no_numbers(
    tmp_path: Path, names: list[str | None]
) -> None:
    mirror(tmp_path, {"train-00000-of-00001": names[:2], "test-00000-of-00001": names[2:]})
    with pytest.raises(ValueError, match="hold no numbers"):
        listed(tmp_path, "official")


def test_the_counts_of_a_mirror_are_asserted(tmp_path: Path) -> None:
    mirror(tmp_path, UNNAMED)
    with pytest.raises(ValueError, match="holds 16 images of CelebA-HQ's 30,000"):
        listed(tmp_path, "val_fraction", allow_partial=False)


def test_no_more_of_a_file_is_read_than_names_and_a_row_group(tmp_path: Path) -> None:
    held = mirror(tmp_path, {"train-00000-of-00001": [None] * 8})
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    chunk = pq.read_metadata(path).row_group(0).column(0)
    assert chunk.path_in_schema == "image.bytes"
    first = chunk.dictionary_page_offset or chunk.data_page_offset
    with path.open("r+b") as file:
        file.seek(first)
        file.write(bytes(chunk.total_compressed_size))
    images = listed(tmp_path, "val_fraction")
    for image in images[4:]:
        assert read_listed(image, str(tmp_path)) == held[image.path]
    with pytest.raises(OSError, match=r"00001\.parquet: row group 0 cannot be read"):
        read_listed(images[0], str(tmp_path))


def test_rows_of_a_parquet_file_that_was_replaced_are_not_read(tmp_path: Path) -> None:
    mirror(tmp_path, {"train": [None] * 9})
    images = listed(tmp_path, "val_fraction")
    mirror(tmp_path, {"train": [None] * 5})
    with pytest.raises(StorageError, match=r"train\.parquet was replaced since it was listed"):
        read_listed(images[0], str(tmp_path))


def test_what_is_wrong_with_a_parquet_file_is_named(tmp_path: Path) -> None:
    mirror(tmp_path / "both", UNNAMED)
    touch(tmp_path / "both", "0.jpg")
    with pytest.raises(ValueError, match=r"as files, 0\.jpg, and in data/train-00000-of"):
        listed(tmp_path / "both", "val_fraction")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"cut/train\.parquet is not a complete Parquet file"):
        listed(tmp_path / "cut", "val_fraction")
    (tmp_path / "text").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text" / "train.parquet")
    with pytest.raises(ValueError, match=r"has 0 columns of images .* among text"):
        listed(tmp_path / "text", "val_fraction")
    (tmp_path / "null").mkdir()
    image = pa.array([{"bytes": None, "path": "elsewhere.jpg"}, None])
    pq.write_table(pa.table({"image": image.cast(HF)}), tmp_path / "null" / "train.parquet")
    for image in listed(tmp_path / "null", "val_fraction"):
        with pytest.raises(MissingKeyError, match="has no image"):
            read_listed(image, str(tmp_path / "null"))
