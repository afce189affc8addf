"""What every store offers, its errors, and the arithmetic of URLs and keys."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

MIB = 2**20
REQUESTS = min(max(len(os.sched_getaffinity(0)), 3), 8)
"""Parts of one file that are on their way at once, up or down.

Each of them hashes and copies: more than there are cores wait for each other, and take the cores of
a server on the same machine. Fewer than three leave a distant server idle.
"""
SECRETS = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "RAY_AUTH_TOKEN"),
)
"""Variables whose values no text may show."""
SHORTEST_SECRET = 5  # shorter ones are parts of ordinary words
ABANDONED_S = 7 * 24 * 3600  # after this long without a byte, a writer on another machine is dead


class StorageError(OSError):
    """A storage operation failed; the message is one line with the URL and a remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))  # file names may have newlines


class MissingKeyError(StorageError, FileNotFoundError):
    """The store has nothing under this key."""


class StorageRefusedError(StorageError):
    """The storage refuses, and repeating changes nothing: forbidden, wrong keys, no bucket."""


class CorruptedTransferError(StorageError):
    """Bytes changed on their way, as a checksum shows; a repetition may bring them whole."""


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
        """Write atomically: readers see the whole old value or the whole new one."""
        ...

    def upload(self, path: Path, key: str) -> None:
        """Copy a local file to ``key``, atomically; big files go in parallel parts."""
        ...

    def download(self, key: str, path: Path) -> None:
        """Copy ``key`` to a local file, which appears once complete. Raises MissingKeyError."""
        ...

    def open(self, key: str) -> BinaryIO:
        """Read from front to back; a short read is an error. Raises MissingKeyError."""
        ...

    def read_range(self, key: str, start: int, size: int) -> bytes:
        """``size`` bytes from ``start``; fewer at the end of the value. Raises MissingKeyError."""
        ...

    def list_keys(self, prefix: str = "") -> list[str]:
        """Every key that starts with the string ``prefix``, sorted."""
        ...

    def exists(self, key: str) -> bool: ...

    def size(self, key: str) -> int:
        """Bytes under ``key``. Raises MissingKeyError."""
        ...

    def delete(self, key: str) -> None:
        """Remove ``key``, which may be missing."""
        ...

    def clear_unfinished(self, *, abandoned_s: float = ABANDONED_S) -> int:
        """Remove what killed writers left half written; returns how many files or uploads.

        Living writers are safe, in whatever process and on whatever machine: what may belong to
        one is kept until it is ``abandoned_s`` old.
        """
        ...

    def reconnected(self) -> Store:
        """This store over new connections: what an old one spoils may come whole."""
        ...

    def local_path(self, key: str = "") -> Path | None:
        """Where ``key``, or by default the whole store, is on this machine's file system.

        None where values are not local files. The path need not exist.
        """
        ...

    def pyarrow_filesystem(self) -> tuple[FileSystem, str]:
        """pyarrow's file system for this store, and the path of the store inside it."""
        ...


def join(url: str, *parts: str) -> str:
    """``url`` with further path components: ``join("s3://b/runs", "x")`` is ``s3://b/runs/x``."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def folder_and_name(url: str) -> tuple[str, str]:
    """The URL of the store that holds a file, and the file's key in it."""
    name = url.rpartition("/")[2]
    return url.removesuffix(name) or ".", name


def scheme_of(url: str) -> str:
    """``s3`` of ``s3://bucket``, also of ``s3:/bucket``; empty for a plain path.

    A relative path like ``a:b`` is a plain path; ``a:/b`` has to be written ``./a:/b``.
    """
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", url)
    return found[1] if found else ""


def checked_key(key: str) -> str:
    """``key``; StorageError unless it is a plain relative path."""
    if any(part in ("", ".", "..") for part in key.split("/")):
        raise StorageError(f"key {key!r} is not a plain relative path like a/b.json")
    return key


def one_line(text: str) -> str:
    """``text`` with newlines and other unprintable characters escaped as in Python."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def describe_error(error: BaseException, max_chars: int = 300) -> str:
    """Kind and message of ``error`` in one line of at most ``max_chars``, without secrets."""
    text = one_line(without_secrets(str(error)))
    return f"{type(error).__name__}: {text}"[:max_chars].removesuffix(": ")


def came_instead(data: bytes) -> str | None:
    """What a failed download left in place of a binary file, with the remedy; None for others."""
    start = data[:512].lstrip().lower()
    if not data:
        return "empty: fetch it again"
    if start.startswith(b"version https://git-lfs.github.com/"):
        return "a pointer of Git LFS, not the file: run `git lfs pull` where it came from"
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page, not the file: fetch it with the link of the file itself"
    if start.startswith(b"pk\x03\x04") and data.rfind(b"PK\x05\x06", -(2**16)) < 0:
        return "cut short, as by a download that stopped: fetch it again"
    return None


def without_password(text: str) -> str:
    """``text`` without the user names and passwords of the URLs in it.

    A password may hold slashes and at signs; digits before a slash are a port.
    """
    return re.sub(r":(/{1,2})[^/@\s:]*(?::(?!\d+[/?#])[^@\s]*)?@(?:[^/@\s]*@)*", r":\1", text)


def blanked(text: str) -> str:
    """``text`` with the values of this process's credentials, and passwords of URLs, blanked."""
    for name in SECRETS:
        value = os.environ.get(name, "")
        if len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "***")
    return without_password(text)


def without_secrets(text: str) -> str:
    """``blanked`` text on one line."""
    return " ".join(blanked(text).split())
