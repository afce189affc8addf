"""A checkpoint from storage into a local folder: in parallel ranges, resumed, checked."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from cluster.storage import (
    MIB,
    REQUESTS,
    CorruptedTransferError,
    MissingKeyError,
    StorageError,
    Store,
    join,
    replacing,
)
from cluster.storage.records import RecordError, read_insisting
from pipeline.checkpoints.manifest import (
    MANIFEST,
    PULLED,
    CheckpointError,
    CheckpointManifest,
    StoredFile,
    parse_manifest,
)
from pipeline.checkpoints.store import CheckpointStore

WEIGHTS = "ema.safetensors"
PART = 8 * MIB
READERS = REQUESTS
AHEAD = 4  # parts beyond those on their way, held until those before them are hashed
PullProgress = Callable[[int, int], None]


def pull(
    checkpoints: CheckpointStore,
    step: int,
    to: Path,
    *,
    manifest: CheckpointManifest | None = None,
    weights_only: bool = False,
    overwrite: bool = False,
    advance: PullProgress = lambda done, total: None,
) -> list[Path]:
    """Copy ``step`` into the folder ``to``, each byte checked; returns its files, manifest last.

    ``to`` appears once it is whole. A pull that was cut short is resumed by repeating it, in the
    middle of a file. ``weights_only`` copies the averaged generator and the manifest. ``advance``
    gets the bytes that are there and those of all files. ``manifest`` is that of ``step``, where it
    was read already. Raises CheckpointError where ``to`` holds
    anything else, unless ``overwrite``.
    """
    manifest = manifest or checkpoints.manifest(step)
    wanted = dict(manifest.files)
    if weights_only:
        if WEIGHTS not in wanted:
            raise CheckpointError(f"step {step} has no {WEIGHTS}: it has {', '.join(wanted)}")
        wanted = {WEIGHTS: wanted[WEIGHTS]}
    before = _holds(to, manifest, overwrite)
    same = before is not None and before.data == manifest.data
    left = [name for name in wanted if not (same and _is_whole(to / name, wanted[name]))]
    paths = [to / name for name in (*wanted, MANIFEST)]
    if same and not left and (weights_only or not (to / PULLED).exists()):
        return paths
    # A fixed name beside the folder, so that the same command finds what is there already.
    digest = hashlib.sha256(manifest.data).hexdigest()[:12]
    work = to.absolute().parent / f".{to.absolute().name}.{digest}.unfinished"
    total = sum(file.bytes for file in wanted.values())
    there = total - sum(wanted[name].bytes for name in left)
    try:
        work.mkdir(parents=True, exist_ok=True)
        for name in left:
            _Fetch(checkpoints, step, name, wanted[name], work, there, total, advance).run()
            there += wanted[name].bytes
        _place(work, to, left, manifest, before=None if same else before, partial=weights_only)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{error.filename or work}: {error.strerror or error}") from error
    return paths


def _holds(to: Path, manifest: CheckpointManifest, overwrite: bool) -> CheckpointManifest | None:
    """The manifest in ``to``. Raises CheckpointError where ``to`` may not be written."""
    if to.exists() and not to.is_dir():
        raise CheckpointError(f"{to} is a file: give a folder")
    if not to.exists() or not any(to.iterdir()):
        return None
    found, holds = None, "other files"
    if (to / MANIFEST).exists():
        try:
            found = parse_manifest((to / MANIFEST).read_bytes())
            holds = f"step {found.step}" if found.step != manifest.step else "another run's step"
        except RecordError as error:
            holds = f"a damaged manifest ({error})"
    if found and found.data == manifest.data:
        return found
    if not overwrite:
        raise CheckpointError(
            f"{to} holds {holds}, and step {manifest.step} was asked for: "
            "give another folder, or --overwrite"
        )
    return found


def _place(
    work: Path,
    to: Path,
    names: list[str],
    manifest: CheckpointManifest,
    *,
    before: CheckpointManifest | None,
    partial: bool,
) -> None:
    """Move what is in ``work`` to ``to``, and remove what belongs to the checkpoint ``before``."""
    records = {MANIFEST: manifest.data}
    if partial:
        records = {PULLED: json.dumps({"files": names}).encode(), **records}
    for name, data in records.items():
        with replacing(work / name) as file:
            file.write(data)
    for path in work.iterdir():  # what a killed pull was just writing
        if path.name not in {*names, *records}:
            path.unlink()
    if to.is_dir() and not any(to.iterdir()):
        to.rmdir()
    if not to.exists():
        work.rename(to)
        return
    if not partial or before:
        (to / PULLED).unlink(missing_ok=True)
    if before or not (to / MANIFEST).exists() or (to / MANIFEST).read_bytes() != manifest.data:
        (to / MANIFEST).unlink(missing_ok=True)
        for name in before.files if before else ():
            (to / name).unlink(missing_ok=True)
    for name in (*names, *records):  # the manifest last
        (work / name).replace(to / name)
    work.rmdir()


def _is_whole(path: Path, file: StoredFile) -> bool:
    if not path.is_file() or path.stat().st_size != file.bytes:
        return False
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest() == file.sha256


class _Fetch:
    """One file of a checkpoint into ``work``, in parts that several threads fetch."""

    def __init__(
        self,
        checkpoints: CheckpointStore,
        step: int,
        name: str,
        file: StoredFile,
        work: Path,
        there: int,
        total: int,
        advance: PullProgress,
    ) -> None:
        self._store, self._key = checkpoints.store, checkpoints.key(step, name)
        self._url = join(checkpoints.url, self._key)
        self._file, self._path = file, work / name
        self._noted = work / f".parts-{name}"  # numbers of the parts that were written
        self._there, self._total, self._advance = there, total, advance
        self._noting = threading.Lock()

    def run(self) -> None:
        """Raises CheckpointError where every reading, each over new connections, differs."""
        if not self._noted.exists() and _is_whole(self._path, self._file):
            return
        try:
            read_insisting(self._store, self._read, key=self._key)
        except MissingKeyError as error:
            raise self._damaged("it is missing") from error
        except RecordError as error:
            raise self._damaged(str(error)) from error
        self._noted.unlink(missing_ok=True)

    def _read(self, store: Store) -> None:
        try:
            self._read_parts(store)
        except (RecordError, CorruptedTransferError):
            self._path.unlink(missing_ok=True)
            self._noted.unlink(missing_ok=True)
            raise

    def _read_parts(self, store: Store) -> None:
        size = self._file.bytes
        if (found := store.size(self._key)) != size:
            raise RecordError(f"{found} of {size} bytes")
        noted = self._noted.read_text().split() if self._noted.exists() else []
        done = {int(number) for number in noted if number.isdecimal()}
        target = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        sha256 = hashlib.sha256()
        parts = [(start, min(PART, size - start)) for start in range(0, size, PART)]

        def fetch(number: int) -> bytes:
            start, length = parts[number]
            data = store.read_range(self._key, start, length)
            if len(data) != length:
                raise RecordError(f"{len(data)} of {length} bytes from {start}")
            os.pwrite(target, data, start)
            with self._noting, self._noted.open("a") as file:
                file.write(f"{number}\n")
            return data

        try:
            os.ftruncate(target, size)
            self._noted.touch()
            with ThreadPoolExecutor(READERS) as pool:
                futures: dict[int, Future[bytes]] = {}
                try:
                    for number, (start, length) in enumerate(parts):
                        for ahead in range(number, min(number + READERS + AHEAD, len(parts))):
                            if ahead not in done and ahead not in futures:
                                futures[ahead] = pool.submit(fetch, ahead)
                        if number in futures:
                            sha256.update(futures.pop(number).result())
                            done.add(number)
                        else:
                            sha256.update(os.pread(target, length, start))
                        self._advance(self._there + start + length, self._total)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        finally:
            os.close(target)
        if sha256.hexdigest() != self._file.sha256:
            raise RecordError("its sha256 differs")

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._url} is damaged: {reason}; use another step")
