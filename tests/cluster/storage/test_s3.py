"""S3 prefixes as stores, on a real server."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from cluster.services import S3Server
from cluster.storage import (
    MIB,
    CorruptedTransferError,
    StorageError,
    StorageRefusedError,
    Store,
    open_store,
    pyarrow_filesystem,
)
from cluster.storage.s3 import S3Store, s3_bucket, storage_errors
from cluster.storage.s3_settings import endpoint
from tests.cluster.storage.writers import WRITES, child


@pytest.fixture
def one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


def test_more_keys_than_one_page_of_s3_are_all_listed(s3_url: str) -> None:
    store = open_store(s3_url)
    keys = [f"k{number:04d}" for number in range(1005)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.put(key, b""), keys))
    assert store.list_keys() == keys


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


def test_only_s3_urls_have_a_bucket(tmp_path: Path) -> None:
    assert s3_bucket("s3://bucket/prefix") == "bucket"
    assert s3_bucket(str(tmp_path)) is None


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


def test_the_endpoint_of_s3_overrides_the_general_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://general:1/")
    assert endpoint() == "http://general:1"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://special:2")
    assert endpoint() == "http://special:2"


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
def test_a_missing_bucket_is_named() -> None:
    with pytest.raises(StorageRefusedError, match=r"s3://never-made.*bucket was not found"):
        open_store("s3://never-made/x").put("key", b"")


def test_the_error_of_a_server_that_rejects_checksums_names_the_setting() -> None:
    answer: Any = {"Error": {"Code": "InvalidRequest", "Message": "unknown x-amz-checksum-crc32"}}
    with (
        pytest.raises(StorageError, match="AWS_REQUEST_CHECKSUM_CALCULATION=when_required"),
        storage_errors("s3://bucket/key"),
    ):
        raise ClientError(answer, "PutObject")


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        ("AccessDenied", "", StorageRefusedError),
        ("SignatureDoesNotMatch", "", StorageRefusedError),
        ("SlowDown", "", StorageError),
        ("ExpiredToken", "", StorageError),  # credentials are renewed
        ("BadDigest", "", CorruptedTransferError),
        ("InvalidRequest", "The checksum did not match", CorruptedTransferError),
    ],
)
def test_errors_that_may_heal_differ_from_those_that_cannot(
    code: str, text: str, kind: type[StorageError]
) -> None:
    answer: Any = {"Error": {"Code": code, "Message": text}}
    with pytest.raises(StorageError) as caught, storage_errors("s3://bucket/key"):
        raise ClientError(answer, "PutObject")
    assert type(caught.value) is kind
    assert "when_required" not in str(caught.value)


@pytest.mark.parametrize(("minutes", "cause"), [(20, "the clock"), (1, "denied access")])
def test_a_bare_refusal_names_the_clock_where_the_server_shows_another_time(
    minutes: int, cause: str
) -> None:
    date = formatdate(time.time() - 60 * minutes, usegmt=True)
    answer: Any = {"Error": {"Code": "403"}, "ResponseMetadata": {"HTTPHeaders": {"date": date}}}
    with pytest.raises(StorageError, match=cause), storage_errors("s3://bucket/key"):
        raise ClientError(answer, "HeadObject")


def test_reading_resumes_where_the_connection_broke(
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


def test_a_connection_that_always_breaks_is_an_error_and_never_a_short_read(
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
