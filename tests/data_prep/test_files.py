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


def test_equal_names_in_several_tars_are_different_files(tmp_path: Path, s3_url: str) -> None:
    for number in range(3):
        name = f"shard-{number:05d}.tar"
        members = {f"{k}.jpg": f"{number}/{k}".encode() for k in range(4)} | {f"own{number}": b""}
        open_store(s3_url).upload(tar_of(tmp_path / "sub" / name, members), f"sub/{name}")
    (tmp_path / "sub" / "0.jpg").write_bytes(b"beside the tars")
    open_store(s3_url).put("sub/0.jpg", b"beside the tars")
    expected = {
        f"sub/shard-{number:05d}.tar/{k}.jpg": f"{number}/{k}".encode()
        for number in range(3)
        for k in range(4)
    }
    expected |= {f"sub/own{number}": b"" for number in range(3)}
    for root in (str(tmp_path), s3_url):
        assert contents(root, list_files(root)) == expected | {"sub/0.jpg": b"beside the tars"}


def test_joined_tars_and_holes_in_tars_are_refused(tmp_path: Path, s3_url: str) -> None:
    one = tar_of(tmp_path / "one", {"a.jpg": b"x" * 9000}).read_bytes()
    two = tar_of(tmp_path / "two", {"b.jpg": b"y" * 9000, "c.jpg": b"z"}).read_bytes()
    joined = {"joined.tar": one + two, "hole.tar": bytes(10240) + two}
    for name, data in joined.items():
        (tmp_path / name).write_bytes(data)
        open_store(s3_url).put(name, data)
        for root in (str(tmp_path), s3_url):
            with pytest.raises(ValueError, match=rf"{name} has data behind its end"):
                list_files(f"{root}/{name}")


def test_a_sparse_member_is_left_out_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (tmp_path / "holes.jpg").open("wb") as file:
        file.truncate(2**20)
        file.seek(2**19)
        file.write(b"data")
    (tmp_path / "whole.jpg").write_bytes(b"whole")
    tar = tmp_path / "images.tar"
    names = ["holes.jpg", "whole.jpg"]
    subprocess.run(["tar", "--sparse", "-cf", tar, "-C", tmp_path, *names], check=True)
    assert contents(str(tar), list_files(str(tar))) == {"whole.jpg": b"whole"}
    assert "sparse files in a tar left out count=1 (holes.jpg)" in caplog.text


def test_thumbnails_and_trash_are_left_out_with_one_warning(
    tmp_path: Path, s3_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    clutter = ("@eaDir/a.jpg/thumb.jpg", "#recycle/b.jpg", "x/$RECYCLE.BIN/c.jpg", "lost+found/d")
    for name in ("a.jpg", "x/b.jpg", *clutter):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
        open_store(s3_url).put(name, b"x")
    tar = tar_of(tmp_path / "y" / "z.tar", {"__MACOSX/e.jpg": b"x", "f.jpg": b"x"})
    for root in (str(tmp_path), s3_url):
        caplog.clear()
        found = [path for path in list_files(root) if not path.startswith("y/")]
        assert sorted(found) == ["a.jpg", "x/b.jpg"]
        (warning, *_) = [m for m in caplog.messages if m.endswith(f"root={root}")]
        assert all(name.split("/")[-2] in warning for name in ("lost+found/d", *clutter[1:]))
    assert list(list_files(str(tar))) == ["f.jpg"]


def test_names_that_only_look_equal_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("caf\u00e9.jpg", "cafe\u0301.jpg", "th\u00e9.jpg"):
        (tmp_path / name).write_bytes(b"x")
    assert len(list_files(str(tmp_path))) == 3
    (warning,) = caplog.messages
    assert "look equal" in warning
    assert r"'cafe\u0301.jpg' and 'caf\xe9.jpg'" in warning


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
