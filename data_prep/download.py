"""Official archives of Places2: fetched over HTTP, resumed when cut; checked by size and MD5."""

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

from cluster.storage import folder_and_name, open_store
from data_prep.files import walk_files
from data_prep.places2 import ARCHIVES, LISTS, Archive

log = logging.getLogger(__name__)

OFFICIAL = "http://data.csail.mit.edu/places/places365/"
LICENCE = (
    "the pictures of Places2 belong to their owners; they may be used for non-commercial research "
    "and education only, and not be passed on (http://places2.csail.mit.edu/download.html)"
)
# What can be fetched, by the names to type. There is no published MD5 of the easy format.
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
NEWS = 2**20  # so many further bytes make a try a good one: the count of failures begins anew
LONGEST_WAIT_S = 60.0
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")

Progress = Callable[[int, int], None]
"""Called with the bytes there are and the bytes in all; fewer than before after a fresh start."""


class FetchError(OSError):
    """An archive could not be fetched; one line with the file or URL and what to do."""


def fetch(
    archive: str,
    out: Path,
    *,
    accept_licence: bool,
    base_url: str = OFFICIAL,
    progress: Progress | None = None,
    tries: int = 8,
    back_off_s: float = 1.0,
    timeout_s: float = 60.0,
) -> Path:
    """Fetch one of ``FILES`` into the folder ``out``; the path of the archive, its MD5 checked.

    What is there already is checked and not fetched again. What was cut short, even by kill -9,
    goes on from ``<file>.part`` as long as the server still has the same file. A try fails when it
    is cut or silent for ``timeout_s``; after ``tries`` failures in a row, with ``back_off_s``
    seconds and then twice as many each time between them, the part is kept and FetchError raised.
    Raises ValueError without ``accept_licence``, for an unknown archive and a bad ``base_url``;
    FetchError where server, disk or content are not as they should be; StorageError where what is
    there already cannot be read.
    """
    if archive not in FILES:
        raise ValueError(f"{archive} is no archive known here; there are {', '.join(FILES)}")
    if not accept_licence:
        raise ValueError(f"{archive} is fetched once you agree by --accept-licence: {LICENCE}")
    file = FILES[archive]
    url, target = _address(base_url) + file, out / file
    with _told_of(out):
        out.mkdir(parents=True, exist_ok=True)
        there = target.exists()
    if there:
        return _checked(target, progress)
    log.info("fetching url=%s to=%s licence: %s", url, target, LICENCE)
    part = Part(target)
    with part.locked():
        if not target.exists():  # else another process finished it in this moment
            download = Download(url, part, ARCHIVES[file], timeout_s, progress)
            _complete(download, tries, back_off_s)
            part.finish()
            log.info("fetched path=%s bytes=%d", target, part.size)
            return target
        part.drop()
    return _checked(target, progress)


def _address(base_url: str) -> str:
    parts = urlsplit(base_url)
    if "@" in parts.netloc:
        raise ValueError("the base URL carries a user name or password: give one without")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{base_url} is no http:// or https:// address")
    return base_url.rstrip("/") + "/"


def check_archives(root: str, *, progress: Progress | None = None) -> Iterator[tuple[str, str]]:
    """Every known archive and list at or below ``root``, on disk or S3, with what is wrong of it.

    Known are the published names; a fault is one line, and empty where size and MD5 are the
    published ones. ``progress`` is of all their bytes. Raises ValueError where there are none,
    StorageError.
    """
    known = ARCHIVES | LISTS
    folder, name = folder_and_name(root)
    if name in known:
        root, names = folder, [name]
    elif name.endswith(".tar"):
        raise ValueError(
            f"{root}: the archives of Places2 are known by their published names: "
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

        def told(done: int, before: int = before) -> None:
            if progress:
                progress(before + done, total)

        if official.bytes not in (None, size):
            yield name, f"has {size:,} bytes; the published one has {official.bytes:,}"
        else:
            with contextlib.closing(store.open(name)) as file:
                md5 = _md5(file, told)
            differs = md5 != official.md5
            yield name, f"has MD5 {md5}; the published one has {official.md5}" if differs else ""
        before += size
        told(0, before)


def _md5(file: BinaryIO, told: Callable[[int], None]) -> str:
    md5, done = hashlib.md5(usedforsecurity=False), 0
    while block := file.read(BLOCK):
        md5.update(block)
        done += len(block)
        told(done)
    return md5.hexdigest()


def _checked(target: Path, progress: Progress | None) -> Path:
    """``target``, once its bytes are found to be the published ones; nothing of it is changed."""
    log.info("checking path=%s", target)
    for _, fault in check_archives(str(target), progress=progress):
        if fault:
            raise FetchError(
                f"{target} is not the published archive, it {fault}: move it away or delete it, "
                "then run the same command to fetch it"
            )
    return target


def _complete(download: Download, tries: int, back_off_s: float) -> None:
    """Ask until every byte is there and right; gives up after ``tries`` failures in a row."""
    failures, furthest = 0, download.position
    while not download.is_right():
        try:
            download.ask()
        except FetchError:
            raise
        except http.client.InvalidURL as error:
            raise ValueError(f"{download.url} is no address: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            if download.position >= furthest + NEWS:
                failures, furthest = 0, download.position
            failures += 1
            if failures >= tries:
                raise FetchError(
                    f"{download.url}: {_reason(error)}; gave up after {tries} tries with "
                    f"{download.position:,} bytes kept: run the same command to go on"
                ) from error
            wait_s = max(back_off_s * 2 ** (failures - 1), _asked_wait_s(error))
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


def _asked_wait_s(error: Exception) -> float:
    """What a busy server asks for in ``Retry-After``, where that is a number of seconds."""
    headers = error.headers if isinstance(error, urllib.error.HTTPError) else None
    wait = headers.get("Retry-After", "") if headers else ""
    return float(wait) if wait.isdecimal() else 0.0


@dataclass(frozen=True)
class Origin:
    """Which file on which server a part comes from, to be sure that the rest is of the same."""

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


class Part:
    """``<file>.part``, which becomes the file once complete, and ``<file>.part.json``, its origin.

    Whatever moment a process is killed in, the origin is that of every byte in the part.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self.path = target.with_name(f"{target.name}.part")
        self._note = target.with_name(f"{target.name}.part.json")
        self._file: io.FileIO

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Open it for this process alone; the lock ends with the process, however that ends."""
        with _told_of(self.path):
            file = io.FileIO(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    raise FileNotFoundError
            except (BlockingIOError, FileNotFoundError):  # at work, or it has just finished
                raise FetchError(f"{self.path} is another process's: wait for its end") from None
            except OSError as error:
                log.warning("no lock, so fetch this once only path=%s: %s", self.path, error)
            self._file = file
            yield

    @property
    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def origin(self) -> Origin | None:
        try:
            return Origin(**json.loads(self._note.read_bytes()))
        except (OSError, ValueError, TypeError):  # missing or unusable: begin anew
            return None

    def md5(self) -> hashlib._Hash:
        """That of what is there; further writes go behind it."""
        md5 = hashlib.md5(usedforsecurity=False)
        with _told_of(self.path):
            self._file.seek(0)
            while block := self._file.read(BLOCK):
                md5.update(block)
        return md5

    def begin(self, origin: Origin | None) -> None:
        """Empty it; first of all, so that no bytes are ever beside another file's origin."""
        with _told_of(self.path):
            self._file.seek(0)
            self._file.truncate()
            if origin is None:
                self._note.unlink(missing_ok=True)
                return
            fresh = self._note.with_name(f"{self._note.name}.new")
            fresh.write_text(json.dumps(dataclasses.asdict(origin)))
            fresh.replace(self._note)

    def write(self, block: bytes) -> None:
        with _told_of(self.path):
            left = memoryview(block)
            while left:
                left = left[self._file.write(left) :]

    def require_space(self, size: int) -> None:
        """Raises FetchError where a part of ``size`` bytes would not fit on the disk."""
        with _told_of(self.path):
            free = shutil.disk_usage(self.path.parent).free
        if size - self.size > free:
            raise FetchError(
                f"{self.path.parent} has {free:,} bytes free and {self._target.name} needs "
                f"{size - self.size:,}: make room, then run the same command to go on"
            )

    def finish(self) -> None:
        """Make it the file itself, at once and for good."""
        with _told_of(self._target):
            os.fsync(self._file)
            self.path.replace(self._target)
            self._note.unlink(missing_ok=True)

    def drop(self) -> None:
        with _told_of(self.path):
            self.path.unlink()
            self._note.unlink(missing_ok=True)


class Download:
    """One file of a server on its way into a part."""

    def __init__(
        self, url: str, part: Part, known: Archive, timeout_s: float, progress: Progress | None
    ) -> None:
        self.url, self._part, self._known = url, part, known
        self._timeout_s, self._progress = timeout_s, progress
        self._ranges = True
        """False once the server has shown that its ranges are not to be relied on."""
        self._pieced = False
        """The part holds bytes of more than one answer."""
        self.position = 0
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._origin = part.origin()
        if self._origin is None or self._origin.url != url or part.size > self._origin.bytes:
            self._begin(None)
        elif part.size:
            log.info("going on after bytes=%d, which are read first", part.size)
            self.position, self._md5, self._pieced = part.size, part.md5(), True

    def is_right(self) -> bool:
        """Whether the part is whole and has the published MD5.

        A whole one with another MD5 is emptied: to be asked for in one piece where it was put
        together from several answers; else the server has another file, and FetchError is raised.
        """
        if self._origin is None or self.position < self._origin.bytes:
            return False
        found = self._md5.hexdigest()
        if found == self._known.md5:
            return True
        again = self._pieced
        self._begin(None)
        message = f"{self.url} has MD5 {found} and not {self._known.md5}"
        if not again:
            self._part.drop()
            raise FetchError(f"{message}: it is not the published archive, and nothing is kept")
        log.warning("%s when put together: asking for it in one piece", message)
        self._ranges = False
        return False

    def ask(self) -> None:
        """One request for what is missing. Raises OSError or HTTPException where it was cut."""
        headers = {"User-Agent": "deepfill-pipeline"}
        if self.position and not self._ranges:
            self._begin(None)
        if self.position:
            assert self._origin is not None
            headers["Range"] = f"bytes={self.position}-"
            if self._origin.validator:
                headers["If-Range"] = self._origin.validator
        request = urllib.request.Request(self.url, headers=headers)
        try:
            response = urllib.request.urlopen(request, timeout=self._timeout_s)
        except urllib.error.HTTPError as error:
            error.close()
            self._refused(error)
            raise
        with response:
            if response.headers.get_content_type() == "text/html":
                raise FetchError(
                    f"{self.url} answers with a web page and not with an archive: is there a login "
                    "or a proxy in between?"
                )
            end = self._continued(response) if self.position else 0
            self._read(response, end or self._begun(response))

    def _refused(self, error: urllib.error.HTTPError) -> None:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and self.position:
            self._distrust("it has no such range")
        if error.code not in PASSING:
            raise FetchError(
                f"{self.url}: {_reason(error)}; is the base URL right, and is the file still there?"
            ) from error

    def _continued(self, response: http.client.HTTPResponse) -> int:
        """Where the answer ends that goes on at our position; 0 for one that begins anew."""
        assert self._origin is not None
        if response.status != http.client.PARTIAL_CONTENT:
            log.warning("the server begins anew: file changed, or no ranges url=%s", self.url)
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
            self._begin(None)
            raise ConnectionError("the file on the server has changed: beginning anew")
        self._pieced = True
        return end

    def _begun(self, response: http.client.HTTPResponse) -> int:
        """Empty the part for an answer with the whole file; where that ends."""
        if response.status != http.client.OK:
            raise FetchError(
                f"{self.url}: the server answers {response.status}, which fits nothing"
            )
        length = _length(response)
        size = self._known.bytes or length
        if size is None:
            raise FetchError(f"{self.url}: the server does not say how long it is: try a mirror")
        if length not in (None, size):
            raise FetchError(
                f"{self.url} has {length:,} bytes and the published archive {size:,}: try a mirror"
            )
        self._part.require_space(size)
        tags = (response.headers["ETag"], response.headers["Last-Modified"])
        self._begin(Origin(self.url, size, *tags))
        return size

    def _read(self, response: http.client.HTTPResponse, end: int) -> None:
        assert self._origin is not None
        total = self._origin.bytes
        while self.position < end:
            block = response.read1(min(BLOCK, end - self.position))
            if not block:
                raise ConnectionError(f"cut after {self.position:,} of {total:,} bytes")
            self._part.write(block)
            self._md5.update(block)
            self.position += len(block)
            if self._progress:
                self._progress(self.position, total)

    def _distrust(self, fault: str) -> NoReturn:
        asked = f"bytes={self.position}-"
        self._ranges = False
        self._begin(None)
        raise ConnectionError(f"asked for {asked}, {fault}: beginning anew, without ranges")

    def _begin(self, origin: Origin | None) -> None:
        self._part.begin(origin)
        self._origin, self.position, self._pieced = origin, 0, False
        self._md5 = hashlib.md5(usedforsecurity=False)


def _length(response: http.client.HTTPResponse) -> int | None:
    length = response.headers["Content-Length"] or ""
    return int(length) if length.isdecimal() else None


@contextlib.contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """An error of the disk inside becomes one line about ``path``."""
    try:
        yield
    except FetchError:
        raise
    except OSError as error:
        raise FetchError(f"{path}: {error.strerror}") from error
