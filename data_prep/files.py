"""Files below a path or an S3 prefix, also inside tars."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.storage import (
    MIB,
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

CLUTTER = frozenset(
    [
        *("@eadir", "#recycle", "#snapshot", "$recycle.bin", "lost+found", "__macosx"),
        "system volume information",
    ]
)
"""Folders, in lower case, in which storage boxes and desktops keep thumbnails and deleted files."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """Where a file lies inside a tar."""

    tar: str
    """The tar's path relative to the root; empty where the root is the tar."""
    offset: int
    size: int
    version: str
    """Version of the tar when it was listed."""


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
"""By relative path; a file inside a tar has the path that unpacking would give it. Where different
files would have one path, the name of the tar stands before the name of the file:
``a/0.jpg`` of ``x.tar`` is then ``a/x.tar/0.jpg``."""


def list_files(root: str) -> Files:
    """Every file below a directory, an S3 prefix, or inside a tar, except hidden ones.

    The files inside a tar are listed in its place. A file that also lies unpacked beside its tar
    counts once. Folders of ``CLUTTER`` are left out. Warns of names that only look equal. Raises
    ValueError for any other root, and for a tar that is cut short or that two were joined to.
    """
    if root.endswith(".tar"):
        return list_tar(root, "")
    unpacked: Files = {}
    tars = []
    for path in walk_files(root):
        if path.endswith(".tar"):
            tars.append(path)
        else:
            unpacked[path] = None
    found = _merged(unpacked, {tar: list_tar(root, tar) for tar in tars}, root)
    _warn_of_twins(found, root)
    return found


def _merged(unpacked: Files, in_tars: dict[str, Files], root: str) -> Files:
    """One listing, in which different files have different paths."""
    times = Counter(path for members in in_tars.values() for path in members)
    store = open_store(root)
    found = dict(unpacked)
    renamed = 0
    for tar, members in in_tars.items():
        for path, member in members.items():
            clashes = times[path] > 1
            if path in unpacked:
                assert member is not None
                if member.size == store.size(path):
                    continue  # the tar was unpacked beside itself
                clashes = True
            if clashes:
                folder, slash, name = path.rpartition("/")
                path = f"{folder}{slash}{tar.rpartition('/')[2]}/{name}"
                renamed += 1
            if path in found:
                raise ValueError(
                    one_line(f"{root} holds two files {path}, one of them in {tar}: rename a tar")
                )
            found[path] = member
    if renamed:
        log.info("equal names in several tars carry the tar's name count=%d root=%s", renamed, root)
    return found


def _warn_of_twins(paths: Collection[str], root: str) -> None:
    """Warn of paths that look equal: accents are one character in one, two in the other."""
    forms: dict[str, list[str]] = {}
    for path in paths:
        if not path.isascii():
            forms.setdefault(unicodedata.normalize("NFC", path), []).append(path)
    twins = [names for names in forms.values() if len(names) > 1]
    if twins:
        log.warning(
            "names that look equal and are two files (accents as NFC and NFD) count=%d "
            "first: %s root=%s",
            *(len(twins), one_line(" and ".join(ascii(name) for name in twins[0])), root),
        )


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


SMALL = 1000  # names of so few images may draw far from the share that was asked for


def split_by_name(names: Collection[str], val_fraction: float) -> dict[str, Split]:
    """Each name's split, by a hash of that name alone: added or removed images do not move others.

    The share held out is near ``val_fraction``. Where fewer than ``SMALL`` names draw a number more
    than a quarter off, that number is corrected, with the names that were nearest. At least one is
    held out, unless ``val_fraction`` is 0 or there is only one.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}: give a share from 0 to less than 1")
    if val_fraction == 0 or len(names) <= 1:
        return dict.fromkeys(names, "train")
    positions = {name: _position(name) for name in names}
    drawn = sum(position < val_fraction for position in positions.values())
    wanted = max(1, round(val_fraction * len(names)))
    held_out = max(1, drawn)
    if len(names) < SMALL and abs(drawn - wanted) > max(1, wanted / 4):
        held_out = min(wanted, len(names) - 1)
    last = sorted(positions.values())[held_out - 1]
    log.info(
        "split drawn by name train=%d val=%d val_fraction=%s%s",
        *(len(names) - held_out, held_out, val_fraction),
        "" if held_out == max(1, drawn) else f" (corrected: names drew {drawn})",
    )
    return {name: "val" if position <= last else "train" for name, position in positions.items()}


def _position(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    raw = name.encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(raw, digest_size=6, person=b"split").digest()
    return int.from_bytes(digest) / 2**48


def list_tar(root: str, tar: str) -> Files:
    """Files of a tar on disk (seeking from header to header) or on S3 (reading it through).

    As unpacking leaves them: the last of two members of one name counts (``tar -r`` adds those),
    and a hard link is the file it links to. Symbolic links and sparse files are left out, with a
    warning. Raises ValueError for a tar that is cut short, or has data behind its end.
    """
    url = join(root, tar) if tar else root
    folder, name = folder_and_name(url)
    below = tar[: tar.rfind("/") + 1]
    found: Files = {}
    links = 0
    sparse = []
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
                    if info.issparse():  # its bytes do not lie in one piece
                        found.pop(path, None)
                        sparse.append(path)
                    elif info.isreg():
                        found[path] = TarMember(tar, info.offset_data, info.size, version)
                    elif info.islnk() and target in found:
                        found[path] = found[target]
                    elif info.islnk() or info.issym():
                        found.pop(path, None)
                        links += 1
                assert archive.fileobj is not None
                _refuse_data_behind(archive.fileobj, url)
        except tarfile.TarError as error:
            raise ValueError(one_line(f"{url} is not a complete tar: {error}")) from error
    if links:
        log.warning("links in a tar left out count=%d url=%s", links, url)
    if sparse:
        log.warning(
            "sparse files in a tar left out count=%d (%s) url=%s: write it without --sparse",
            *(len(sparse), one_line(", ".join(sparse[:5])), url),
        )
    clutter = Counter[str]()
    for path in [path for path in found if _hidden(path) or _clutter(path)]:
        # Only now: links may refer to them.
        del found[path]
        clutter.update([_clutter(path)] if _clutter(path) else [])
    _warn_of_clutter(clutter, url)
    return found


def _refuse_data_behind(rest: Any, url: str) -> None:
    """ValueError unless only zeros follow the end of a tar."""
    while chunk := rest.read(MIB):
        if chunk.count(0) != len(chunk):
            raise ValueError(
                one_line(
                    f"{url} has data behind its end, as tars joined by cat have, or tars with a "
                    "hole of zeros: give the parts as separate files, or fetch it again"
                )
            )


def _hidden(path: str) -> bool:
    return path.startswith(".") or "/." in path


def _clutter(path: str) -> str:
    """The folder of thumbnails or trash that a path is in; empty for any other path."""
    folders = path.split("/")[:-1]
    return next((folder for folder in folders if folder.lower() in CLUTTER), "")


def _warn_of_clutter(found: Counter[str], root: str) -> None:
    if found:
        log.warning(
            "folders of thumbnails and trash left out (%s) root=%s",
            *(one_line(", ".join(f"{name} {count}" for name, count in found.most_common())), root),
        )


def walk_files(root: str) -> Iterator[str]:
    """Paths of the files below a directory or an S3 prefix; folders of ``CLUTTER`` are left out."""
    store = open_store(root)
    folder = store.local_path()
    clutter = Counter[str]()
    if folder is None:
        for key in store.list_keys():
            if name := _clutter(key):
                clutter[name] += 1
            elif not _hidden(key):
                yield key
    elif not folder.is_dir():
        raise ValueError(f"folder {root} was not found: give a folder, a tar, or an s3:// prefix")
    else:
        yield from _walk(store.url, "", frozenset(), clutter)
    _warn_of_clutter(clutter, root)


def _walk(
    folder: str, below: str, above: frozenset[tuple[int, int]], clutter: Counter[str]
) -> Iterator[str]:
    """Paths of the files below ``folder``; links are followed, except back into a folder above.

    ``clutter`` counts the folders of thumbnails and trash that are left out.

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
            if entry.name.lower() in CLUTTER:
                clutter[entry.name] += 1
                continue
            yield from _walk(entry.path, f"{below}{entry.name}/", above | {identity}, clutter)
        elif _is(entry.is_file) or not _is(Path(entry.path).exists):  # neither pipe nor device
            yield below + entry.name


def _is(ask: Callable[[], bool]) -> bool:
    """False also for links in a circle, or into a folder without permission."""
    try:
        return ask()
    except OSError:
        return False
