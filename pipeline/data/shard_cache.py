"""Shards as memory maps: a dataset's own files, or checked copies of what is on S3."""

import contextlib
import hashlib
import logging
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from cluster.storage import MissingKeyError, StorageError, StorageRefusedError, Store, join
from cluster.storage.records import RecordError, read_insisting
from data_prep.shards import BLOCK, Dataset, RawSample, Shard, ShardError, read_samples

log = logging.getLogger(__name__)

CACHE_BYTES = 32 * 2**30
ABANDONED_S = 3600  # an incomplete copy without a write for this long is never completed
DOWNLOADS = 4  # shards at a time; a big one comes in parallel parts besides
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # before a shard is read again

_fetching_until: dict[int, float] = {}
"""By thread that fetches a shard: when ``away_s`` have passed, by ``time.monotonic``."""


def fetches_shards() -> bool:
    """Whether a shard is on its way to this process, and storage is not overdue."""
    now = time.monotonic()
    return any(now < until for until in list(_fetching_until.values()))


class OpenShard(NamedTuple):
    """A shard that is mapped into memory."""

    url: str
    samples: list[RawSample]
    """Their bytes are views of the mapped file."""


class ShardCache:
    """Opens shards of ``dataset`` ahead of their use, in background threads.

    Shards on this machine's disk are mapped in place: their size is checked, and
    ``dataset verify`` reads their bytes. Others are copied to the folder ``cache`` first and
    checked against their SHA-256. Copies are named by that SHA-256, so ranks, runs and datasets
    share them. Beyond ``cache_bytes`` the copies that were used longest ago are removed; a process
    that still reads one is not disturbed. What is left serves the next run.

    While storage is away, a copy is tried again for ``away_s``, after pauses that double.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        cache: Path | None = None,
        cache_bytes: int = CACHE_BYTES,
        away_s: float = 0,
    ) -> None:
        self._store, self._url = dataset.store, dataset.url
        default = Path(tempfile.gettempdir(), f"deepfill-shards-{os.getuid()}")
        self._cache, self._cache_bytes = cache or default, cache_bytes
        self._away_s, self._closed = away_s, threading.Event()
        self._openers = ThreadPoolExecutor(DOWNLOADS, "shard")
        self._opened: dict[str, Future[OpenShard]] = {}

    def open(self, shards: Iterable[Shard]) -> dict[str, Future[OpenShard]]:
        """Start to open ``shards``, in this order, and release all others; futures by shard name.

        A future raises ShardError for a damaged shard and StorageError where storage fails.
        """
        opened: dict[str, Future[OpenShard]] = {}
        for shard in shards:
            if shard.name not in opened:
                known = self._opened.get(shard.name)
                opened[shard.name] = known or self._openers.submit(self._open, shard)
        self._opened = opened
        return opened

    def file(self, shard: Shard) -> BinaryIO:
        """``shard`` as a local file, open for reading; a copy is fetched where there is none."""
        if self._store.local_path(shard.name) is not None:
            return self._store.open(shard.name)
        path = self._cache / f"{shard.sha256}.tar"
        try:
            os.utime(path)  # used now, so removed last
            return path.open("rb")
        except FileNotFoundError:
            with self._counted():
                return self._fetched(shard, path)

    def close(self) -> None:
        """End the threads; shards that wait to be opened are dropped."""
        self._closed.set()
        self._openers.shutdown(cancel_futures=True)
        self._opened = {}

    def _open(self, shard: Shard) -> OpenShard:
        url = join(self._url, shard.name)
        with self.file(shard) as file:
            size = os.fstat(file.fileno()).st_size
            if size != shard.bytes:
                raise ShardError(f"{url} has {size} bytes instead of {shard.bytes}")
            # The views in the samples keep the map alive, and nothing else does.
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        samples = list(read_samples(_Views(content), name=url))
        if len(samples) != shard.samples:
            raise ShardError(f"{url} has {len(samples)} samples instead of {shard.samples}")
        return OpenShard(url, samples)

    def _fetched(self, shard: Shard, path: Path) -> BinaryIO:
        """The copy of ``shard``, now at ``path``; while storage is away, that is tried again."""
        pause_s, give_up = FIRST_PAUSE_S, None
        while True:
            try:
                return self._fetched_now(shard, path)
            except StorageError as error:
                now = time.monotonic()
                give_up = give_up or now + self._away_s
                hopeless = isinstance(error, MissingKeyError | StorageRefusedError)
                if hopeless or now >= give_up:
                    raise
                log.warning(
                    "shard not read yet name=%s, next attempt in %.1f s, giving up in %.0f s: %s",
                    *(shard.name, pause_s, give_up - now, error),
                )
                if self._closed.wait(min(pause_s, give_up - now)):
                    raise
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Inside the block, ``fetches_shards`` counts this thread."""
        me = threading.get_ident()
        _fetching_until[me] = time.monotonic() + self._away_s
        try:
            yield
        finally:
            del _fetching_until[me]

    def _fetched_now(self, shard: Shard, path: Path) -> BinaryIO:
        url, started = join(self._url, shard.name), time.perf_counter()
        self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        arriving = path.with_suffix(f".{os.getpid()}")

        def fetch(store: Store) -> BinaryIO:
            store.download(shard.name, arriving)
            file = arriving.open("rb")
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                file.close()
                arriving.unlink()
                raise RecordError("SHA-256 differs")
            file.seek(0)
            return file

        try:
            file = read_insisting(self._store, fetch, key=shard.name)
        except RecordError as error:
            raise ShardError(f"{url} has other content than was written ({error})") from error
        arriving.replace(path)
        log.debug("shard fetched url=%s seconds=%.1f", url, time.perf_counter() - started)
        self._evict()
        return file

    def _evict(self) -> None:
        """Remove the copies that were used longest ago, beyond ``cache_bytes``."""
        copies = []
        for path in self._cache.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another rank was faster
                status = path.stat()
                if path.suffix == ".tar":
                    copies.append((status.st_mtime, status.st_size, path))
                elif time.time() - status.st_mtime > ABANDONED_S:
                    path.unlink()
        used = 0
        for _, size, path in sorted(copies, reverse=True):
            used += size
            if used > self._cache_bytes:
                path.unlink(missing_ok=True)


class _Views:
    """A file in memory whose reads are views of it: only the tar's headers are copied."""

    def __init__(self, content: memoryview) -> None:
        self._content, self._position = content, 0

    def read(self, size: int, /) -> bytes:
        piece = self._content[self._position : self._position + size]
        self._position += len(piece)
        return bytes(piece) if size == BLOCK else cast(bytes, piece)
