"""Files in folders, in buckets, and in tars that nobody unpacked."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import MissingKeyError, StorageError, open_store
from data_prep.files import Files, list_files, read_file
from tests.data_prep.settings import list_source, read_listed
from tests.data_prep.tars import tar_of


def contents(root: str, files: Files) -> dict[str, bytes]:
    return {path: read_file(root, path, member) for path, member in files.items()}


MEMBERS = {"./a/1.jpg": b"one", "a/2.jpg": b"", "b/" + "long" * 60 + ".jpg": b"x" * 1000}
AS_UNPACKED = {path.removeprefix("./"): data for path, data in MEMBERS.items()}


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_read_as_if_it_were_unpacked(tmp_path: Path, kind: int) -> None:
    path = tar_of(tmp_path / "x" / "images.tar", MEMBERS | {"a/._1.jpg": b"junk"}, kind)
    assert contents(str(path), list_files(str(path))) == AS_UNPACKED
    (tmp_path / "y.jpg").write_bytes(b"beside")
    below = {f"x/{name}": data for name, data in AS_UNPACKED.items()}
    assert contents(str(tmp_path), list_files(str(tmp_path))) == below | {"y.jpg": b"beside"}


def test_a_tar_on_s3_is_read_in_place(tmp_path: Path, s3_url: str) -> None:
    path = tar_of(tmp_path / "images.tar", MEMBERS)
    open_store(s3_url).upload(path, "sub/images.tar")
    url = f"{s3_url}/sub/images.tar"
    assert contents(url, list_files(url)) == AS_UNPACKED
    assert contents(s3_url, list_files(s3_url)).keys() == {f"sub/{name}" for name in AS_UNPACKED}


def test_keys_do_not_depend_on_unpacking(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "tar" / "images.tar", MEMBERS)
    unpacked = tmp_path / "unpacked"
    with tarfile.open(tar) as archive:
        archive.extractall(unpacked, filter="data")
    of_tar, of_folder = (
        list_source("folder", root=str(root), val_fraction=0.5) for root in (tar, unpacked)
    )
    assert [(p.key, p.split) for p in of_tar] == [(p.key, p.split) for p in of_folder]
    assert [read_listed(p, str(tar)) for p in of_tar] == [
        read_listed(p, str(unpacked)) for p in of_folder
    ]


def with_links(path: Path) -> Path:
    """A tar that was added to, with hard links, and two links that lead to no member before.

    One member has an absolute path, as ``tar -P`` leaves it.
    """
    link = {"type": tarfile.LNKTYPE}
    symbolic = {"type": tarfile.SYMTYPE}
    members: list[tuple[str, bytes, dict[str, Any]]] = [
        ("./a/1.jpg", b"old", {}),
        ("./a/linked.jpg", b"", link | {"linkname": "./a/1.jpg"}),
        ("a/.hidden.jpg", b"hidden", {}),
        ("a/shown.jpg", b"", link | {"linkname": "a/.hidden.jpg"}),
        ("a/2.jpg", b"two", {}),
        ("/a/3.jpg", b"three", {}),
        ("a/1.jpg", b"new", {}),
        ("a/s.jpg", b"", symbolic | {"linkname": "1.jpg"}),
        ("a/gone.jpg", b"was there", {}),
        ("a/gone.jpg", b"", symbolic | {"linkname": "2.jpg"}),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data, fields in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_of_members_of_one_name_the_last_counts_and_hard_links_are_files(
    tmp_path: Path, s3_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = with_links(tmp_path / "x" / "images.tar")
    open_store(s3_url).upload(path, "x/images.tar")
    of_tar = {"1": b"new", "2": b"two", "3": b"three", "linked": b"old", "shown": b"hidden"}
    for root in (str(tmp_path), s3_url):
        tar = f"{root}/x/images.tar"
        caplog.clear()
        found = contents(tar, list_files(tar))
        assert found == {f"a/{name}.jpg": data for name, data in of_tar.items()}
        assert caplog.messages == [f"links in a tar left out count=2 url={tar}"]
        found = contents(root, list_files(root))
        assert found == {f"x/a/{name}.jpg": data for name, data in of_tar.items()}


def test_what_gnu_tar_unpacks_is_what_is_listed(tmp_path: Path) -> None:
    tar, unpacked = with_links(tmp_path / "images.tar"), tmp_path / "unpacked"
    unpacked.mkdir()
    subprocess.run(["tar", "-xf", tar, "-C", unpacked], check=True)
    for link in ("s.jpg", "gone.jpg"):
        (unpacked / "a" / link).unlink()
    assert contents(str(tar), list_files(str(tar))) == contents(
        str(unpacked), list_files(str(unpacked))
    )


def test_what_lies_beside_its_tar_counts_once(tmp_path: Path) -> None:
    tar_of(tmp_path / "images.tar", {"a/1.jpg": b"old", "a/2.jpg": b"two"})
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(b"new")
    found = contents(str(tmp_path), list_files(str(tmp_path)))
    assert found == {"a/1.jpg": b"new", "a/2.jpg": b"two"}


def test_a_tar_cut_short_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "images.tar", {"a.jpg": b"x" * 5000, "b.jpg": b"y" * 5000})
    files = list_files(str(path))
    path.write_bytes(path.read_bytes()[:7000])
    with pytest.raises(ValueError, match=r"images\.tar is not a complete tar"):
        list_files(str(path))
    with pytest.raises(StorageError, match=r"images\.tar was replaced since it was listed"):
        read_file(str(path), "b.jpg", files["b.jpg"])


def test_places_in_a_tar_are_good_for_that_tar_only(tmp_path: Path, s3_url: str) -> None:
    url, store = f"{s3_url}/images.tar", open_store(s3_url)
    path = tar_of(tmp_path / "images.tar", {"a.jpg": b"one", "b.jpg": b"two"})
    store.upload(path, "images.tar")
    listed = {root: list_files(root) for root in (str(path), url)}
    tar_of(path, {"b.jpg": b"TWO", "a.jpg": b"ONE", "c.jpg": b""})  # a.jpg is now elsewhere
    store.upload(path, "images.tar")
    for root, files in listed.items():
        with pytest.raises(StorageError, match="replaced since it was listed: run the same"):
            read_file(root, "a.jpg", files["a.jpg"])
        assert contents(root, list_files(root))["a.jpg"] == b"ONE"


def test_a_tar_that_went_away_is_missed(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "gone.tar", {"a.jpg": b"x"})
    files = list_files(str(path))
    path.unlink()
    with pytest.raises(MissingKeyError, match=r"gone\.tar"):
        read_file(str(path), "a.jpg", files["a.jpg"])
