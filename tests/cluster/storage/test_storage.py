"""What a store promises, on a directory and on a real S3 server."""

from __future__ import annotations

import fcntl
import io
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from pyarrow.fs import FileSelector

from cluster.services import S3Server
from cluster.storage import (
    MIB,
    SCHEMES,
    MissingKeyError,
    StorageError,
    Store,
    describe_error,
    folder_and_name,
    join,
    open_store,
    pyarrow_filesystem,
    scratch_folder,
)
from cluster.storage.s3 import S3Store, endpoint, s3_bucket, storage_errors


@pytest.fixture
def one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


def test_what_was_put_comes_back(store: Store) -> None:
    store.put("a/b.json", b"one")
    store.put("a/b.json", b"two")
    assert store.get("a/b.json") == b"two"
    assert store.size("a/b.json") == 3
    assert store.exists("a/b.json")
    with store.open("a/b.json") as source:
        assert source.read(2) + source.read() == b"two"


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


def test_more_keys_than_one_page_of_s3_are_all_listed(s3_url: str) -> None:
    store = open_store(s3_url)
    keys = [f"k{number:04d}" for number in range(1005)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.put(key, b""), keys))
    assert store.list_keys() == keys


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


def test_a_disk_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "key").symlink_to("/proc/self/mem")  # reading it from the front is an error
    for size in (10, -1):
        with open_store(str(tmp_path)).open("key") as file, pytest.raises(StorageError) as caught:
            file.read(size)
        assert str(caught.value) == f"{tmp_path}/key: Input/output error"


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


def test_a_write_cut_short_leaves_the_old_file(tmp_path: Path) -> None:
    class BreaksOff(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise OSError(5, "Input/output error")

    store = open_store(str(tmp_path))
    store.put("key", b"old")
    source = tmp_path / "source"
    source.write_bytes(b"new")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", _opening(source, BreaksOff()))
        with pytest.raises(StorageError, match="Input/output error"):
            store.upload(source, "key")
    assert store.get("key") == b"old"
    assert store.list_keys() == ["key", "source"]


def _opening(path: Path, instead: io.BytesIO) -> Any:
    original = Path.open
    return lambda self, *args, **kwargs: (
        instead if self == path else original(self, *args, **kwargs)
    )


def test_a_full_or_forbidden_disk_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = open_store(str(tmp_path / "file" / "below"))
    with pytest.raises(StorageError, match="Not a directory"):
        store.put("key", b"")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that cannot be made")
def test_a_folder_that_cannot_be_made_is_told_in_one_line() -> None:
    with pytest.raises(StorageError, match="No such file or directory"):
        open_store("/proc/nowhere").put("key", b"")


CHILD = """
import resource, sys
from pathlib import Path
from cluster.storage import open_store, scratch_folder

{body}
"""


def child(body: str, *arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    """A real process, to be killed or kept small, that runs ``body``."""
    command = [sys.executable, "-c", CHILD.format(body=body), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)


def test_a_disk_that_takes_no_more_keeps_what_it_has(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("key", b"old")
    body = """
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # the kernel cuts the write there
open_store(sys.argv[1]).put("key", bytes(100_000))
"""
    with child(body, tmp_path, stderr=subprocess.PIPE) as process:
        _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.decode().endswith(f"StorageError: {tmp_path}/key: File too large\n")
    assert store.get("key") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


WRITES = 'open_store(sys.argv[1]).upload(Path("/dev/stdin"), "a/key")'


def writer(root: Path) -> subprocess.Popen[bytes]:
    """A process that is in the midst of a write, and waits there for the end of its input."""
    before = set(root.rglob(".unfinished-*"))
    process = child(WRITES, root)
    assert process.stdin
    while not set(root.rglob(".unfinished-*")) - before:
        assert process.poll() is None
        time.sleep(0.01)
    process.stdin.write(b"half of it")
    process.stdin.flush()
    return process


def test_what_a_killed_writer_left_is_removed_and_a_living_one_goes_on(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with writer(tmp_path) as killed, writer(tmp_path) as living:
        killed.kill()
        killed.wait()
        assert len(list(tmp_path.rglob(".unfinished-*"))) == 2
        assert store.clear_unfinished(abandoned_s=0) == 1
        assert store.clear_unfinished(abandoned_s=0) == 0
        assert living.stdin
        living.stdin.close()
        assert living.wait() == 0
    assert store.get("a/key") == b"half of it"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["key"]


def test_nothing_but_what_a_killed_writer_left_means_an_empty_folder(tmp_path: Path) -> None:
    with writer(tmp_path) as killed:
        killed.kill()
    assert open_store(str(tmp_path)).clear_unfinished() == 1
    assert list(tmp_path.iterdir()) == []


def test_what_another_machine_left_stays_until_it_is_old(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    theirs = tmp_path / ".unfinished-0badcafe-0123456789abcdef"
    theirs.write_bytes(b"its lock may not reach us")
    assert store.clear_unfinished() == 0
    os.utime(theirs, (0, 0))
    assert store.clear_unfinished() == 1
    assert not theirs.exists()


def test_many_writers_and_cleaners_lose_nothing(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))

    def write(number: int) -> None:
        store.put(f"k{number}", b"x")
        store.clear_unfinished(abandoned_s=0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(200)))
    assert len(list(tmp_path.iterdir())) == 200


def test_a_file_made_anew_under_the_name_of_an_abandoned_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".unfinished-0badcafe-0123456789abcdef"
    path.write_bytes(b"left by a writer that was killed")
    lock = fcntl.flock

    def too_late(opened: int, operation: int) -> None:
        path.unlink()  # another cleaner was faster, and a writer took the name
        path.write_bytes(b"of a writer that lives")
        lock(opened, operation)

    monkeypatch.setattr(fcntl, "flock", too_late)
    assert open_store(str(tmp_path)).clear_unfinished(abandoned_s=0) == 0
    assert path.read_bytes() == b"of a writer that lives"


def test_an_upload_that_was_killed_is_aborted_once_it_is_old(s3_url: str) -> None:
    store = open_store(s3_url)
    assert isinstance(store, S3Store)
    unfinished: Any = {"Bucket": "tests", "Prefix": s3_url.removeprefix("s3://tests/")}
    with child(WRITES, s3_url) as process:
        assert process.stdin
        process.stdin.write(bytes(33 * MIB))  # beyond the threshold, and then nothing
        process.stdin.flush()
        while not store._client.list_multipart_uploads(**unfinished).get("Uploads"):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert store.clear_unfinished() == 0
    assert store.clear_unfinished(abandoned_s=0) == 1
    assert not store._client.list_multipart_uploads(**unfinished).get("Uploads")
    assert store.list_keys() == []


def test_scratch_folders_of_killed_processes_are_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """
with scratch_folder() as folder:
    (folder / "shard.tar").write_bytes(b"x")
    print(folder, flush=True)
    sys.stdin.read()
"""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with child(body, env=environment) as killed, child(body, env=environment) as living:
        folders = []
        for process in (killed, living):
            assert process.stdout
            folders.append(Path(process.stdout.readline().decode().strip()))
        killed.kill()
        killed.wait()
        with scratch_folder() as mine:
            assert sorted(tmp_path.iterdir()) == sorted([folders[1], mine])
        assert (folders[1] / "shard.tar").exists()
        living.kill()
    with scratch_folder() as mine:
        assert list(tmp_path.iterdir()) == [mine]
    assert list(tmp_path.iterdir()) == []


def test_many_scratch_folders_do_not_clear_one_another_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def use(number: int) -> None:
        with scratch_folder() as mine:
            (mine / "shard.tar").write_bytes(b"x")
            assert (mine / "shard.tar").read_bytes() == b"x"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(400)))
    assert list(tmp_path.iterdir()) == []


def test_a_scratch_folder_on_a_full_disk_says_how_to_use_another() -> None:
    full = r"No space left on device: .* set TMPDIR"
    with pytest.raises(StorageError, match=full), scratch_folder():
        Path("/dev/full").write_bytes(b"x")


def test_a_file_name_with_a_newline_stays_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(MissingKeyError) as caught:
        open_store(str(tmp_path)).get("two\nlines\x1b[2J")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(r"two\nlines\x1b[2J: No such file or directory")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


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
def test_a_file_is_found_in_its_folder_also_at_the_very_top(
    url: str, folder: str, name: str
) -> None:
    where, key = folder_and_name(url)
    assert (open_store(where).url, key) == (open_store(folder).url, name)


def test_a_plain_path_and_a_file_url_are_the_same_store(tmp_path: Path) -> None:
    open_store(str(tmp_path / "a b")).put("key", b"1")
    assert open_store(f"file://{tmp_path}/a%20b").get("key") == b"1"


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_another_scheme_is_one_entry_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCHEMES, "toy", lambda url: open_store(str(tmp_path / url[6:])))
    open_store("toy://folder").put("key", b"value")
    assert (tmp_path / "folder" / "key").read_bytes() == b"value"


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


def test_the_bucket_of_a_url_is_known_for_s3_alone(tmp_path: Path) -> None:
    assert s3_bucket("s3://bucket/prefix") == "bucket"
    assert s3_bucket(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "ValueError: two lines"),
        (OSError("http://user:planted@host/ \x1b[2J"), r"OSError: http://host/ \x1b[2J"),
        (KeyError(), "KeyError"),
        (ValueError("x" * 1000), "ValueError: " + "x" * 288),
    ],
)
def test_an_error_is_described_in_one_short_line_without_passwords(
    error: Exception, line: str
) -> None:
    assert describe_error(error) == line


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAPLANTED:planted/secret@bucket/x",
        "s3://AKIAPLANTED@bucket/x",
        "s3://bucket/x?secret_key=planted",
    ],
)
def test_an_s3_url_with_credentials_is_refused_without_repeating_them(url: str) -> None:
    for use in (open_store, pyarrow_filesystem):
        with pytest.raises(StorageError) as caught:
            use(url)
        assert "planted" not in str(caught.value).lower()
        assert "environment" in str(caught.value)


def test_an_endpoint_with_a_password_is_refused_without_repeating_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:planted@127.0.0.1:9")
    with pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY") as caught:
        endpoint()
    assert "planted" not in str(caught.value)


def test_the_endpoint_of_s3_goes_before_the_general_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://general:1/")
    assert endpoint() == "http://general:1"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://special:2")
    assert endpoint() == "http://special:2"


def test_pyarrow_reaches_the_same_objects(store: Store) -> None:
    store.put("folder/part", b"12345")
    filesystem, path = pyarrow_filesystem(store.url)
    found = filesystem.get_file_info(FileSelector(f"{path}/folder"))
    assert [(info.base_name, info.size) for info in found] == [("part", 5)]


@pytest.mark.usefixtures("one_attempt")
@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("AWS_SECRET_ACCESS_KEY", "planted-wrong", "does not belong to AWS_ACCESS_KEY_ID"),
        ("AWS_ACCESS_KEY_ID", "planted-wrong", "correct AWS_ACCESS_KEY_ID"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "cannot reach http://127.0.0.1:9"),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy_and_without_secrets(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str, remedy: str
) -> None:
    monkeypatch.setenv(name, value)
    uses: list[Callable[[Store], object]] = [
        lambda store: store.put("key", b""),
        lambda store: store.list_keys(),
    ]
    for use in uses:
        with pytest.raises(StorageError) as caught:
            use(open_store(s3_url))
        message = str(caught.value)
        assert remedy in message
        assert message.startswith(s3_url)
        assert "\n" not in message
        assert "planted" not in message
        assert os.environ["AWS_SECRET_ACCESS_KEY"] not in message


def test_missing_credentials_are_named(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    with pytest.raises(StorageError, match="no credentials: set AWS_ACCESS_KEY_ID"):
        open_store(s3_url).list_keys()


@pytest.mark.usefixtures("s3_server")
def test_a_bucket_that_is_not_there_is_named() -> None:
    with pytest.raises(StorageError, match=r"s3://never-made.*bucket was not found"):
        open_store("s3://never-made/x").put("key", b"")


def test_a_server_that_rejects_checksums_brings_up_the_setting() -> None:
    answer: Any = {"Error": {"Code": "InvalidRequest", "Message": "unknown x-amz-checksum-crc32"}}
    with (
        pytest.raises(StorageError, match="AWS_REQUEST_CHECKSUM_CALCULATION=when_required"),
        storage_errors("s3://bucket/key"),
    ):
        raise ClientError(answer, "PutObject")


def test_reading_goes_on_where_the_connection_broke(
    s3_url: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(5 * MIB)
    store = open_store(s3_url)
    store.put("key", data)
    opened = _count_and_break_bodies(monkeypatch, store, after_bytes=MIB)
    with store.open("key") as source:
        assert source.read() == data
    assert len(opened) > 2


def test_an_object_replaced_while_being_read_is_an_error(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_url)
    store.put("key", os.urandom(3 * MIB))
    _count_and_break_bodies(monkeypatch, store, after_bytes=MIB)
    with store.open("key") as source:
        source.read(10)
        open_store(s3_url).put("key", os.urandom(3 * MIB))
        with pytest.raises(StorageError, match="was replaced while"):
            source.read()


def test_a_connection_that_only_breaks_is_an_error_and_never_a_short_read(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_url)
    store.put("key", os.urandom(MIB))
    _count_and_break_bodies(monkeypatch, store, after_bytes=0)
    with store.open("key") as source, pytest.raises(StorageError, match=r"/key.*broke"):
        source.read()


def _count_and_break_bodies(
    monkeypatch: pytest.MonkeyPatch, store: Store, *, after_bytes: int
) -> list[int]:
    """Let every connection of ``store`` break after so many bytes; returns a list that grows."""
    assert isinstance(store, S3Store)
    get_object, opened = store._client.get_object, []

    class Breaks:
        def __init__(self, body: Any) -> None:
            self._body, self._left = body, after_bytes

        def read(self, size: int) -> bytes:
            if self._left <= 0:
                raise ConnectionResetError("broken by the test")
            data: bytes = self._body.read(min(size, self._left))
            self._left -= len(data)
            return data

        def close(self) -> None:
            self._body.close()

    def breaking(**arguments: Any) -> Any:
        answer: Any = get_object(**arguments)
        opened.append(1)
        return {**answer, "Body": Breaks(answer["Body"])}

    monkeypatch.setattr(store._client, "get_object", breaking)
    return opened
