"""Bytes under keys, in a directory or under an S3 prefix, behind one small interface."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import logging
import os
import platform
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Protocol, cast
from urllib.parse import unquote, urlsplit

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as boto
from botocore.config import Config
from botocore.exceptions import FlexibleChecksumError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from pyarrow import NativeFile
    from pyarrow.fs import FileSystem

log = logging.getLogger(__name__)

MIB = 2**20
# Parts of 16 MiB keep 8 requests busy on a checkpoint of 100 MB; S3 itself asks for at least 5 MiB.
TRANSFER = TransferConfig(
    multipart_threshold=32 * MIB, multipart_chunksize=16 * MIB, max_concurrency=8
)
READ_ATTEMPTS = 6
REQUEST_ATTEMPTS = 5  # of each request: a busy S3 server says 503 SlowDown, and means it
ABANDONED_S = 7 * 24 * 3600  # without a byte for so long, a writer on another machine is gone
S3_FAULTS = (boto.ClientError, boto.BotoCoreError, Boto3Error)


class StorageError(OSError):
    """Storage could not be used as asked; the message is one line with the URL and a remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))  # file names may have newlines


class MissingKeyError(StorageError, FileNotFoundError):
    """There is nothing under this key."""


def one_line(text: str) -> str:
    """``text`` with newlines, and whatever else cannot be printed, as Python would write them."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


class Store(Protocol):
    """Values under keys like ``step-00000010/manifest.json``, below one URL.

    Keys are relative, with forward slashes, and never contain ``..``. Every method may raise
    StorageError. Stores can be pickled; they hold no credentials.
    """

    @property
    def url(self) -> str: ...

    def get(self, key: str) -> bytes:
        """The whole value. Raises MissingKeyError."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write atomically: readers see the old value or the new one, whole."""
        ...

    def upload(self, path: Path, key: str) -> None:
        """Copy a local file to ``key``, atomically; big ones in parallel parts."""
        ...

    def download(self, key: str, path: Path) -> None:
        """Copy ``key`` to a local file, which appears once complete. Raises MissingKeyError."""
        ...

    def open(self, key: str) -> BinaryIO:
        """Read from front to back; never ends early in silence. Raises MissingKeyError."""
        ...

    def list_keys(self, prefix: str = "") -> list[str]:
        """Every key that starts with the string ``prefix``, sorted."""
        ...

    def exists(self, key: str) -> bool: ...

    def size(self, key: str) -> int:
        """Bytes under ``key``. Raises MissingKeyError."""
        ...

    def local_path(self, key: str) -> Path | None:
        """The file of ``key`` on a disk of this machine; None where values are elsewhere."""
        ...

    def delete(self, key: str) -> None:
        """Remove ``key``; one that is missing is fine."""
        ...

    def clear_unfinished(self, *, abandoned_s: float = ABANDONED_S) -> int:
        """Remove what killed writers left half written; returns how much was removed.

        A writer that lives is not disturbed, whichever process or machine it is on; so what may
        belong to one stays until it is ``abandoned_s`` old.
        """
        ...


def open_store(url: str) -> Store:
    """The store at a plain path, ``file://`` or ``s3://bucket/prefix``. Touches nothing yet.

    Credentials in the URL are refused: they belong into the environment.
    """
    if url.startswith("s3://"):
        bucket, _, prefix = _s3_path(url).partition("/")
        return S3Store(bucket, prefix)
    return FileStore(_local_path(url))


def join(url: str, *parts: str) -> str:
    """``url`` with further path components: ``join("s3://b/runs", "x")`` is ``s3://b/runs/x``."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def folder_and_name(url: str) -> tuple[str, str]:
    """The URL of the store that a file is in, and the file's key there."""
    name = url.rpartition("/")[2]
    return url.removesuffix(name) or ".", name


def endpoint(environment: Mapping[str, str] = os.environ) -> str | None:
    """The URL of the S3 server that every client of ours talks to; None stands for AWS itself."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if url := environment.get(name, "").rstrip("/"):
            parts = urlsplit(url)
            if "@" in parts.netloc:
                raise StorageError(
                    f"{name} carries a user name or password: put them into AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY"
                )
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise StorageError(f"{name}={url} is no http:// or https:// address")
            return url
    return None


def s3_client(
    environment: Mapping[str, str] = os.environ, *, attempts: int = REQUEST_ATTEMPTS
) -> S3Client:
    """A boto3 client with our endpoint, retries and time limits.

    ``environment`` gives the endpoint, the region and the keys; where it has no keys, boto3 looks
    in its usual places (profile, web identity, instance). AWS_MAX_ATTEMPTS and AWS_RETRY_MODE
    there take the place of ``attempts`` and of the adaptive retries.
    """
    retries = {
        "total_max_attempts": _attempts(environment, attempts),
        "mode": environment.get("AWS_RETRY_MODE", "adaptive"),
    }
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint(environment),
        # boto3 itself reads AWS_DEFAULT_REGION only; the other AWS clients read AWS_REGION.
        region_name=_region(environment),
        aws_access_key_id=environment.get("AWS_ACCESS_KEY_ID"),
        aws_secret_access_key=environment.get("AWS_SECRET_ACCESS_KEY"),
        aws_session_token=environment.get("AWS_SESSION_TOKEN"),
        config=Config(
            retries=cast(Any, retries),
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=32,
            tcp_keepalive=True,
        ),
    )


def pyarrow_filesystem(url: str) -> tuple[FileSystem, str]:
    """pyarrow's file system for ``url``, and the path of ``url`` inside it.

    pyarrow ignores AWS_ENDPOINT_URL (apache/arrow#49643), so the endpoint is handed over; and the
    number of attempts, where it has three, which are over in two seconds.
    """
    from pyarrow import fs  # half a second, and few callers

    if not url.startswith("s3://"):
        return fs.LocalFileSystem(), str(_local_path(url))
    options: dict[str, Any] = {
        "connect_timeout": 10,
        "request_timeout": 60,
        "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=_attempts()),
    }
    if address := endpoint():
        parts = urlsplit(address)
        options |= {"endpoint_override": parts.netloc + parts.path, "scheme": parts.scheme}
        options["region"] = _region() or "us-east-1"
    elif region := _region():
        options["region"] = region
    if certificates := os.environ.get("AWS_CA_BUNDLE"):
        options["tls_ca_file_path"] = certificates
    return fs.S3FileSystem(**options), _s3_path(url)


def open_version(url: str, version: str | None = None) -> tuple[NativeFile, str]:
    """``url`` for reading anywhere in it, from many threads; and what tells this file from others.

    ``version`` is what an earlier call returned: StorageError if the file was replaced since then,
    for places in it that were noted down would hold something else. Raises OSError as pyarrow does.
    """
    filesystem, path = pyarrow_filesystem(url)
    file = filesystem.open_input_file(path)
    if etag := file.metadata().get("ETag"):  # on S3
        found = etag.decode()
    else:
        found = f"{file.size()} bytes of {filesystem.get_file_info(path).mtime_ns}"
    if version not in (None, found):
        file.close()
        raise StorageError(f"{url} was replaced since it was listed: run the same command again")
    return file, found


class FileStore:
    """A directory; it is made by the first write."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def url(self) -> str:
        return str(self._root)

    def get(self, key: str) -> bytes:
        with self._explained(key):
            return self._path(key).read_bytes()

    def put(self, key: str, data: bytes) -> None:
        with self._explained(key), _replacing(self._path(key)) as file:
            file.write(data)

    def upload(self, path: Path, key: str) -> None:
        with self._explained(key), path.open("rb") as source, _replacing(self._path(key)) as file:
            shutil.copyfileobj(source, file, MIB)

    def download(self, key: str, path: Path) -> None:
        with self._explained(key), self._path(key).open("rb") as source, _replacing(path) as file:
            shutil.copyfileobj(source, file, MIB)

    def open(self, key: str) -> BinaryIO:
        with self._explained(key):
            return io.BufferedReader(_FileReader(self._path(key)), MIB)

    def list_keys(self, prefix: str = "") -> list[str]:
        start = self._root / prefix.rpartition("/")[0]
        found = []
        with self._explained(prefix):
            for folder, _, names in os.walk(start, onerror=_raise_unless_missing):
                for name in names:
                    key = Path(folder, name).relative_to(self._root).as_posix()
                    if key.startswith(prefix) and not name.startswith(TEMPORARY):
                        found.append(key)
        return sorted(found)

    def exists(self, key: str) -> bool:
        with self._explained(key):
            return self._path(key).is_file()

    def size(self, key: str) -> int:
        with self._explained(key):
            return self._path(key).stat().st_size

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._explained(key):
            path.unlink(missing_ok=True)
        self._remove_empty_folders(path)

    def clear_unfinished(self, *, abandoned_s: float = ABANDONED_S) -> int:
        """See ``Store``; here the writer's lock tells whether it lives, see ``_replacing``."""
        cleared = 0
        for folder, _, names in os.walk(self._root):
            for name in names:
                path = Path(folder, name)
                if name.startswith(TEMPORARY) and _remove_abandoned(path, abandoned_s):
                    self._remove_empty_folders(path)
                    cleared += 1
        if cleared:
            log.info("unfinished files removed count=%d url=%s", cleared, self.url)
        return cleared

    def _remove_empty_folders(self, above: Path) -> None:
        """S3 has no empty folders, so we leave none either."""
        for folder in above.parents:
            if folder == self._root:
                break
            try:
                folder.rmdir()
            except OSError:
                break

    def _path(self, key: str) -> Path:
        return self._root / _checked(key)

    @contextlib.contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            kind = MissingKeyError if isinstance(error, FileNotFoundError) else StorageError
            raise kind(f"{join(self.url, key)}: {error.strerror or error}") from error


class _FileReader(io.FileIO):
    """A file to read; an error of the disk names it."""

    def readinto(self, buffer: Any) -> int:
        with self._explained():
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with self._explained():
            return super().readall()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self.name}: {error.strerror or error}") from error


_making_client = threading.Lock()


@functools.lru_cache(maxsize=4)
def _shared_client(process: int, settings: tuple[tuple[str, str], ...]) -> S3Client:
    """One client for all stores of a process; making one takes a tenth of a second."""
    return s3_client()


class S3Store:
    """The keys below ``s3://bucket/prefix``."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket, self._prefix = bucket, prefix

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def get(self, key: str) -> bytes:
        with self.open(key) as source:
            return source.read()

    def put(self, key: str, data: bytes) -> None:
        self._upload(io.BytesIO(data), key)

    def upload(self, path: Path, key: str) -> None:
        with path.open("rb") as source:
            self._upload(source, key)

    def download(self, key: str, path: Path) -> None:
        expected = self.size(key)
        with self._explained(key), _replacing(path) as file:
            self._client.download_fileobj(self._bucket, self._full(key), file, Config=TRANSFER)
            if (found := file.seek(0, os.SEEK_END)) != expected:
                raise StorageError(f"{join(self.url, key)} ended after {found} of {expected} bytes")

    def open(self, key: str) -> BinaryIO:
        with self._explained(key):
            source = _S3Reader(self._client, self._bucket, self._full(key))
        return io.BufferedReader(source, MIB)

    def list_keys(self, prefix: str = "") -> list[str]:
        below = f"{self._prefix}/" if self._prefix else ""
        found = []
        with self._explained(prefix):
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
        with self._explained(key):
            head = self._client.head_object(Bucket=self._bucket, Key=self._full(key))
        return head["ContentLength"]

    def local_path(self, key: str) -> Path | None:
        return None

    def delete(self, key: str) -> None:
        with self._explained(key):
            self._client.delete_object(Bucket=self._bucket, Key=self._full(key))

    def clear_unfinished(self, *, abandoned_s: float = ABANDONED_S) -> int:
        """See ``Store``; here it is uploads in parts, which S3 keeps (and bills) but never lists.

        S3 does not tell whether a writer lives, so age decides, as in the lifecycle rule that AWS
        recommends for buckets (AbortIncompleteMultipartUpload, 7 days). Where these credentials
        may not do that, it is left to such a rule: nothing else depends on it.
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
        except S3_FAULTS as error:
            reason = _without_secrets(str(error))
            log.info("unfinished uploads left as they are url=%s: %s", self.url, reason)
        if cleared:
            log.info("unfinished uploads removed count=%d url=%s", cleared, self.url)
        return cleared

    @property
    def _client(self) -> S3Client:
        # Connections do not survive a fork, so a child makes its own client.
        settings = sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))
        with _making_client:
            return _shared_client(os.getpid(), tuple(settings))

    def _full(self, key: str) -> str:
        return f"{self._prefix}/{_checked(key)}".lstrip("/")

    def _upload(self, source: IO[bytes], key: str) -> None:
        with self._explained(key):
            self._client.upload_fileobj(source, self._bucket, self._full(key), Config=TRANSFER)

    @contextlib.contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        with explained(join(self.url, key)):
            yield


class _S3Reader(io.RawIOBase):
    """One object from front to back; a connection that breaks is taken up again where it broke."""

    def __init__(self, client: S3Client, bucket: str, key: str) -> None:
        self._client, self._bucket, self._key = client, bucket, key
        self._url = f"s3://{bucket}/{key}"
        answer = client.get_object(Bucket=bucket, Key=key)
        self._body, self._etag = answer["Body"], answer["ETag"]
        self._size, self._position = answer["ContentLength"], 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position, MIB)
        if wanted == 0:
            return 0
        with explained(self._url):
            for _ in range(READ_ATTEMPTS):
                try:
                    data = self._body.read(wanted)
                except (boto.HTTPClientError, boto.IncompleteReadError, OSError) as error:
                    data, reason = b"", f": {error}"
                else:
                    reason = ""
                if data:
                    buffer[: len(data)] = data
                    self._position += len(data)
                    return len(data)
                log.info("reading again url=%s position=%d%s", self._url, self._position, reason)
                self._reopen()
        raise StorageError(
            f"{self._url}: the connection broke {READ_ATTEMPTS} times "
            f"at byte {self._position} of {self._size}{reason}"
        )

    def readall(self) -> bytes:
        whole = bytearray(self._size - self._position)
        rest = memoryview(whole)
        while rest:
            rest = rest[self.readinto(rest) :]
        return bytes(whole)

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


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what boto3 raises into one-line StorageErrors about ``url`` that say what to do."""
    try:
        yield
    except boto.ClientError as error:
        raise _from_answer(url, error) from error
    except (boto.BotoCoreError, Boto3Error) as error:
        raise StorageError(f"{url}: {_remedy_without_answer(error)}") from error


def _from_answer(url: str, error: boto.ClientError) -> StorageError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    text = str(error.response.get("Error", {}).get("Message", ""))
    server = f"the S3 server {endpoint() or 'of AWS'}"
    if code in ("NoSuchKey", "404", "NotFound"):
        return MissingKeyError(f"{url}: there is no such object")
    if "checksum" in text.lower() or "aws-chunked" in text.lower():
        return StorageError(f"{url}: {_CHECKSUMS.format(server=server)}")
    for codes, remedy in _REMEDIES.items():
        if code in codes:
            return StorageError(f"{url}: {remedy.format(server=server)}")
    operation = error.operation_name
    return StorageError(_without_secrets(f"{url}: {operation} failed at {server}: {code} {text}"))


_CHECKSUMS = (
    "{server} does not understand the checksums of newer AWS clients: "
    "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required and "
    "AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"
)
_REMEDIES = {
    ("NoSuchBucket",): "no such bucket at {server}: make it first, or correct the URL",
    ("SignatureDoesNotMatch",): (
        "{server} refused the signature (SignatureDoesNotMatch): "
        "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID"
    ),
    ("InvalidAccessKeyId",): (
        "{server} does not know the access key (InvalidAccessKeyId): correct AWS_ACCESS_KEY_ID, "
        "or AWS_ENDPOINT_URL if this is another server"
    ),
    ("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"): (
        "the credentials have expired: renew AWS_SESSION_TOKEN and its keys"
    ),
    ("AccessDenied", "Forbidden", "AllAccessDisabled"): (
        "{server} denied access: these credentials need "
        "s3:GetObject, PutObject, DeleteObject and ListBucket there"
    ),
    ("403",): (  # all that a server says to HEAD
        "{server} denied access: AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID, "
        "or these credentials lack s3:GetObject and ListBucket there"
    ),
    ("RequestTimeTooSkewed",): "the clock of this machine differs from the server's: set it right",
    ("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraint"): (
        "the bucket is in another region: set AWS_REGION to it"
    ),
    ("PreconditionFailed", "412"): "the object was replaced while it was being read: read it again",
    ("SlowDown", "503", "ServiceUnavailable", "InternalError", "500"): (
        "{server} is overloaded or unwell, also after retries: try again later"
    ),
    ("QuotaExceeded", "InsufficientStorage", "507", "XMinioStorageFull"): "{server} is full",
    ("BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch"): _CHECKSUMS,
}


def _remedy_without_answer(error: Exception) -> str:
    server = endpoint() or "AWS"
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return (
            "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "(or AWS_PROFILE, or give the instance a role)"
        )
    if isinstance(error, boto.EndpointConnectionError | boto.ConnectTimeoutError):
        return f"cannot reach {server}: is the server up, and AWS_ENDPOINT_URL right?"
    if isinstance(error, boto.SSLError):
        return f"no trusted connection to {server}: set AWS_CA_BUNDLE to its certificate"
    if isinstance(error, FlexibleChecksumError):
        return _CHECKSUMS.format(server=server)
    return _without_secrets(f"{type(error).__name__} at {server}: {error}")


def _without_secrets(text: str) -> str:
    """``text`` on one line, with the values of this process's credentials blanked out."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return " ".join(text.split())


def _region(environment: Mapping[str, str] = os.environ) -> str | None:
    return environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")


def _attempts(environment: Mapping[str, str] = os.environ, attempts: int = REQUEST_ATTEMPTS) -> int:
    return int(environment.get("AWS_MAX_ATTEMPTS", attempts))


def _s3_path(url: str) -> str:
    """``bucket/prefix`` of an S3 URL; one that may hold a secret is refused without showing it."""
    path = url.removeprefix("s3://").rstrip("/")
    bucket, _, prefix = path.partition("/")
    if "@" in bucket or ":" in bucket or "?" in path:
        raise StorageError(
            "an S3 URL is s3://bucket/prefix and carries no keys or options: "
            "put those into the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...)"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}", bucket):
        raise StorageError(
            f"{url}: {bucket!r} is no bucket name (3 to 63 letters, digits, . and -)"
        )
    if prefix:
        _checked(prefix)
    return path


def _local_path(url: str) -> Path:
    """Absolute, because Ray runs workers in other directories."""
    if url.startswith("file://"):
        host, slash, path = url.removeprefix("file://").partition("/")
        if host not in ("", "localhost") or not slash:
            raise StorageError(f"{url} names another machine: write file:///absolute/path")
        return Path("/" + unquote(path))
    if "://" in url:
        raise StorageError(f"{url}: storage is a plain path, file:// or s3://")
    if not url:
        raise StorageError("the storage URL is empty: give a path, file:// or s3://bucket/prefix")
    return Path(url).expanduser().absolute()


def _checked(key: str) -> str:
    if any(part in ("", ".", "..") for part in key.split("/")):
        raise StorageError(f"key {key!r} is not a plain relative path like a/b.json")
    return key


TEMPORARY = ".unfinished-"
SCRATCH = ".deepfill-scratch-"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder on this machine's own disk, gone after the block.

    Those of processes that were killed are cleared away first. An OSError in the block that has
    an error number becomes a StorageError that names the disk and says how to use another.
    """
    disk, prefix = Path(tempfile.gettempdir()), f"{SCRATCH}{_machine()}-"
    try:
        for left in disk.glob(f"{prefix}*"):
            _remove_abandoned(left, ABANDONED_S)
        while True:
            with (
                tempfile.TemporaryDirectory(prefix=prefix, dir=disk) as folder,
                _held(Path(folder)) as mine,
            ):
                if mine:
                    yield Path(folder)
                    return
    except OSError as error:
        if isinstance(error, StorageError) or error.errno is None:
            raise
        raise StorageError(
            f"{disk}: {error.strerror}: make room there, or set TMPDIR to a folder elsewhere"
        ) from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` once it is complete and on the disk.

    Until then it is locked, under a hidden name that tells on which machine. The lock ends with the
    process, also by ``kill -9``, so ``_remove_abandoned`` knows what is left over.
    """
    temporary = path.with_name(f"{TEMPORARY}{_machine()}-{secrets.token_hex(8)}")
    try:
        with _create(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)  # while it is locked
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name is on the disk, too
        finally:
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            raise StorageError(f"{path}: {error.strerror or error}") from error
        raise


def _create(path: Path) -> BinaryIO:
    """A new file that is locked for as long as it is open."""
    gone = 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("xb")
        except FileNotFoundError:
            # A delete nearby may take the folder away again while it is still empty, at times.
            gone += 1
            if gone == 1000:
                raise
            continue
        if _lock(path, file.fileno()):
            return file
        file.close()


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """A new folder, locked; False where it was cleared away before that."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _lock(folder, opened)
    finally:
        os.close(opened)


def _lock(path: Path, opened: int) -> bool:
    """Lock what was just made; False where ``_remove_abandoned`` was faster."""
    with contextlib.suppress(OSError):  # a file system without locks, where nothing is removed
        fcntl.flock(opened, fcntl.LOCK_EX)
    try:
        return os.path.samestat(path.stat(), os.fstat(opened))
    except FileNotFoundError:
        return False


def _remove_abandoned(path: Path, abandoned_s: float) -> bool:
    """Delete a half written file, or a scratch folder, unless its writer may be alive.

    If it was made on this machine since that was started, its lock alone decides. Locks need not
    reach other machines (NFS and Lustre can be mounted so), so what was made there must also have
    been left alone for ``abandoned_s``.
    """
    folder = path.is_dir()
    try:
        opened = os.open(path, (os.O_RDONLY if folder else os.O_RDWR) | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(opened)
        if not os.path.samestat(path.stat(), status):
            return False  # another was faster, and the writer has made a new one of that name
        idle_s = time.time() - status.st_mtime
        if f"-{_machine()}-" not in path.name and idle_s < abandoned_s:
            return False
        if folder:
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError:  # most of all BlockingIOError: it is locked
        return False
    finally:
        os.close(opened)
    return True


@functools.cache
def _machine() -> str:
    """A name for this machine since it was started; its containers, which share locks, share it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return platform.node()


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
