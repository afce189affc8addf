"""Shards: which image goes into which, how a tar is written and read, and a finished dataset."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from cluster.storage import MIB, MissingKeyError, StorageError, Store, join, one_line, open_store
from cluster.storage.records import (
    NewerReleaseError,
    RecordError,
    read_insisting,
    typed,
    unseal,
)

FORMAT = 1  # part of every digest
FORMAT_VERSION = 2  # of dataset.json and parts/*.json; 1 had no digest
FIELDS = ("jpg", "sketch.png", "json")
KEY = re.compile(r"[A-Za-z0-9_+=/-]{1,89}")  # with its longest field a name fits a USTAR header
BLOCK = 512
END = bytes(2 * BLOCK)

Split = Literal["train", "val"]


class ShardError(ValueError):
    """A shard or dataset that is missing, damaged or of another kind; one line with its name."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))  # names in damaged headers may have newlines


@dataclass(frozen=True)
class RawSample:
    """The files of one image in the tar."""

    key: str
    jpg: bytes
    sketch: bytes
    """A PNG of one channel with the values 0 and 255."""
    meta: bytes
    """JSON: where the image came from and how its sketch was made."""


@dataclass(frozen=True)
class Shard:
    """One finished tar. A shard whose images all failed is a valid tar without samples."""

    name: str
    """File name below the URL of the dataset, ``demo-train-000000.tar``."""
    split: Split
    samples: int
    bytes: int
    sha256: str
    first_key: str
    last_key: str


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def plan(keys: Iterable[str], *, shard_samples: int, seed: int) -> list[list[str]]:
    """Deal keys to shards, each shard sorted; a function of the arguments alone, not their order.

    The hash of a key chooses its shard, so a shard mixes folders and classes, and an image that is
    added or removed changes one shard. The number of shards is a power of two: streams divide it,
    and it stays until the number of images has doubled. A shard holds between half of
    ``shard_samples`` and all of it, give or take its square root; none is empty.

    Raises ShardError for a key that cannot name a tar member, or that occurs twice.
    """
    salt = seed.to_bytes(8, "little", signed=True)
    hashed = [
        (int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8, key=salt).digest()), key)
        for key in sorted(keys)
    ]
    for (_, key), (_, following) in itertools.pairwise(hashed):
        if key == following:
            raise ShardError(f"two images have the key {key!r}: keys must be unique")
    for _, key in hashed:
        if not KEY.fullmatch(key):
            raise ShardError(f"key {key!r} cannot name a sample: it must match {KEY.pattern}")
    bits = max(0, (len(hashed) - 1) // shard_samples).bit_length()
    while True:
        shards: list[list[str]] = [[] for _ in range(1 << bits)]
        for number, key in hashed:
            shards[number >> (64 - bits)].append(key)
        if all(shards) or bits == 0:
            return shards if hashed else []
        bits -= 1


def shard_name(dataset: str, split: Split, number: int) -> str:
    return f"{dataset}-{split}-{number:06d}.tar"


def write_shard(path: Path, samples: Iterable[RawSample], *, split: Split, name: str) -> Shard:
    """Write one tar; equal samples give equal bytes (without times and owners)."""
    sha256 = hashlib.sha256()
    count, written = 0, 0
    first_key = last_key = ""
    with path.open("wb", buffering=MIB) as file:  # unbuffered, a full disk may truncate silently
        for sample in samples:
            if not KEY.fullmatch(sample.key):
                raise ShardError(f"{name}: key {sample.key!r} must match {KEY.pattern}")
            if count and sample.key <= last_key:
                raise ShardError(f"{name}: {sample.key} follows {last_key}: samples must be sorted")
            block = sample_block(sample)
            file.write(block)
            sha256.update(block)
            count, written = count + 1, written + len(block)
            first_key, last_key = first_key or sample.key, sample.key
        file.write(END)
        sha256.update(END)
    return Shard(
        name=name,
        split=split,
        samples=count,
        bytes=written + len(END),
        sha256=sha256.hexdigest(),
        first_key=first_key,
        last_key=last_key,
    )


def sample_block(sample: RawSample) -> bytes:
    """The three members of a sample with their USTAR headers, padded to whole blocks."""
    pieces = []
    contents = (sample.jpg, sample.sketch, sample.meta)
    for field, data in zip(FIELDS, contents, strict=True):
        pieces += [_header(f"{sample.key}.{field}", len(data)), data, bytes(-len(data) % BLOCK)]
    return b"".join(pieces)


# A USTAR header without name, size and checksum; mode 0444, owner 0, time 0.
_BEFORE_SIZE = b"0000444\0" + b"0000000\0" * 2
_AFTER_SIZE = b"\0" + b"00000000000\0"
_AFTER_CHECKSUM = (b"0" + bytes(100) + b"ustar\x0000").ljust(BLOCK - 156, b"\0")
# The checksum counts its own field as eight spaces.
_CONSTANT_SUM = sum(_BEFORE_SIZE) + sum(_AFTER_SIZE) + 8 * ord(" ") + sum(_AFTER_CHECKSUM)


def _header(name: str, size: int) -> bytes:
    encoded, digits = name.encode("ascii"), b"%011o" % size
    checksum = b"%06o\0 " % (_CONSTANT_SUM + sum(encoded) + sum(digits))
    return b"".join(
        (encoded.ljust(100, b"\0"), _BEFORE_SIZE, digits, _AFTER_SIZE, checksum, _AFTER_CHECKSUM)
    )


def read_samples(source: Readable | Path | bytes, *, name: str = "") -> Iterator[RawSample]:
    """Every sample of a shard, in order; reads any stream from front to back.

    ``name`` is for messages. Raises ShardError where the tar ends early or is of another kind.
    """
    if isinstance(source, Path):
        with source.open("rb", buffering=1 << 20) as file:
            yield from read_samples(file, name=name or str(source))
        return
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    name = name or str(getattr(source, "name", "the shard"))
    while (first := _member(stream, name)) is not None:
        key, _, field = first[0].partition(".")
        members = {field: first[1]}
        for _ in FIELDS[1:]:
            if (member := _member(stream, name)) is None:
                raise ShardError(f"{name}: {key} has {', '.join(members)} instead of all fields")
            other_key, _, field = member[0].partition(".")
            if other_key != key:
                raise ShardError(f"{name}: {member[0]} follows an incomplete {key}")
            members[field] = member[1]
        try:
            yield RawSample(key, *(members[field] for field in FIELDS))
        except KeyError as error:
            raise ShardError(f"{name}: {key} lacks its {error.args[0]}") from None


def _member(stream: Readable, name: str) -> tuple[str, bytes] | None:
    """The next member's name and data, or None at the end of the tar."""
    header = stream.read(BLOCK)
    if len(header) == BLOCK and header[0]:
        if header[257:262] != b"ustar" or header[156:157] != b"0":
            raise ShardError(f"{name} is not one of our shards: expected a plain USTAR file")
        try:
            size = int(b"0" + header[124:135], 8)  # the digit in front rules out a sign
        except ValueError:
            raise ShardError(f"{name} is damaged: a member's size is unreadable") from None
        member = header[:100].partition(b"\0")[0].decode("ascii", "replace")
        data = stream.read(size + -size % BLOCK)
        if len(data) == size + -size % BLOCK:
            return member, data[:size]
        raise ShardError(f"{name} is truncated: it ends inside {member}")
    if header + stream.read(BLOCK) == END:
        return None
    raise ShardError(f"{name} is truncated: the end of the tar is missing")


@dataclass(frozen=True)
class Dataset:
    """A finished dataset on storage, as its ``dataset.json`` describes it."""

    url: str
    name: str
    digest: str
    """SHA-256 over the settings that shape bytes and every shard's own SHA-256."""
    settings: dict[str, Any]
    counts: dict[str, Any]
    files: dict[str, dict[str, Any]]
    """Size and SHA-256 of the files beside the shards."""

    @classmethod
    def open(cls, url: str) -> Dataset:
        """Read ``dataset.json``; ShardError where it is missing, so that nothing is finished."""
        place = join(url, "dataset.json")
        try:
            record = read_insisting(
                open_store(url),
                lambda store: unseal(store.get("dataset.json"), version=FORMAT_VERSION),
                key="dataset.json",
            )
        except MissingKeyError:
            raise ShardError(
                f"{url} holds no finished dataset (dataset.json is missing): prepare it first"
            ) from None
        except NewerReleaseError as error:
            raise ShardError(f"{place}: {error}") from None
        except RecordError as error:
            raise ShardError(f"{place} is not one of our datasets, or damaged: {error}") from None
        found = record.get("format")
        if isinstance(found, int) and found > FORMAT:
            raise ShardError(f"{url} has dataset format {found}; this program reads {FORMAT}")
        try:
            return cls(
                url=url,
                name=typed(record, "name", str),
                digest=typed(record, "digest", str),
                settings=typed(record, "settings", dict),
                counts=typed(record, "counts", dict),
                files=typed(record, "files", dict),
            )
        except RecordError as error:
            raise ShardError(f"{place} is not one of our datasets, or damaged: {error}") from None

    @cached_property
    def store(self) -> Store:
        return open_store(self.url)

    @cached_property
    def index(self) -> list[Shard]:
        """Every shard of every split, ordered by name."""
        try:
            return read_insisting(self.store, self._read_index, key="index.json")
        except RecordError as error:
            place = join(self.url, "index.json")
            raise ShardError(f"{place} is not one of our indexes, or damaged: {error}") from None

    def _read_index(self, store: Store) -> list[Shard]:
        data = store.get("index.json")
        expected = self.files.get("index.json", {}).get("sha256")
        if expected and hashlib.sha256(data).hexdigest() != expected:
            raise RecordError("its sha256 differs from the one in dataset.json")
        try:
            entries = json.loads(data)["shardlist"]
            return [shard_from_index(entry) for entry in entries]
        except (ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{type(error).__name__}: {error}") from error

    def samples(self, split: Split) -> int:
        """How many samples ``split`` has."""
        return sum(shard.samples for shard in self.shards(split))

    def shards(self, split: Split) -> list[Shard]:
        return [shard for shard in self.index if shard.split == split]

    def read(self, shard: Shard) -> Iterator[RawSample]:
        """Every sample of one shard, straight from storage."""
        with contextlib.closing(self.store.open(shard.name)) as file:
            yield from read_samples(file, name=join(self.url, shard.name))


def index_entry(shard: Shard) -> dict[str, Any]:
    """The shard in the keys of wids, and ours.

    Without ``md5sum``: wids does not need it, and it took as long as writing the shard.
    """
    return {
        "url": shard.name,
        "nsamples": shard.samples,
        "filesize": shard.bytes,
        "sha256": shard.sha256,
        "split": shard.split,
        "first_key": shard.first_key,
        "last_key": shard.last_key,
    }


def shard_from_index(entry: dict[str, Any]) -> Shard:
    """Raises RecordError, which names a value that is missing or of another kind."""
    split = typed(entry, "split", str)
    if split not in ("train", "val"):
        raise RecordError(f"split should be train or val, not {split!r}")
    return Shard(
        name=typed(entry, "url", str),
        split="train" if split == "train" else "val",
        samples=typed(entry, "nsamples", int),
        bytes=typed(entry, "filesize", int),
        sha256=typed(entry, "sha256", str),
        first_key=typed(entry, "first_key", str),
        last_key=typed(entry, "last_key", str),
    )


def digest_of(shaping: dict[str, Any], shards: Sequence[Shard]) -> str:
    """SHA-256 of the content: the settings that shape bytes, and the hashes of the shards."""
    content = {
        "format": FORMAT,
        "settings": shaping,
        "shards": [[shard.name, shard.samples, shard.bytes, shard.sha256] for shard in shards],
    }
    return hashlib.sha256(canonical_json(content)).hexdigest()


def canonical_json(value: Any) -> bytes:
    """Compact, sorted, ASCII: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


@contextlib.contextmanager
def damage_as_shard_error() -> Iterator[None]:
    """Turn what values raise that ``Dataset.open`` does not check into ShardError."""
    try:
        yield
    except KeyError as error:
        raise ShardError(f"dataset.json is damaged: {error} is missing") from None
    except (TypeError, AttributeError) as error:
        raise ShardError(f"dataset.json is damaged: {error}") from None


@damage_as_shard_error()
def verify(
    dataset: Dataset, *, threads: int = 8, progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Read every byte again; one line per fault, naming the file.

    ``progress(bytes_done, all_bytes)`` is called after each file, from one thread. Raises
    ShardError where ``dataset.json`` lacks the values to compare with.
    """
    files = dict(dataset.files)
    index, faults = [], []
    try:
        index = dataset.index
    except (StorageError, ShardError) as error:
        faults.append(str(error))
        files.pop("index.json", None)  # one line is enough
    checks: list[tuple[int, Callable[[], list[str]]]] = [
        (entry["bytes"], _file_check(dataset, name, entry)) for name, entry in files.items()
    ]
    checks += [(shard.bytes, _shard_check(dataset, shard)) for shard in index]
    total, done = sum(size for size, _ in checks), 0
    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(lambda check: check[1](), checks)
        for (size, _), found in zip(checks, results, strict=True):
            faults += found
            done += size
            if progress:
                progress(done, total)
    shaping = dataset.settings["shaping"]
    if not faults and digest_of(shaping, index) != dataset.digest:
        faults.append("dataset.json: the digest is not that of the settings and shards listed")
    return faults


def _file_check(dataset: Dataset, name: str, entry: dict[str, Any]) -> Callable[[], list[str]]:
    def fault(store: Store) -> str | None:
        data = store.get(name)
        if len(data) != entry["bytes"]:
            return f"{name} has {len(data)} bytes instead of {entry['bytes']}"
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            return f"{name} has other content than was written (SHA-256 differs)"
        return None

    return lambda: _insisted(dataset, name, fault)


def _shard_check(dataset: Dataset, shard: Shard) -> Callable[[], list[str]]:
    def fault(store: Store) -> str | None:
        with contextlib.closing(store.open(shard.name)) as file:
            hashing = _Hashing(file, at_most=shard.bytes)
            keys = [sample.key for sample in read_samples(hashing, name=shard.name)]
            while hashing.read(1 << 20):
                pass
        if hashing.count != shard.bytes:
            return f"{shard.name} has {hashing.count} bytes instead of {shard.bytes}"
        if hashing.sha256.hexdigest() != shard.sha256:
            return f"{shard.name} has other content than was written (SHA-256 differs)"
        if len(keys) != shard.samples:
            return f"{shard.name} has {len(keys)} samples instead of {shard.samples}"
        return None

    return lambda: _insisted(dataset, shard.name, fault)


def _insisted(dataset: Dataset, name: str, fault: Callable[[Store], str | None]) -> list[str]:
    """The fault of one file, where every reading of it finds one."""

    def read(store: Store) -> None:
        try:
            found = fault(store)
        except ShardError as error:
            found = str(error)
        if found:
            raise RecordError(found)

    try:
        read_insisting(dataset.store, read, key=name)
    except (StorageError, RecordError) as error:
        return [str(error)]
    return []


class _Hashing:
    """A stream that computes the hash and the number of the bytes read through it.

    One read returns ``at_most`` of them, since a damaged header may ask for more than the memory.
    """

    def __init__(self, source: BinaryIO, *, at_most: int) -> None:
        self._source, self._at_most = source, at_most
        self.sha256, self.count = hashlib.sha256(), 0

    def read(self, size: int, /) -> bytes:
        data = self._source.read(min(size, self._at_most))
        self.sha256.update(data)
        self.count += len(data)
        return data
