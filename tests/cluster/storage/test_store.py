"""What every store promises, on a directory and on a real S3 server."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import FileSelector

from cluster.storage import (
    MIB,
    MissingKeyError,
    StorageError,
    Store,
    join,
    pyarrow_filesystem,
)
from cluster.storage.s3 import s3_bucket


def test_what_was_put_comes_back(store: Store) -> None:
    store.put("a/b.json", b"one")
    store.put("a/b.json", b"two")
    assert store.get("a/b.json") == b"two"
    assert store.size("a/b.json") == 3
    assert store.exists("a/b.json")
    with store.open("a/b.json") as source:
        assert source.read(2) + source.read() == b"two"


def test_a_range_of_a_value_comes_alone(store: Store) -> None:
    store.put("key", b"0123456789")
    for again in (store, store.reconnected()):
        assert again.read_range("key", 0, 4) == b"0123"
        assert again.read_range("key", 8, 4) == b"89"
    with pytest.raises(MissingKeyError):
        store.read_range("missing", 0, 1)


def test_an_empty_value_is_a_value(store: Store) -> None:
    store.put("empty", b"")
    assert store.get("empty") == b""
    assert store.exists("empty")


def test_keys_are_listed_by_their_beginning_in_order(store: Store) -> None:
    for key in ["step-2/b", "step-10/a", "step-1", "other/x", "step-1/a"]:
        if key != "step-1":
            store.put(key, b"")
    assert store.list_keys("step-1") == ["step-1/a", "step-10/a"]
    assert store.list_keys("step-1/") == ["step-1/a"]
    assert store.list_keys() == ["other/x", "step-1/a", "step-10/a", "step-2/b"]
    assert store.list_keys("none/") == []


def test_a_missing_key_is_a_file_not_found_in_one_line(store: Store, tmp_path: Path) -> None:
    calls: list[Any] = [store.get, store.open, store.size]
    for call in [*calls, lambda key: store.download(key, tmp_path / "copy")]:
        with pytest.raises(MissingKeyError) as caught:
            call("not/there")
        assert isinstance(caught.value, FileNotFoundError)
        assert "\n" not in str(caught.value)
        assert join(store.url, "not/there") in str(caught.value)
    assert not (tmp_path / "copy").exists()
    assert not store.exists("not/there")


def test_deleting_leaves_nothing_and_may_be_repeated(store: Store) -> None:
    store.put("a/b/c", b"")
    store.delete("a/b/c")
    store.delete("a/b/c")
    assert store.list_keys() == []


def test_a_big_file_goes_up_in_parts_and_comes_down_equal(store: Store, tmp_path: Path) -> None:
    data = os.urandom(33 * MIB)  # beyond the threshold of a multipart upload
    (tmp_path / "here").write_bytes(data)
    store.upload(tmp_path / "here", "big")
    store.download("big", tmp_path / "new" / "there")
    assert (tmp_path / "new" / "there").read_bytes() == data
    assert store.size("big") == len(data)


def test_a_store_survives_pickling_and_carries_no_secret(store: Store) -> None:
    store.put("key", b"value")
    frozen = pickle.dumps(store)
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "unset").encode() not in frozen
    assert pickle.loads(frozen).get("key") == b"value"


def test_many_threads_may_share_a_store(store: Store) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: store.put(f"k{number}", b"x" * 1000), range(32)))
    assert len(store.list_keys()) == 32


@pytest.mark.parametrize("key", ["", "/absolute", "a/../b", "a//b", "a/"])
def test_a_key_that_is_no_plain_path_is_refused(store: Store, key: str) -> None:
    with pytest.raises(StorageError, match="plain relative path"):
        store.put(key, b"")


def test_only_files_of_this_machine_have_a_local_path(store: Store) -> None:
    store.put("a/key", b"value")
    path = store.local_path("a/key")
    if s3_bucket(store.url):
        assert path is None
        assert store.local_path() is None
    else:
        assert path is not None
        assert path.read_bytes() == b"value"
        assert store.local_path() == path.parents[1]


def test_pyarrow_reaches_the_same_objects(store: Store) -> None:
    store.put("folder/part", b"12345")
    filesystem, path = pyarrow_filesystem(store.url)
    found = filesystem.get_file_info(FileSelector(f"{path}/folder"))
    assert [(info.base_name, info.size) for info in found] == [("part", 5)]
