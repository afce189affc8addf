"""S3 prefixes as stores, and every S3 client of this product."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as boto
from s3transfer.exceptions import RetriesExceededError as TransferRetriesError

from cluster.storage.base import (
    ABANDONED_S,
    MIB,
    REQUESTS,
    CorruptedTransferError,
    MissingKeyError,
    StorageError,
    checked_key,
    join,
    scheme_of,
    without_secrets,
)
from cluster.storage.files import replacing
from cluster.storage.remedies import EXPIRED, answer_to_error, failure_to_error
from cluster.storage.s3_settings import REQUEST_ATTEMPTS, S3Settings, endpoint

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from pyarrow.fs import FileSystem

log = logging.getLogger(__name__)

# S3 asks for parts of at least 5 MiB. Those of an upload are hashed before they are sent, so small
# ones keep the line busy; each part of a download is one more request.
UPLOAD = TransferConfig(
    multipart_threshold=32 * MIB, multipart_chunksize=8 * MIB, max_concurrency=REQUESTS
)
DOWNLOAD = TransferConfig(
    multipart_threshold=32 * MIB, multipart_chunksize=16 * MIB, max_concurrency=REQUESTS
)
PIECE = 8 * MIB  # what is read at once, and again where the connection breaks
READ_ATTEMPTS = 6
UPLOAD_ATTEMPTS = 3  # where the server reports bytes that changed on their way
READ_TIMEOUT_S = 60
S3_ERRORS = (boto.ClientError, boto.BotoCoreError, Boto3Error)


def open_s3(url: str) -> S3Store:
    """The store at ``s3://bucket/prefix``."""
    bucket, _, prefix = _s3_path(url).partition("/")
    return S3Store(bucket, prefix)


def s3_bucket(url: str) -> str | None:
    """The bucket of an S3 URL; None for storage of another kind."""
    return _s3_path(url).partition("/")[0] if scheme_of(url) == "s3" else None


@contextlib.contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn what boto3 raises into one-line StorageErrors about ``url`` that say what to do."""
    try:
        yield
    except boto.ClientError as error:
        if error.response.get("Error", {}).get("Code") in (*EXPIRED, "400"):
            _shared_client.cache_clear()  # the next one reads keys that were renewed meanwhile
        raise answer_to_error(url, error, endpoint()) from error
    except TransferRetriesError as error:  # of a download in parts, which boto3 hands on as it is
        last = error.last_exception
        cause = last if isinstance(last, Exception) else error
        raise failure_to_error(url, cause, endpoint()) from error
    except (boto.BotoCoreError, Boto3Error) as error:
        raise failure_to_error(url, error, endpoint()) from error


def s3_client(
    environment: Mapping[str, str] = os.environ,
    *,
    attempts: int = REQUEST_ATTEMPTS,
    connect_timeout_s: float = 10,
    read_timeout_s: float | None = None,
) -> S3Client:
    """A boto3 client with the settings, and the keys, of ``environment``.

    Without keys there, boto3 looks in its usual places (profile, web identity, instance).
    AWS_MAX_ATTEMPTS and AWS_RETRY_MODE override ``attempts`` and the adaptive retries.
    """
    settings = S3Settings.resolve(environment, attempts=attempts)
    return boto3.session.Session().client(
        "s3",
        aws_access_key_id=environment.get("AWS_ACCESS_KEY_ID"),
        aws_secret_access_key=environment.get("AWS_SECRET_ACCESS_KEY"),
        aws_session_token=environment.get("AWS_SESSION_TOKEN"),
        **settings.boto3_options(
            connect_timeout_s=connect_timeout_s, read_timeout_s=read_timeout_s or READ_TIMEOUT_S
        ),
    )


_making_client = threading.Lock()


@functools.lru_cache(maxsize=4)
def _shared_client(
    process: int, settings: tuple[tuple[str, str], ...], connections: int
) -> S3Client:
    """One client for all stores of a process, because creating one takes a tenth of a second."""
    return s3_client()


_connections = itertools.count(1)


class S3Store:
    """The keys below ``s3://bucket/prefix``."""

    def __init__(self, bucket: str, prefix: str, connections: int = 0) -> None:
        self._bucket, self._prefix, self._connections = bucket, prefix, connections

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def get(self, key: str) -> bytes:
        with self.open(key) as source:
            return source.read()

    def put(self, key: str, data: bytes) -> None:
        self._upload(lambda: io.BytesIO(data), key)

    def upload(self, path: Path, key: str) -> None:
        self._upload(lambda: path.open("rb"), key)

    def download(self, key: str, path: Path) -> None:
        expected = self.size(key)
        with self._storage_errors(key), replacing(path) as file:
            self._client.download_fileobj(self._bucket, self._full(key), file, Config=DOWNLOAD)
            if (found := file.seek(0, os.SEEK_END)) != expected:
                raise CorruptedTransferError(
                    f"{join(self.url, key)} ended after {found} of {expected} bytes"
                )

    def open(self, key: str) -> BinaryIO:
        with self._storage_errors(key):
            source = _S3Reader(self._client, self._bucket, self._full(key))
        return io.BufferedReader(source, MIB)

    def read_range(self, key: str, start: int, size: int) -> bytes:
        with self._storage_errors(key):
            source = _S3Reader(self._client, self._bucket, self._full(key), start, size)
            with contextlib.closing(source):
                return source.readall()

    def list_keys(self, prefix: str = "") -> list[str]:
        below = f"{self._prefix}/" if self._prefix else ""
        found = []
        with self._storage_errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=below + prefix
            )
            for page in pages:
                found += [item["Key"].removeprefix(below) for item in page.get("Contents", [])]
        return sorted(key for key in found if not key.endswith("/"))

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except MissingKeyError:
            return False
        return True

    def size(self, key: str) -> int:
        with self._storage_errors(key):
            head = self._client.head_object(Bucket=self._bucket, Key=self._full(key))
        return head["ContentLength"]

    def delete(self, key: str) -> None:
        with self._storage_errors(key):
            self._client.delete_object(Bucket=self._bucket, Key=self._full(key))

    def clear_unfinished(self, *, abandoned_s: float = ABANDONED_S) -> int:
        """See ``Store``; on S3 these are multipart uploads, which it stores and bills unlisted.

        S3 does not know whether a writer lives, so age decides, as in the lifecycle rule that AWS
        recommends for buckets (AbortIncompleteMultipartUpload, 7 days). Credentials without the
        permission leave this to such a rule: nothing else depends on it.
        """
        below = f"{self._prefix}/" if self._prefix else ""
        cleared = 0
        try:
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=below
            )
            for upload in (upload for page in pages for upload in page.get("Uploads", [])):
                if time.time() - upload["Initiated"].timestamp() >= abandoned_s:
                    self._client.abort_multipart_upload(
                        Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )
                    cleared += 1
        except S3_ERRORS as error:
            reason = without_secrets(str(error))
            log.info("unfinished uploads were not removed url=%s: %s", self.url, reason)
        if cleared:
            log.info("unfinished uploads removed count=%d url=%s", cleared, self.url)
        return cleared

    def reconnected(self) -> S3Store:
        return S3Store(self._bucket, self._prefix, next(_connections))

    def local_path(self, key: str = "") -> Path | None:
        return None

    def pyarrow_filesystem(self) -> tuple[FileSystem, str]:
        from pyarrow import fs  # takes half a second, and few callers need it

        options = S3Settings.resolve().pyarrow_options(
            connect_timeout_s=10, read_timeout_s=READ_TIMEOUT_S
        )
        return fs.S3FileSystem(**options), f"{self._bucket}/{self._prefix}".rstrip("/")

    @property
    def _client(self) -> S3Client:
        # Connections do not survive a fork, so a child process creates its own client.
        settings = sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))
        with _making_client:
            return _shared_client(os.getpid(), tuple(settings), self._connections)

    def _full(self, key: str) -> str:
        return f"{self._prefix}/{checked_key(key)}".lstrip("/")

    def _upload(self, opened: Callable[[], IO[bytes]], key: str) -> None:
        """Upload what ``opened`` gives; again, over new connections, where it came corrupted."""
        store = self
        for attempt in range(1, UPLOAD_ATTEMPTS + 1):
            try:
                with self._storage_errors(key), opened() as source:
                    store._client.upload_fileobj(
                        source, self._bucket, self._full(key), Config=UPLOAD
                    )
                return
            except CorruptedTransferError as error:
                if attempt == UPLOAD_ATTEMPTS:
                    raise
                log.warning("upload repeated attempt=%d: %s", attempt, error)
                store = self.reconnected()

    @contextlib.contextmanager
    def _storage_errors(self, key: str) -> Iterator[None]:
        with storage_errors(join(self.url, key)):
            yield


class _S3Reader(io.RawIOBase):
    """One object, or ``size`` bytes of it, from front to back.

    After a broken connection, reading resumes where it broke.
    """

    def __init__(
        self, client: S3Client, bucket: str, key: str, start: int = 0, size: int | None = None
    ) -> None:
        self._client, self._bucket, self._key = client, bucket, key
        self._url = f"s3://{bucket}/{key}"
        part: Any = {} if size is None else {"Range": f"bytes={start}-{start + size - 1}"}
        answer = client.get_object(Bucket=bucket, Key=key, **part)
        self._body, self._etag = answer["Body"], answer["ETag"]
        self._position = start
        self._size = start + answer["ContentLength"]  # where reading ends

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._read(min(len(buffer), self._size - self._position, MIB))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        pieces = []
        while rest := self._size - self._position:
            pieces.append(self._read(min(rest, PIECE)))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)  # one is not copied

    def _read(self, wanted: int) -> bytes:
        """At least one byte, and at most ``wanted``; none where none are wanted."""
        if wanted == 0:
            return b""
        reason = ""
        with storage_errors(self._url):
            for _ in range(READ_ATTEMPTS):
                try:
                    data = self._body.read(wanted)
                except (boto.HTTPClientError, boto.IncompleteReadError, OSError) as error:
                    data, reason = b"", f": {error}"
                else:
                    reason = ""
                if data:
                    self._position += len(data)
                    return data
                log.info("reading resumes url=%s position=%d%s", self._url, self._position, reason)
                try:
                    self._reopen()
                except boto.ClientError as error:
                    if error.response.get("Error", {}).get("Code") != "InvalidRange":
                        raise
                    raise CorruptedTransferError(
                        f"{self._url} ended after {self._position} of the {self._size} bytes that "
                        "its answer announced"
                    ) from error
        raise StorageError(
            f"{self._url}: the connection broke {READ_ATTEMPTS} times "
            f"at byte {self._position} of {self._size}{reason}"
        )

    def close(self) -> None:
        if not self.closed:
            self._body.close()
        super().close()

    def _reopen(self) -> None:
        self._body.close()
        self._body = self._client.get_object(
            Bucket=self._bucket,
            Key=self._key,
            Range=f"bytes={self._position}-{self._size - 1}",
            IfMatch=self._etag,
        )["Body"]


def _s3_path(url: str) -> str:
    """``bucket/prefix`` of an S3 URL; StorageError, without showing it, if it may hold a secret."""
    path = url.removeprefix("s3://").rstrip("/")
    bucket, _, prefix = path.partition("/")
    if "@" in bucket or ":" in bucket or "?" in path:
        raise StorageError(
            "an S3 URL is s3://bucket/prefix and carries no keys or options: "
            "put those into the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...)"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}", bucket):
        raise StorageError(
            f"{url}: a bucket name has 3 to 63 letters, digits, . and -, unlike {bucket!r}"
        )
    if prefix:
        checked_key(prefix)
    return path
