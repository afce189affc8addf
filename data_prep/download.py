"""Official archives of Places2: downloaded over HTTP, resumed, checked by size and MD5."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import http.client
import io
import json
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn
from urllib.parse import urlsplit

from cluster.storage import StorageError, folder_and_name, open_store, replacing
from data_prep.files import walk_files
from data_prep.places2 import ARCHIVES, LISTS, Published

log = logging.getLogger(__name__)

OFFICIAL = "http://data.csail.mit.edu/places/places365/"
LICENSE = (
    "the images of Places2 belong to their owners; use them for non-commercial research and "
    "education only, and do not redistribute them (http://places2.csail.mit.edu/download.html)"
)
# What the command takes, and the file it downloads. The easy format has no published MD5.
FILES = {
    "places2-train-256-standard": "train_256_places365standard.tar",
    "places2-train-256-challenge": "train_256_places365challenge.tar",
    "places2-val-256": "val_256.tar",
    "places2-test-256": "test_256.tar",
    "places2-train-large-standard": "train_large_places365standard.tar",
    "places2-train-large-challenge": "train_large_places365challenge.tar",
    "places2-val-large": "val_large.tar",
    "places2-test-large": "test_large.tar",
    "places2-filelist-standard": "filelist_places365-standard.tar",
    "places2-filelist-challenge": "filelist_places365-challenge.tar",
}

BLOCK = 2**20
PROGRESS_BYTES = 2**20  # a try that adds this many bytes resets the count of failures
TRIES = 8  # failures in a row
TIMEOUT_S = 60.0  # of silence
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # between tries; doubled each time
TEMPORARY = frozenset({408, 425, 429, 500, 502, 503, 504})
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")

ByteProgress = Callable[[int, int], None]
"""Called with the bytes done and all bytes; a fresh start sets the first back."""


class FetchError(OSError):
    """An archive could not be fetched; one line with the file or URL and what to do."""


def fetch(
    archive: str,
    out: Path,
    *,
    accept_license: bool,
    base_url: str = OFFICIAL,
    progress: ByteProgress | None = None,
) -> Path:
    """Download one of ``FILES`` into the folder ``out``; the path of the archive, its MD5 checked.

    An archive that is there already is only checked. An interrupted download, even by kill -9,
    resumes from ``<file>.part`` as long as the server has the same file. A try fails when the
    connection breaks or is silent for a minute. The waits between tries double; after
    ``TRIES`` failures in a row the part is kept and FetchError raised.
    Raises ValueError without ``accept_license``, for an unknown archive and a bad ``base_url``;
    FetchError for faults of the server, the disk or the content; StorageError where an archive
    that is there already cannot be read.
    """
    if archive not in FILES:
        raise ValueError(f"archive {archive} is unknown: give one of {', '.join(FILES)}")
    if not accept_license:
        raise ValueError(f"{archive} has terms, which you accept by --accept-license: {LICENSE}")
    file = FILES[archive]
    url, target = _address(base_url) + file, out / file
    with _disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        finished = target.exists()
    if finished:
        return _checked(target, progress)
    log.info("downloading url=%s to=%s license: %s", url, target, LICENSE)
    part = PartialFile(target)
    with part.locked():
        if not target.exists():  # another process may have finished it meanwhile
            download = Download(url, part, ARCHIVES[file], progress)
            _complete(download)
            part.finish()
            log.info("downloaded path=%s bytes=%d", target, part.size)
            return target
        part.drop()
    return _checked(target, progress)


def _address(base_url: str) -> str:
    parts = urlsplit(base_url)
    if "@" in parts.netloc:
        raise ValueError("the base URL contains a user name or password: give one without")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{base_url} should be an http:// or https:// address")
    return base_url.rstrip("/") + "/"


def check_archives(root: str, *, progress: ByteProgress | None = None) -> Iterator[tuple[str, str]]:
    """Every archive and list with a published name at or below ``root``, with its fault.

    The fault is one line, and empty where size and MD5 are the published ones. ``root`` is on disk
    or S3; ``progress`` counts the bytes of all files. Raises ValueError where there are none,
    StorageError.
    """
    known = ARCHIVES | LISTS
    folder, name = folder_and_name(root)
    if name in known:
        root, names = folder, [name]
    elif name.endswith(".tar"):
        raise ValueError(
            f"{root}: archives of Places2 must have their published names: "
            f"{', '.join(sorted(ARCHIVES))}"
        )
    else:
        names = sorted(path for path in walk_files(root) if path.rpartition("/")[2] in known)
    if not names:
        raise ValueError(f"{root} holds no archive of Places2 under its published name")
    store = open_store(root)
    sizes = {name: store.size(name) for name in names}
    total, before = sum(sizes.values()), 0
    for name, size in sizes.items():
        official = known[name.rpartition("/")[2]]

        def report(done: int, before: int = before) -> None:
            if progress:
                progress(before + done, total)

        if official.bytes not in (None, size):
            yield name, f"has {size:,} bytes; the published one has {official.bytes:,}"
        else:
            with contextlib.closing(store.open(name)) as file:
                md5 = _md5(file, report)
            differs = md5 != official.md5
            yield name, f"has MD5 {md5}; the published one has {official.md5}" if differs else ""
        before += size
        report(0, before)


def _md5(file: BinaryIO, report: Callable[[int], None]) -> str:
    md5, done = hashlib.md5(usedforsecurity=False), 0
    while block := file.read(BLOCK):
        md5.update(block)
        done += len(block)
        report(done)
    return md5.hexdigest()


def _checked(target: Path, progress: ByteProgress | None) -> Path:
    """``target``, if its bytes are the published ones; FetchError otherwise."""
    log.info("checking path=%s", target)
    for _, fault in check_archives(str(target), progress=progress):
        if fault:
            raise FetchError(
                f"{target} is not the published archive, it {fault}: move it away or delete it, "
                "then run the same command to download it"
            )
    return target


def _complete(download: Download) -> None:
    """Request until the file is complete; FetchError after ``TRIES`` failures in a row."""
    failures, furthest = 0, download.position
    while not download.is_right():
        try:
            download.request()
        except FetchError:
            raise
        except http.client.InvalidURL as error:
            raise ValueError(f"{download.url} is not an address: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            if download.position >= furthest + PROGRESS_BYTES:
                failures, furthest = 0, download.position
            failures += 1
            if failures >= TRIES:
                raise FetchError(
                    f"{download.url}: {_reason(error)}; gave up after {TRIES} tries with "
                    f"{download.position:,} bytes kept: run the same command to resume"
                ) from error
            wait_s = max(FIRST_WAIT_S * 2 ** (failures - 1), _requested_wait_s(error))
            wait_s = min(wait_s, LONGEST_WAIT_S)
            log.warning("%s bytes=%d wait_s=%.1f", _reason(error), download.position, wait_s)
            time.sleep(wait_s)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return " ".join(str(cause).split()) or type(cause).__name__


def _requested_wait_s(error: Exception) -> float:
    """The seconds that a busy server gives in ``Retry-After``, or 0."""
    headers = error.headers if isinstance(error, urllib.error.HTTPError) else None
    wait = headers.get("Retry-After", "") if headers else ""
    return float(wait) if wait.isdecimal() else 0.0


@dataclass(frozen=True)
class Origin:
    """The file on a server that a part comes from; its rest must come from the same."""

    url: str
    bytes: int
    etag: str | None
    last_modified: str | None

    @property
    def validator(self) -> str | None:
        """For ``If-Range``, which takes no weak tags (RFC 9110, section 13.1.5)."""
        if self.etag and not self.etag.startswith("W/"):
            return self.etag
        return self.last_modified


class PartialFile:
    """``<file>.part``, which becomes the file once complete, and ``<file>.part.json``, its origin.

    The origin holds for every byte in the part, even if the process is killed at any moment.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self.path = target.with_name(f"{target.name}.part")
        self._note = target.with_name(f"{target.name}.part.json")
        self._file: io.FileIO

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Open it for this process alone; the lock ends with the process."""
        with _disk_errors(self.path):
            file = io.FileIO(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    raise FileNotFoundError
            except (BlockingIOError, FileNotFoundError):  # downloading, or just finished
                raise FetchError(
                    f"another process is writing {self.path}: wait for it to finish"
                ) from None
            except OSError as error:
                log.warning(
                    "no file lock, so run one download only path=%s: %s",
                    self.path,
                    error,
                )
            self._file = file
            yield

    @property
    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def origin(self) -> Origin | None:
        try:
            return Origin(**json.loads(self._note.read_bytes()))
        except (OSError, ValueError, TypeError):  # missing or damaged: start over
            return None

    def md5(self) -> hashlib._Hash:
        """Of the bytes so far; later writes are appended."""
        md5 = hashlib.md5(usedforsecurity=False)
        with _disk_errors(self.path):
            self._file.seek(0)
            while block := self._file.read(BLOCK):
                md5.update(block)
        return md5

    def restart(self, origin: Origin | None) -> None:
        """Empty it, then note the origin: no byte ever lies beside the origin of another file."""
        with _disk_errors(self.path):
            self._file.seek(0)
            self._file.truncate()
            if origin is None:
                self._note.unlink(missing_ok=True)
                return
            with replacing(self._note) as file:
                file.write(json.dumps(dataclasses.asdict(origin)).encode())

    def write(self, block: bytes) -> None:
        with _disk_errors(self.path):
            left = memoryview(block)
            while left:
                left = left[self._file.write(left) :]

    def require_space(self, size: int) -> None:
        """Raises FetchError where ``size`` bytes would not fit on the disk."""
        with _disk_errors(self.path):
            free = shutil.disk_usage(self.path.parent).free
        if size - self.size > free:
            raise FetchError(
                f"{self.path.parent} has {free:,} bytes free and {self._target.name} needs "
                f"{size - self.size:,}: free some space, then run the same command to resume"
            )

    def finish(self) -> None:
        """Rename it to the file itself, once it is on the disk."""
        with _disk_errors(self._target):
            os.fsync(self._file)
            self.path.replace(self._target)
            self._note.unlink(missing_ok=True)

    def drop(self) -> None:
        with _disk_errors(self.path):
            self.path.unlink()
            self._note.unlink(missing_ok=True)


class Download:
    """The download of one file into its part."""

    def __init__(
        self,
        url: str,
        part: PartialFile,
        known: Published,
        progress: ByteProgress | None,
    ) -> None:
        self.url, self._part, self._known = url, part, known
        self._progress = progress
        self._ranges = True
        """False once the server has answered a range wrongly."""
        self._pieced = False
        """The part holds bytes of more than one response."""
        self.position = 0
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._origin = part.origin()
        if self._origin is None or self._origin.url != url or part.size > self._origin.bytes:
            self._restart(None)
        elif part.size:
            log.info("resuming: reading the bytes so far first bytes=%d", part.size)
            self.position, self._md5, self._pieced = part.size, part.md5(), True

    def is_right(self) -> bool:
        """Whether the part is complete and has the published MD5.

        A complete part with another MD5 is emptied. If it came from several responses, the file is
        requested again in one piece; else the server has another file, and FetchError is raised.
        """
        if self._origin is None or self.position < self._origin.bytes:
            return False
        found = self._md5.hexdigest()
        if found == self._known.md5:
            return True
        again = self._pieced
        self._restart(None)
        message = f"{self.url} has MD5 {found} and not {self._known.md5}"
        if not again:
            self._part.drop()
            raise FetchError(f"{message}: it is not the published archive; nothing was kept")
        log.warning("%s when assembled: requesting it in one piece", message)
        self._ranges = False
        return False

    def request(self) -> None:
        """Request what is missing. Raises OSError or HTTPException where the connection breaks."""
        headers = {"User-Agent": "deepfill-pipeline"}
        if self.position and not self._ranges:
            self._restart(None)
        if self.position:
            assert self._origin is not None
            headers["Range"] = f"bytes={self.position}-"
            if self._origin.validator:
                headers["If-Range"] = self._origin.validator
        request = urllib.request.Request(self.url, headers=headers)
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            error.close()
            self._refused(error)
            raise
        with response:
            if response.headers.get_content_type() == "text/html":
                raise FetchError(
                    f"{self.url} answers with a web page instead of an archive: check for a login "
                    "page or a proxy"
                )
            end = self._continued(response) if self.position else 0
            self._read(response, end or self._whole(response))

    def _refused(self, error: urllib.error.HTTPError) -> None:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and self.position:
            self._distrust("the range is refused")
        if error.code not in TEMPORARY:
            raise FetchError(
                f"{self.url}: {_reason(error)}; check the base URL, and that the file exists"
            ) from error

    def _continued(self, response: http.client.HTTPResponse) -> int:
        """Where a response ends that resumes at our position; 0 for one from the start."""
        assert self._origin is not None
        if response.status != http.client.PARTIAL_CONTENT:
            log.warning("the server starts over: file changed, or no ranges url=%s", self.url)
            return 0
        given = response.headers["Content-Range"] or ""
        match = CONTENT_RANGE.fullmatch(given.strip())
        if not match:
            self._distrust(f"Content-Range is '{given}'")
        start, end = int(match[1]), int(match[2]) + 1
        total = self._origin.bytes if match[3] == "*" else int(match[3])
        length = _length(response)
        if start != self.position or not start < end <= total or length not in (None, end - start):
            self._distrust(f"Content-Range is '{given}', Content-Length {length}")
        tags = (response.headers["ETag"], response.headers["Last-Modified"])
        ours = (self._origin.etag, self._origin.last_modified)
        if total != self._origin.bytes or any(
            new != old for new, old in zip(tags, ours, strict=True) if new and old
        ):
            self._restart(None)
            raise ConnectionError("the file on the server has changed: starting over")
        self._pieced = True
        return end

    def _whole(self, response: http.client.HTTPResponse) -> int:
        """Empty the part for a response with the whole file; its size."""
        if response.status != http.client.OK:
            raise FetchError(f"{self.url}: the server answers {response.status} instead of 200")
        length = _length(response)
        size = self._known.bytes or length
        if size is None:
            raise FetchError(f"{self.url}: the server sends no length: try a mirror")
        if length not in (None, size):
            raise FetchError(
                f"{self.url} has {length:,} bytes and the published archive {size:,}: try a mirror"
            )
        self._part.require_space(size)
        tags = (response.headers["ETag"], response.headers["Last-Modified"])
        self._restart(Origin(self.url, size, *tags))
        return size

    def _read(self, response: http.client.HTTPResponse, end: int) -> None:
        assert self._origin is not None
        total = self._origin.bytes
        while self.position < end:
            block = response.read1(min(BLOCK, end - self.position))
            if not block:
                raise ConnectionError(f"connection lost after {self.position:,} of {total:,} bytes")
            self._part.write(block)
            self._md5.update(block)
            self.position += len(block)
            if self._progress:
                self._progress(self.position, total)

    def _distrust(self, fault: str) -> NoReturn:
        asked = f"bytes={self.position}-"
        self._ranges = False
        self._restart(None)
        raise ConnectionError(f"requested {asked}, {fault}: starting over, without ranges")

    def _restart(self, origin: Origin | None) -> None:
        self._part.restart(origin)
        self._origin, self.position, self._pieced = origin, 0, False
        self._md5 = hashlib.md5(usedforsecurity=False)


def _length(response: http.client.HTTPResponse) -> int | None:
    length = response.headers["Content-Length"] or ""
    return int(length) if length.isdecimal() else None


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """An OSError inside becomes one line about ``path``."""
    try:
        yield
    except FetchError:
        raise
    except StorageError as error:
        raise FetchError(str(error)) from error
    except OSError as error:
        raise FetchError(f"{path}: {error.strerror}") from error
