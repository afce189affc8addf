"""Files below a path or an S3 prefix, also inside tars that nobody unpacked."""

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
from data_prep.parquet import Row, read_row
from data_prep.shards import Split

log = logging.getLogger(__name__)

Subject = Literal["scene", "face"]

LONGEST_KEY = 80


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a tar: where its bytes lie."""

    tar: str
    """The tar's path relative to the root; empty where the root is the tar."""
    offset: int
    size: int
    version: str
    """Of the tar, when it was listed."""


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One picture to be: a file, or a fixed part of one."""

    key: str
    """Unique in the data set; letters, digits and _ - / = + only."""
    split: Split
    subject: Subject
    path: str
    """Relative to the root of the source, or to the tar, exactly as it is called there; in Parquet
    that of the file and the number of the row."""
    source: str
    crop: tuple[int, int, int, int] | None = None
    """Left, top, right, bottom in pixels of the upright picture."""
    member: Member | Row | None = None


Files = dict[str, Member | None]
"""Relative paths; those inside a tar have the path that unpacking it in place would give them."""


def list_files(root: str) -> Files:
    """Every file below a directory, an S3 prefix, or inside a tar; hidden ones are left out.

    Tars are not unpacked: what they hold is listed in their stead. A file that lies unpacked
    beside its tar counts once. Raises ValueError for a root that is none of these.
    """
    if root.endswith(".tar"):
        return _tar_members(root, "")
    found: Files = {}
    tars = []
    for path in walk_files(root):
        if path.endswith(".tar"):
            tars.append(path)
        else:
            found[path] = None
    for tar in tars:
        for path, member in _tar_members(root, tar).items():
            found.setdefault(path, member)
    return found


def read_file(root: str, path: str, member: Member | Row | None = None) -> bytes:
    """The bytes of a file that ``list_files`` found, or of a picture. Raises StorageError."""
    if member is None:
        return open_store(root).get(path)
    if isinstance(member, Row):
        return read_row(root, member)
    url = join(root, member.tar) if member.tar else root
    try:
        data: bytes = _opened(url, member.version).read_at(member.size, member.offset)
    except FileNotFoundError as error:
        raise MissingKeyError(f"{url}: the tar is gone") from error
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{url}: {error}") from error
    if len(data) != member.size:
        raise StorageError(f"{url} ends inside {path}: it was changed while it was being read")
    return data


@functools.lru_cache(maxsize=16)
def _opened(url: str, version: str) -> Any:
    return open_version(url, version)[0]


def key_of(path: str) -> str:
    """A key that no other path has: ``a b/c.d.jpg`` becomes ``a+20b/c=d``.

    A final ``.jpg`` goes away, other dots become ``=`` (a dot would end a key in a tar), other
    characters their bytes in hexadecimal; what is too long ends in its hash.
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
    """A picture's own name decides, so others that come or go do not move it.

    Where some are to be held out, at least one is.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}: give a share from 0 to less than 1")
    if val_fraction == 0 or len(names) == 1:
        return dict.fromkeys(names, "train")
    nearest = min(names, key=_place)
    return {
        name: "val" if name == nearest or _place(name) < val_fraction else "train" for name in names
    }


def _place(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    raw = name.encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(raw, digest_size=6, person=b"split").digest()
    return int.from_bytes(digest) / 2**48


def _tar_members(root: str, tar: str) -> Files:
    """Files of a tar on disk (seeking from header to header) or on S3 (read through).

    As unpacking leaves them: of two members of one name the last counts (``tar -r`` adds those),
    and a hard link is the file that it was made of. Symbolic links are left out, with a warning.
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
                    # tarfile keeps every header it has seen: gigabytes, for millions of members.
                    archive.members.clear()  # type: ignore[attr-defined]
                    path = below + info.name.removeprefix("./").lstrip("/")
                    target = below + info.linkname.removeprefix("./").lstrip("/")
                    if info.isreg():
                        found[path] = Member(tar, info.offset_data, info.size, version)
                    elif info.islnk() and target in found:
                        found[path] = found[target]
                    elif info.islnk() or info.issym():
                        found.pop(path, None)
                        links += 1
        except tarfile.TarError as error:
            raise ValueError(one_line(f"{url} is no whole tar: {error}")) from error
    if links:
        log.warning("links in a tar left out count=%d url=%s", links, url)
    for path in [path for path in found if _hidden(path)]:  # till now, links may be made of them
        del found[path]
    return found


def _hidden(path: str) -> bool:
    return path.startswith(".") or "/." in path


def walk_files(root: str) -> Iterator[str]:
    """Paths of the files below a directory or an S3 prefix; nothing is looked into."""
    store = open_store(root)
    folder = store.local_path()
    if folder is None:
        yield from (key for key in store.list_keys() if not _hidden(key))
        return
    if not folder.is_dir():
        raise ValueError(f"there is no folder {root}: give one, a tar, or an s3:// prefix")
    yield from _walk(store.url, "", frozenset())


def _walk(folder: str, below: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Links are followed, except those that lead back into a folder on the way here.

    Those that lead nowhere count as files, so a picture is missed by its name. A folder that
    cannot be listed is an error: nobody would miss what is in it.
    """
    try:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            return
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return  # it went away since its name was read
    except OSError as error:
        raise StorageError(
            f"{folder}: {error.strerror}: folders of pictures must be readable, so change that "
            "or move it elsewhere"
        ) from error
    for entry in found:
        if entry.name.startswith("."):
            continue
        if _is(entry.is_dir):
            yield from _walk(entry.path, f"{below}{entry.name}/", above | {identity})
        elif _is(entry.is_file) or not _is(Path(entry.path).exists):  # and no pipe or device
            yield below + entry.name


def _is(ask: Callable[[], bool]) -> bool:
    """False, too, for links in a circle, or to where we may not go."""
    try:
        return ask()
    except OSError:
        return False
