"""Directories as stores, atomic replacement of files, and scratch folders."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import io
import logging
import os
import platform
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote

from cluster.storage.base import (
    ABANDONED_S,
    MIB,
    MissingKeyError,
    StorageError,
    StorageRefusedError,
    checked_key,
    join,
    without_password,
)

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

log = logging.getLogger(__name__)

TEMPORARY = ".unfinished-"
SCRATCH = ".deepfill-scratch-"


def open_files(url: str) -> FileStore:
    """The store at a plain path or ``file:///path``; absolute, as Ray's workers run elsewhere."""
    if url.startswith("file://"):
        host, slash, path = url.removeprefix("file://").partition("/")
        if host not in ("", "localhost") or not slash:
            raise StorageError(
                f"{without_password(url)} names another machine: write file:///absolute/path"
            )
        return FileStore(Path("/" + unquote(path)))
    if not url:
        raise StorageError("the storage URL is empty: give a path, file:// or s3://bucket/prefix")
    return FileStore(Path(url).expanduser().absolute())


class FileStore:
    """A directory, which the first write creates."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def url(self) -> str:
        return str(self._root)

    def get(self, key: str) -> bytes:
        with self._storage_errors(key):
            return self._path(key).read_bytes()

    def put(self, key: str, data: bytes) -> None:
        with self._storage_errors(key), replacing(self._path(key)) as file:
            file.write(data)

    def upload(self, path: Path, key: str) -> None:
        with (
            self._storage_errors(key),
            path.open("rb") as source,
            replacing(self._path(key)) as file,
        ):
            shutil.copyfileobj(source, file, MIB)

    def download(self, key: str, path: Path) -> None:
        with (
            self._storage_errors(key),
            self._path(key).open("rb") as source,
            replacing(path) as file,
        ):
            shutil.copyfileobj(source, file, MIB)

    def open(self, key: str) -> BinaryIO:
        with self._storage_errors(key):
            return io.BufferedReader(_FileReader(self._path(key)), MIB)

    def read_range(self, key: str, start: int, size: int) -> bytes:
        with self._storage_errors(key), self._path(key).open("rb") as source:
            source.seek(start)
            return source.read(size)

    def list_keys(self, prefix: str = "") -> list[str]:
        start = self._root / prefix.rpartition("/")[0]
        found = []
        with self._storage_errors(prefix):
            for folder, _, names in os.walk(start, onerror=_raise_unless_missing):
                for name in names:
                    key = Path(folder, name).relative_to(self._root).as_posix()
                    if key.startswith(prefix) and not name.startswith(TEMPORARY):
                        found.append(key)
        return sorted(found)

    def exists(self, key: str) -> bool:
        with self._storage_errors(key):
            return self._path(key).is_file()

    def size(self, key: str) -> int:
        with self._storage_errors(key):
            return self._path(key).stat().st_size

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._storage_errors(key):
            path.unlink(missing_ok=True)
        self._remove_empty_folders(path)

    def clear_unfinished(self, *, abandoned_s: float = ABANDONED_S) -> int:
        """See ``Store``; a file whose writer lives is locked, see ``replacing``."""
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

    def reconnected(self) -> FileStore:
        return self

    def local_path(self, key: str = "") -> Path | None:
        return self._path(key) if key else self._root

    def pyarrow_filesystem(self) -> tuple[FileSystem, str]:
        from pyarrow import fs  # takes half a second, and few callers need it

        return fs.LocalFileSystem(), str(self._root)

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
        return self._root / checked_key(key)

    @contextlib.contextmanager
    def _storage_errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            raise _kind(error)(f"{join(self.url, key)}: {error.strerror or error}") from error


def _kind(error: OSError) -> type[StorageError]:
    if isinstance(error, FileNotFoundError):
        return MissingKeyError
    if isinstance(error, PermissionError | NotADirectoryError) or error.errno == errno.EROFS:
        return StorageRefusedError
    return StorageError


class _FileReader(io.FileIO):
    """A file to read, whose errors name it."""

    def readinto(self, buffer: Any) -> int:
        with self._storage_errors():
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with self._storage_errors():
            return super().readall()

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self.name}: {error.strerror or error}") from error


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder on this machine's own disk, which is removed after the block.

    Folders that killed processes left behind are removed first. An OSError in the block that has
    an error number becomes a StorageError that names the disk and says how to use another one.
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
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that replaces ``path`` at the end of the block, flushed to the disk.

    After an error ``path`` is as before. Missing folders are created. Raises StorageError.
    """
    # Until then the file is locked, under a hidden name that carries the machine. The lock ends
    # with the process, also by kill -9: so _remove_abandoned recognizes what is left over.
    temporary = path.with_name(f"{TEMPORARY}{_machine()}-{secrets.token_hex(8)}")
    try:
        with _create(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)  # still locked
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # flushes the new name
        finally:
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            kind = StorageError if isinstance(error, FileNotFoundError) else _kind(error)
            raise kind(f"{path}: {error.strerror or error}") from error
        raise


def _create(path: Path) -> BinaryIO:
    """A new file, locked while it is open."""
    gone = 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("xb")
        except FileNotFoundError:
            # A concurrent delete may remove the folder again while it is still empty.
            gone += 1
            if gone == 1000:
                raise
            continue
        if _lock(path, file.fileno()):
            return file
        file.close()


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """A new folder, locked; False if it was removed before the lock was taken."""
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
    """Lock a file or folder just created; False where ``_remove_abandoned`` was faster."""
    with contextlib.suppress(OSError):  # a file system without locks: nothing is removed there
        fcntl.flock(opened, fcntl.LOCK_EX)
    try:
        return os.path.samestat(path.stat(), os.fstat(opened))
    except FileNotFoundError:
        return False


def _remove_abandoned(path: Path, abandoned_s: float) -> bool:
    """Delete a half written file, or a scratch folder, unless its writer may be alive.

    The lock alone decides where this machine wrote it since its last start. Locks need not reach
    other machines (NFS and Lustre can be mounted that way), so what another machine wrote must
    also have been idle for ``abandoned_s``.
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
            return False  # another process was faster, and the name has been taken again
        idle_s = time.time() - status.st_mtime
        if f"-{_machine()}-" not in path.name and idle_s < abandoned_s:
            return False
        if folder:
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError:  # in most cases BlockingIOError: it is locked
        return False
    finally:
        os.close(opened)
    return True


@functools.cache
def _machine() -> str:
    """A name for this machine until it reboots; its containers, which share locks, share it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return platform.node()


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
