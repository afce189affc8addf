"""JSON records on storage that carry their digest and version, and reading that insists."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, overload

from cluster.storage.base import CorruptedTransferError, Store, join

log = logging.getLogger(__name__)

VERSION, DIGEST = "format_version", "record_sha256"
REREAD_PAUSES_S = (0.2, 1.0)  # before a damaged value is read again
MANY = 200  # keys from which importing pyarrow pays off
MANY_AT_ONCE = 32
T = TypeVar("T")


class RecordError(ValueError):
    """A record is damaged, or a value in it is of another kind; the message says which."""


class NewerReleaseError(RecordError):
    """A record is whole, and a newer release wrote it."""


def read_insisting(store: Store, read: Callable[[Store], T], *, key: str) -> T:
    """What ``read`` gives; where it finds damage, it is repeated over new connections.

    ``key`` is for the log. On a file system of this machine nothing is waited for between. Raises
    RecordError where every reading finds damage, and all else at once.
    """
    for pause_s in REREAD_PAUSES_S:
        try:
            return read(store)
        except NewerReleaseError:
            raise
        except (RecordError, CorruptedTransferError) as error:
            log.warning("reading again url=%s: %s", join(store.url, key), error)
            if store.local_path() is None:
                time.sleep(pause_s)
            store = store.reconnected()
    try:
        return read(store)
    except CorruptedTransferError as error:
        raise RecordError(str(error)) from error


def read_many(store: Store, keys: Sequence[str]) -> dict[str, bytes]:
    """The values at many keys of distant storage, as far as they were read without an error.

    By pyarrow, which takes a third of boto3's CPU time for a small object. Whoever calls this
    reads the others one by one, and learns then what is wrong with them.
    """
    if len(keys) < MANY or store.local_path() is not None:
        return {}
    filesystem, folder = store.pyarrow_filesystem()
    found: dict[str, bytes] = {}
    failed = threading.Event()

    def read(key: str) -> None:
        if failed.is_set():  # where storage is in trouble, each attempt may take a minute
            return
        try:
            with filesystem.open_input_stream(f"{folder}/{key}", buffer_size=0) as source:
                found[key] = source.read()
        except OSError:
            failed.set()

    with ThreadPoolExecutor(MANY_AT_ONCE) as pool:
        list(pool.map(read, keys))
    return found


def seal(record: Mapping[str, Any], *, version: int) -> bytes:
    """``record`` as JSON, with its version and the SHA-256 of its canonical JSON added."""
    sealed = {VERSION: version, **record}
    return _encoded({**sealed, DIGEST: _digest(sealed)})


def unseal(data: bytes, *, version: int) -> dict[str, Any]:
    """The record that ``seal`` wrote, or one from before records had a digest.

    Raises RecordError where a single bit differs, and NewerReleaseError above ``version``.
    """
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"it is not JSON: {error}" if data else "it is empty") from error
    if not isinstance(record, dict):
        raise RecordError(f"it holds a {type(record).__name__} instead of named values")
    if VERSION not in record and DIGEST not in record:
        return record
    digest = record.pop(DIGEST, None)
    # The digest does not see another spelling of an equal number, such as 1E-5; the bytes do.
    if digest != _digest(record) or data != _encoded({**record, DIGEST: digest}):
        raise RecordError("its own digest differs")
    found = record.pop(VERSION, None)
    if type(found) is not int:
        raise RecordError(f"its {VERSION} is {found!r}")
    if found > version:
        raise NewerReleaseError(
            f"it was written by a newer release ({VERSION} {found}, this one reads {version}): "
            "update this program"
        )
    return record


@overload
def typed(record: Mapping[str, Any], name: str, kind: type[T]) -> T: ...
@overload
def typed(record: Mapping[str, Any], name: str, kind: type[T], default: T) -> T: ...
def typed(record: Mapping[str, Any], name: str, kind: type[T], default: T | None = None) -> T:
    """The value under ``name``, of type ``kind``; without a ``default`` it has to be there.

    Raises RecordError. True and False are no numbers here.
    """
    if name not in record and default is not None:
        return default
    try:
        value = record[name]
    except KeyError:
        raise RecordError(f"{name} is missing") from None
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RecordError(f"{name} should be {_called(kind)}, not {str(value)[:40]!r}")
    return value


def _called(kind: type) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", dict: "named values"}
    return names.get(kind, f"a {kind.__name__}")


def _digest(record: Mapping[str, Any]) -> str:
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _encoded(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, indent=1).encode() + b"\n"
