"""What a diagnosis asks of an S3 server; no object or upload is left behind."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import io
import os
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
from botocore import exceptions as boto

from cluster.storage.base import MIB, StorageError, join
from cluster.storage.s3 import DOWNLOAD, UPLOAD, S3Store, s3_client, storage_errors
from cluster.storage.s3_settings import S3Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from pyarrow.fs import FileSystem

CONNECT_S, READ_S = 5.0, 10.0
LEAST_PART = 5 * MIB  # S3 refuses smaller parts, except for the last one
PYARROW_PART = 10 * MIB
RACERS = 8


def unreachable() -> str | None:
    """Why the S3 server answers nothing at all, and what to do; None where it does.

    Raises StorageError for settings that no client could use.
    """
    settings = S3Settings.resolve()
    address = settings.endpoint or f"https://s3.{settings.region or 'us-east-1'}.amazonaws.com"
    parts = urlsplit(address)
    host = parts.hostname or ""
    try:
        if parts.scheme == "https":
            trusted = ssl.create_default_context(cafile=settings.ca_bundle)
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, parts.port, timeout=CONNECT_S, context=trusted
            )
        else:
            connection = http.client.HTTPConnection(host, parts.port, timeout=CONNECT_S)
        with contextlib.closing(connection):
            connection.connect()
            connection.sock.settimeout(READ_S)
            connection.request("GET", "/")
            connection.getresponse().read(1)
    except ssl.SSLCertVerificationError as error:
        return (
            f"the certificate of {address} is not trusted ({error.verify_message}): "
            "set AWS_CA_BUNDLE to its certificate"
        )
    except TimeoutError:
        return (
            f"{address} does not answer within {READ_S:.0f} s: restart the server, "
            "correct AWS_ENDPOINT_URL, or look for a firewall that drops packets"
        )
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        return f"cannot reach {address} ({reason}): start the server, or correct AWS_ENDPOINT_URL"
    return None


def credentials_source() -> str | None:
    """Where boto3 finds credentials, in its own words; None where it finds none.

    Raises StorageError for half a pair.
    """
    with storage_errors("credentials"):
        found = boto3.session.Session().get_credentials()
    return found.method if found else None


class Boto3Probe(S3Store):
    """An S3 prefix over connections that give up soon, and what only a diagnosis asks of it.

    Every method may raise StorageError.
    """

    def __init__(self, bucket: str, prefix: str, connections: int = 0) -> None:
        super().__init__(bucket, prefix, connections)
        self._own: S3Client | None = None

    @property
    def _client(self) -> S3Client:
        if self._own is None:
            self._own = s3_client(attempts=2, connect_timeout_s=CONNECT_S, read_timeout_s=READ_S)
        return self._own

    def put_in_parts(self, key: str, data: bytes) -> None:
        """One multipart upload of two parts; ``data`` is longer than ``LEAST_PART``."""
        named: Any = {"Bucket": self._bucket, "Key": self._full(key)}
        with self._storage_errors(key):
            upload: Any = {
                **named,
                "UploadId": self._client.create_multipart_upload(**named)["UploadId"],
            }
            try:
                parts: list[Any] = []
                for number, part in enumerate((data[:LEAST_PART], data[LEAST_PART:]), 1):
                    answer = self._client.upload_part(**upload, PartNumber=number, Body=part)
                    parts.append({"PartNumber": number, "ETag": answer["ETag"]})
                self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
            except BaseException:
                with contextlib.suppress(boto.ClientError, boto.BotoCoreError):
                    self._client.abort_multipart_upload(**upload)
                raise

    def unfinished_uploads(self) -> int:
        """How many multipart uploads under this prefix were never finished, and are billed."""
        with self._storage_errors(""):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._prefix
            )
            return sum(len(page.get("Uploads", [])) for page in pages)

    def winners(self, key: str) -> int:
        """Of ``RACERS`` writers at once that want ``key`` only if it is free, how many succeed.

        Stores that ignore the condition answer success to all.
        """
        start = threading.Barrier(RACERS)

        def wins(number: int) -> bool:
            start.wait()
            try:
                self._client.put_object(
                    Bucket=self._bucket, Key=self._full(key), Body=b"%d" % number, IfNoneMatch="*"
                )
            except boto.ClientError as error:
                code = error.response.get("Error", {}).get("Code", "")
                if code in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
                    return False
                raise
            return True

        with self._storage_errors(key), ThreadPoolExecutor(RACERS) as pool:
            return sum(pool.map(wins, range(RACERS)))

    def clock_ahead_s(self) -> float | None:
        """Seconds by which this machine's clock is ahead of the server's, which has whole ones."""
        before = time.time()
        with self._storage_errors(""):
            answer = self._client.list_objects_v2(
                Bucket=self._bucket, Prefix=f"{self._prefix}/", MaxKeys=1
            )
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        if not date:
            return None
        return (before + time.time()) / 2 - email.utils.parsedate_to_datetime(date).timestamp()

    def megabytes_per_s(self, key: str, size: int) -> tuple[float, float]:
        """Upload and download of ``size`` random bytes as checkpoints are transferred."""
        data = os.urandom(size)
        with self._storage_errors(key):
            started = time.perf_counter()
            self._client.upload_fileobj(
                io.BytesIO(data), self._bucket, self._full(key), Config=UPLOAD
            )
            uploaded = time.perf_counter()
            self._client.download_fileobj(
                self._bucket, self._full(key), io.BytesIO(), Config=DOWNLOAD
            )
            downloaded = time.perf_counter()
        return size / 1e6 / (uploaded - started), size / 1e6 / (downloaded - uploaded)

    def remove_all(self) -> None:
        """Delete every object under this prefix, also folders' markers, and end its uploads."""
        below: Any = {"Bucket": self._bucket, "Prefix": f"{self._prefix}/"}
        with self._storage_errors(""):
            for page in self._client.get_paginator("list_objects_v2").paginate(**below):
                for found in page.get("Contents", []):
                    self._client.delete_object(Bucket=self._bucket, Key=found["Key"])
        self.clear_unfinished(abandoned_s=0)


class PyarrowProbe:
    """The same prefix by pyarrow, as Ray Train and Ray Data use it. May raise OSError."""

    def __init__(self, url: str) -> None:
        from pyarrow import fs

        path = url.removeprefix("s3://").rstrip("/")
        self._url, self._folder = url, path
        options = S3Settings.resolve(attempts=2).pyarrow_options(
            connect_timeout_s=CONNECT_S, read_timeout_s=READ_S
        )
        self._filesystem: FileSystem = fs.S3FileSystem(**options)

    def put(self, key: str, data: bytes) -> None:
        with self._filesystem.open_output_stream(join(self._folder, key)) as file:
            file.write(data)

    def put_in_parts(self, key: str, data: bytes) -> None:
        """pyarrow uploads everything in parts; two of them from ``PYARROW_PART`` bytes."""
        self.put(key, data)

    def get(self, key: str) -> bytes:
        with self._filesystem.open_input_stream(join(self._folder, key)) as file:
            return bytes(file.read())

    def read_range(self, key: str, start: int, size: int) -> bytes:
        with self._filesystem.open_input_file(join(self._folder, key)) as file:
            return bytes(file.read_at(size, start))

    def list_keys(self, prefix: str = "") -> list[str]:
        from pyarrow import fs

        found = self._filesystem.get_file_info(fs.FileSelector(self._folder, recursive=True))
        return sorted(info.path.removeprefix(f"{self._folder}/") for info in found if info.is_file)

    def delete(self, key: str) -> None:
        self._filesystem.delete_file(join(self._folder, key))


@contextlib.contextmanager
def boto3_probe(url: str) -> Iterator[Boto3Probe]:
    """The prefix at ``url``, which is empty again after the block."""
    bucket, _, prefix = url.removeprefix("s3://").rstrip("/").partition("/")
    probe = Boto3Probe(bucket, prefix)
    try:
        yield probe
    finally:
        with contextlib.suppress(StorageError):
            probe.remove_all()
