"""Files below a path or an S3 prefix, also inside tars."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import tarfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.storage import (
    MissingKeyError,
    StorageError,
    folder_and_name,
    join,
    one_line,
    open_store,
    open_version,
)
from data_prep.parquet import ParquetImage, read_parquet
from data_prep.shards import Split

log = logging.getLogger(__name__)

Subject = Literal["scene", "face"]

LONGEST_KEY = 80


@dataclass(frozen=True, slots=True)
class TarMember:
    """Where a file lies inside a tar."""

    tar: str
    """The tar's path relative to the root; empty where the root is the tar."""
    offset: int
    size: int
    version: str
    """Of the tar, when it was listed."""


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image of a source: a file, or a fixed part of one."""

    key: str
    """Unique in the dataset; letters, digits and _ - / = + only."""
    split: Split
    subject: Subject
    path: str
    """Relative to the root of the source, or to the tar, exactly as named there; in Parquet the
    path of the file and the number of the row."""
    source: str
    crop: tuple[int, int, int, int] | None = None
    """Left, top, right, bottom in pixels of the upright image."""
    place: TarMember | ParquetImage | None = None
    """Where the bytes lie, for an image inside a tar or a Parquet file."""


Files = dict[str, TarMember | None]
"""By relative path; a file inside a tar has the path that unpacking would give it."""


def list_files(root: str) -> Files:
    """Every file below a directory, an S3 prefix, or inside a tar, except hidden ones.

    The files inside a tar are listed in its place. A file that also lies unpacked beside its tar
    counts once. Raises ValueError for any other root.
    """
    if root.endswith(".tar"):
        return list_tar(root, "")
    found: Files = {}
    tars = []
    for path in walk_files(root):
        if path.endswith(".tar"):
            tars.append(path)
        else:
            found[path] = None
    for tar in tars:
        for path, member in list_tar(root, tar).items():
            found.setdefault(path, member)
    return found


def read_file(root: str, path: str, place: TarMember | ParquetImage | None = None) -> bytes:
    """The bytes of a listed file or image. Raises StorageError."""
    if place is None:
        return open_store(root).get(path)
    if isinstance(place, ParquetImage):
        return read_parquet(root, place)
    url = join(root, place.tar) if place.tar else root
    try:
        data: bytes = _opened(url, place.version).read_at(place.size, place.offset)
    except FileNotFoundError as error:
        raise MissingKeyError(f"{url}: the tar is gone") from error
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{url}: {error}") from error
    if len(data) != place.size:
        raise StorageError(f"{url} ends inside {path}: the tar changed during the build")
    return data


@functools.lru_cache(maxsize=16)
def _opened(url: str, version: str) -> Any:
    return open_version(url, version)[0]


def key_of(path: str) -> str:
    """A key that no other path has: ``a b/c.d.jpg`` becomes ``a+20b/c=d``.

    A final ``.jpg`` is removed. Other dots become ``=``, since a dot would end a key in a tar, and
    other characters their bytes in hexadecimal. A long key ends in a hash.
    """
    raw = path.removesuffix(".jpg").encode("utf-8", "surrogateescape")
    key = re.sub(rb"[^A-Za-z0-9_/-]", _escaped, raw).decode("ascii")
    if len(key) > LONGEST_KEY:
        digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        key = f"{key[: LONGEST_KEY - 33]}+{digest}"
    return key


def _escaped(match: re.Match[bytes]) -> bytes:
    return b"=" if match[0] == b"." else b"+%02X" % match[0][0]


def split_by_name(names: Collection[str], val_fraction: float) -> dict[str, Split]:
    """Each name's split, by that name alone: added or removed images do not move others.

    At least one is held out, unless ``val_fraction`` is 0 or there is only one.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}: give a share from 0 to less than 1")
    if val_fraction == 0 or len(names) == 1:
        return dict.fromkeys(names, "train")
    nearest = min(names, key=_position)
    return {
        name: "val" if name == nearest or _position(name) < val_fraction else "train"
        for name in names
    }


def _position(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    raw = name.encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(raw, digest_size=6, person=b"split").digest()
    return int.from_bytes(digest) / 2**48


def list_tar(root: str, tar: str) -> Files:
    """Files of a tar on disk (seeking from header to header) or on S3 (reading it through).

    As unpacking leaves them: the last of two members of one name counts (``tar -r`` adds those),
    and a hard link is the file it links to. Symbolic links are left out, with a warning.
    """
    url = join(root, tar) if tar else root
    folder, name = folder_and_name(url)
    below = tar[: tar.rfind("/") + 1]
    found: Files = {}
    links = 0
    with open_store(folder).open(name) as file:
        opened, version = open_version(url)
        opened.close()
        try:
            with tarfile.open(fileobj=file, mode="r:" if file.seekable() else "r|") as archive:
                while (info := archive.next()) is not None:
                    # tarfile keeps every header: gigabytes, for millions of members.
                    archive.members.clear()  # type: ignore[attr-defined]
                    path = below + info.name.removeprefix("./").lstrip("/")
                    target = below + info.linkname.removeprefix("./").lstrip("/")
                    if info.isreg():
                        found[path] = TarMember(tar, info.offset_data, info.size, version)
                    elif info.islnk() and target in found:
                        found[path] = found[target]
                    elif info.islnk() or info.issym():
                        found.pop(path, None)
                        links += 1
        except tarfile.TarError as error:
            raise ValueError(one_line(f"{url} is not a complete tar: {error}")) from error
    if links:
        log.warning("links in a tar left out count=%d url=%s", links, url)
    for path in [path for path in found if _hidden(path)]:  # only now: links may refer to them
        del found[path]
    return found


def _hidden(path: str) -> bool:
    return path.startswith(".") or "/." in path


def walk_files(root: str) -> Iterator[str]:
    """Paths of the files below a directory or an S3 prefix."""
    store = open_store(root)
    folder = store.local_path()
    if folder is None:
        yield from (key for key in store.list_keys() if not _hidden(key))
        return
    if not folder.is_dir():
        raise ValueError(f"folder {root} was not found: give a folder, a tar, or an s3:// prefix")
    yield from _walk(store.url, "", frozenset())


def _walk(folder: str, below: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Paths of the files below ``folder``; links are followed, except back into a folder above.

    A dead link counts as a file, so that its image is reported as missing. A folder that cannot be
    listed is an error, since its images would be lost unnoticed.
    """
    try:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            return
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return  # removed since its name was read
    except OSError as error:
        raise StorageError(
            f"{folder}: {error.strerror}: folders of images must be readable: change its "
            "permissions, or move it elsewhere"
        ) from error
    for entry in found:
        if entry.name.startswith("."):
            continue
        if _is(entry.is_dir):
            yield from _walk(entry.path, f"{below}{entry.name}/", above | {identity})
        elif _is(entry.is_file) or not _is(Path(entry.path).exists):  # neither pipe nor device
            yield below + entry.name


def _is(ask: Callable[[], bool]) -> bool:
    """False also for links in a circle, or into a folder without permission."""
    try:
        return ask()
    except OSError:
        return False
