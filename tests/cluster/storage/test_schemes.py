"""From a URL to its store."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.storage import (
    SCHEMES,
    StorageError,
    folder_and_name,
    open_store,
)


@pytest.mark.parametrize(
    ("url", "folder", "name"),
    [
        ("a/b.tar", "a", "b.tar"),
        ("b.tar", ".", "b.tar"),
        ("/b.tar", "/", "b.tar"),
        ("file:///b.tar", "/", "b.tar"),
        ("s3://bucket/b.tar", "s3://bucket", "b.tar"),
        ("s3://bucket/a/b.tar", "s3://bucket/a", "b.tar"),
    ],
)
def test_the_url_of_a_file_splits_into_its_store_and_its_key(
    url: str, folder: str, name: str
) -> None:
    where, key = folder_and_name(url)
    assert (open_store(where).url, key) == (open_store(folder).url, name)


def test_a_plain_path_and_a_file_url_are_the_same_store(tmp_path: Path) -> None:
    open_store(str(tmp_path / "a b")).put("key", b"1")
    assert open_store(f"file://{tmp_path}/a%20b").get("key") == b"1"


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("data").url == str(tmp_path / "data")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "file://elsewhere/path",
        "file:/path",
        "foo://x",
        "gs://bucket/x",
        "http://user:planted@host/x",
        "models:/generator/1",
        "runs:/0123/weights",
        "s3:/bucket/x",
        "s3://",
        "s3://ab/x",
        "s3://b_ü/x",
        "S3://bucket/x",
    ],
)
def test_a_url_of_another_kind_is_refused_in_one_line_and_makes_no_folder(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match=r"s3://|file:///") as caught:
        open_store(url).put("key", b"")
    assert "\n" not in str(caught.value)
    assert "planted" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["a:b", "./models:/x"])
def test_a_path_may_have_colons(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store(path).local_path() == tmp_path / path


def test_a_further_scheme_is_one_entry_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCHEMES, "toy", lambda url: open_store(str(tmp_path / url[6:])))
    open_store("toy://folder").put("key", b"value")
    assert (tmp_path / "folder" / "key").read_bytes() == b"value"
