"""From a URL to its store: the table of schemes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster.storage.base import StorageError, Store, scheme_of, without_password
from cluster.storage.files import open_files

if TYPE_CHECKING:
    from pyarrow import NativeFile
    from pyarrow.fs import FileSystem


def _open_s3(url: str) -> Store:
    from cluster.storage.s3 import open_s3  # boto3 takes time that only S3 needs

    return open_s3(url)


SCHEMES: dict[str, Callable[[str], Store]] = {"": open_files, "file": open_files, "s3": _open_s3}
"""The scheme of a URL, and what opens such a URL without any access; "" is a plain path."""


def open_store(url: str) -> Store:
    """The store at a plain path, ``file://`` or ``s3://bucket/prefix``; no access happens yet.

    Raises StorageError for another scheme, and for credentials in the URL: those belong in the
    environment.
    """
    if not has_store(url):
        raise StorageError(
            f"{without_password(url)}: storage is a plain path, file:///path or s3://bucket/prefix"
        )
    return SCHEMES[scheme_of(url)](url)


def has_store(url: str) -> bool:
    """Whether the form of ``url`` is one that ``open_store`` takes."""
    scheme = scheme_of(url)
    return scheme in SCHEMES and (not scheme or url.startswith(f"{scheme}://"))


def pyarrow_filesystem(url: str) -> tuple[FileSystem, str]:
    """pyarrow's file system for ``url``, and the path of ``url`` inside it."""
    return open_store(url).pyarrow_filesystem()


def open_version(url: str, version: str | None = None) -> tuple[NativeFile, str]:
    """``url`` for random access from many threads, and the version of the file.

    ``version`` is what an earlier call returned: StorageError if the file was replaced since then,
    because offsets noted at that time point at other content. Raises OSError as pyarrow does.
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
