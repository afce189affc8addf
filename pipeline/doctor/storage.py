"""Probes of a storage: every operation through every client that the product uses."""

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from cluster.storage import MIB, StorageError, Store, describe_error, join, open_store
from pipeline.doctor.findings import Diagnosis, Probe, ok, problem, warning
from pipeline.tracking.artifacts import ArtifactFolder

PATIENCE_S = 60.0  # on a slow line the transfers take most of it
SKEW_S = 60.0
SLOW_MB_PER_S = 5.0
GIGABYTE = 10**9
RACERS = 8
SPEED_BYTES = 32 * MIB

CURES = {
    "accessdenied": "give these credentials s3:GetObject, PutObject, DeleteObject and ListBucket",
    "signature": "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID: correct the pair",
    "invalidaccesskey": "correct AWS_ACCESS_KEY_ID, or AWS_ENDPOINT_URL",
    "nosuchbucket": "create the bucket, or correct the URL",
    "slowdown": "try again later: the server is overloaded",
    "networkconnection": "check AWS_ENDPOINT_URL, and AWS_CA_BUNDLE where it is https",
    "invaliddigest": "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
    "notimplemented": "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
    "checksum": "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
}
"""What to do about words in errors of pyarrow and MLflow, which have no advice of ours.

Both write the codes of S3, one of them as NO_SUCH_BUCKET.
"""
SCRATCH_URL = r"s3://\S+/doctor-[0-9a-f]{12}(/\S+)?: "
CHUNKED = (b"x-amz-checksum", b"chunk-signature")
"""What a server that does not understand the newer checksums stores as content."""


class _Client(Protocol):
    """The operations that every S3 client has to manage below one URL."""

    def put(self, key: str, data: bytes) -> None: ...

    def put_in_parts(self, key: str, data: bytes) -> None: ...

    def get(self, key: str) -> bytes: ...

    def read_range(self, key: str, start: int, size: int) -> bytes: ...

    def list_keys(self, prefix: str = "") -> list[str]: ...

    def delete(self, key: str) -> None: ...


def storage_probes(url: str, *, needed_bytes: int = GIGABYTE) -> list[Probe]:
    """``needed_bytes``: what should be free on a disk, before a run begins."""
    subject = f"storage {url}"
    try:
        store = open_store(url)
    except StorageError as error:
        fault = cause_and_cure(error)
        return [Probe("storage", lambda: [problem("storage", *fault)])]
    if (root := store.local_path()) is not None:
        return [Probe(subject, lambda: _file_findings(root, needed_bytes), PATIENCE_S)]
    return [
        Probe("S3 settings", _settings_findings),
        *(
            Probe(f"{subject} by {client}", look, PATIENCE_S)
            for client, look in _s3_looks(url).items()
        ),
    ]


def cause_and_cure(
    error: Exception, otherwise: str = "see the log of the server"
) -> tuple[str, str]:
    """The halves of a message ``cause: cure``, as most errors have them; else ``otherwise``."""
    text = str(error)
    for at in reversed([found.start() for found in re.finditer(": ", text)]):
        cause, cure = text[:at], text[at + 2 :]
        if cure.count("(") == cure.count(")"):  # else the colon is within brackets
            return (cause, cure) if " " in cause else (text, otherwise)
    return text, otherwise


def _settings_findings() -> Iterator[Diagnosis]:
    from cluster.storage.s3_probes import credentials_source
    from cluster.storage.s3_settings import S3Settings

    subject, environment = "S3 settings", os.environ
    try:
        settings = S3Settings.resolve()
        source = credentials_source()
    except StorageError as error:
        yield problem(subject, *cause_and_cure(error))
        return
    mlflow = environment.get("MLFLOW_S3_ENDPOINT_URL", "").rstrip("/")
    if mlflow and not settings.endpoint:
        yield problem(
            subject,
            f"MLFLOW_S3_ENDPOINT_URL={mlflow} reaches MLflow alone: boto3 and pyarrow talk to "
            "Amazon's S3",
            f"set AWS_ENDPOINT_URL={mlflow}",
        )
    elif mlflow and mlflow != settings.endpoint:
        yield warning(
            subject,
            f"MLFLOW_S3_ENDPOINT_URL={mlflow} is another server than {settings.endpoint}, where "
            "all else goes",
            "unset MLFLOW_S3_ENDPOINT_URL, unless artifacts are kept there on purpose",
        )
    yield from _contradiction("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    yield from _contradiction("AWS_REGION", "AWS_DEFAULT_REGION")
    if settings.ca_bundle and not Path(settings.ca_bundle).is_file():
        yield problem(
            subject,
            f"AWS_CA_BUNDLE={settings.ca_bundle} was not found",
            "correct the path, on every node",
        )
    if source is None:
        yield problem(
            subject,
            "no credentials were found",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the "
            "instance a role",
        )
    yield ok(
        subject,
        f"endpoint {settings.endpoint or 'of AWS'}, region {settings.region or 'not set'}, "
        f"addressing {settings.addressing_style}, checksums {settings.request_checksums}, "
        f"credentials from {source or 'nowhere'}",
    )


def _contradiction(first: str, second: str) -> Iterator[Diagnosis]:
    values = [os.environ.get(name, "").rstrip("/") for name in (first, second)]
    if all(values) and values[0] != values[1]:
        yield warning(
            "S3 settings",
            f"{first}={values[0]} counts, and {second}={values[1]} does not",
            f"unset {second}",
        )


def _s3_looks(url: str) -> dict[str, Callable[[], Iterator[Diagnosis]]]:
    """How to look at the storage by each client; one that is out of reach is reported once."""
    from cluster.storage.s3_probes import PYARROW_PART, PyarrowProbe, boto3_probe, unreachable

    subject = f"storage {url}"

    @cache
    def away() -> str | None:
        try:
            return unreachable()
        except StorageError as error:
            return str(error)

    def by_boto3() -> Iterator[Diagnosis]:
        if (reason := away()) is not None:
            yield problem(subject, *cause_and_cure(ValueError(reason)))
            return
        with boto3_probe(_scratch(url)) as probe:
            about = f"{subject} by boto3"
            findings = list(_exercised(about, probe, 5 * MIB + 1000))
            yield from findings
            if all(finding.verdict == "ok" for finding in findings):
                yield from _clock(subject, probe.clock_ahead_s())
                yield from _race(subject, lambda: probe.winners("raced"))
                yield from _uploads(subject, probe.unfinished_uploads)
                yield from _speed(subject, lambda size: probe.megabytes_per_s("speed", size))

    def by_pyarrow() -> Iterator[Diagnosis]:
        if away() is None:
            scratch = _scratch(url)
            with boto3_probe(scratch):  # which removes the markers that pyarrow leaves
                about = f"{subject} by pyarrow"
                yield from _exercised(about, PyarrowProbe(scratch), PYARROW_PART + 1000)

    def by_mlflow() -> Iterator[Diagnosis]:
        if away() is None:
            scratch = _scratch(url)
            with boto3_probe(scratch):
                about = f"{subject} by MLflow"
                yield from _exercised(about, _MlflowClient(ArtifactFolder(scratch)), 9 * MIB)

    return {"boto3": by_boto3, "pyarrow": by_pyarrow, "MLflow": by_mlflow}


def _scratch(url: str) -> str:
    return join(url, f"doctor-{secrets.token_hex(6)}")


@dataclass(frozen=True)
class _MlflowClient:
    """MLflow's artifact client, which sends parts from 8 MiB by itself and reads no ranges."""

    folder: ArtifactFolder

    def put(self, key: str, data: bytes) -> None:
        self.folder.put(key, data)

    def put_in_parts(self, key: str, data: bytes) -> None:
        self.folder.put(key, data)

    def get(self, key: str) -> bytes:
        return self.folder.get(key)

    def read_range(self, key: str, start: int, size: int) -> bytes:
        return self.folder.get(key)[start : start + size]

    def list_keys(self, prefix: str = "") -> list[str]:
        return self.folder.list_keys("")

    def delete(self, key: str) -> None:
        self.folder.delete(key)


def _exercised(subject: str, client: _Client, part_bytes: int) -> Iterator[Diagnosis]:
    """Every operation of ``client``; one line where all work, else one for each that does not."""
    data, parts = os.urandom(1000), os.urandom(part_bytes)
    steps: dict[str, Callable[[], object]] = {
        "put": lambda: client.put("probe", data),
        "get": lambda: _same(client.get("probe"), data),
        "range": lambda: _same(client.read_range("probe", 100, 50), data[100:150]),
        "list": lambda: _listed(client.list_keys(), "probe"),
        "multipart": lambda: client.put_in_parts("parts", parts),
        "multipart get": lambda: _same(client.get("parts"), parts),
        "delete": lambda: _delete(client, ("probe", "parts")),
    }
    faults: dict[str, Diagnosis] = {}
    for name, step in steps.items():
        if "put" in faults or (name == "multipart get" and "multipart" in faults):
            continue
        try:
            step()
        except OSError as error:
            faults[name] = problem(subject, *_failed(name, error))
    cures: set[str] = set()
    for finding in faults.values():  # one cause spoils several operations, and is said once
        if finding.cure not in cures:
            yield finding
        cures.add(finding.cure)
    if not faults:
        yield ok(subject, "put, get, range, list, multipart and delete")


def _delete(client: _Client, keys: Sequence[str]) -> None:
    for key in keys:
        client.delete(key)
        if key in client.list_keys():
            raise OSError(f"{key} is still listed")


class _DifferentBytesError(OSError):
    pass


def _same(found: bytes, put: bytes) -> None:
    if found != put:
        raise _DifferentBytesError(
            "the checksum came back as content"
            if any(mark in found for mark in CHUNKED)
            else f"{len(found)} bytes came back that differ from the {len(put)} that were put"
        )


def _listed(keys: list[str], key: str) -> None:
    if key not in keys:
        raise OSError(f"what was put is not listed (the list has {len(keys)})")


def _failed(operation: str, error: OSError) -> tuple[str, str]:
    """Cause and cure where ``operation`` failed."""
    if isinstance(error, _DifferentBytesError):
        cure = "look for a faulty network, proxy or memory between here and the server"
        if "checksum" in str(error):
            cure = (
                "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required and "
                "AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"
            )
        return f"{operation}: {error}", cure
    if isinstance(error, StorageError):
        cause, cure = cause_and_cure(error)
        return f"{operation} failed: {re.sub(SCRATCH_URL, '', cause)}", cure
    text = describe_error(error).removeprefix("OSError: ").removeprefix("ArtifactError: ")
    plain = text.replace("_", "").lower()
    known = next((cure for word, cure in CURES.items() if word in plain), None)
    otherwise = "boto3's own lines may say more: this client reads the same settings"
    return f"{operation} failed: {text}", known or otherwise


def _clock(subject: str, ahead_s: float | None) -> Iterator[Diagnosis]:
    if ahead_s is None:
        return
    from cluster.storage.remedies import REFUSED_SKEW_S

    message = f"the clock of this machine is {ahead_s:+.0f} s off the server's"
    if abs(ahead_s) > REFUSED_SKEW_S:
        yield problem(subject, message, "set the clock right: S3 refuses requests 15 minutes off")
    elif abs(ahead_s) > SKEW_S:
        yield warning(subject, message, "set the clock right, by NTP for instance")
    else:
        yield ok(subject, message)


def _race(subject: str, winners: Callable[[], int]) -> Iterator[Diagnosis]:
    cure = (
        "nothing for training, whose lease is read again before every commit; rely on no other "
        "program that locks by If-None-Match there"
    )
    try:
        won = winners()
    except StorageError as error:
        yield warning(subject, f"conditional puts are refused ({describe_error(error)})", cure)
        return
    if won == 1:
        yield ok(subject, f"of {RACERS} conditional puts at once, one wins")
    else:
        yield warning(subject, f"{won} of {RACERS} conditional puts at once won, not one", cure)


def _uploads(subject: str, unfinished: Callable[[], int]) -> Iterator[Diagnosis]:
    try:
        unfinished()
    except StorageError as error:
        yield warning(
            subject,
            f"unfinished uploads cannot be listed ({describe_error(error)})",
            "let the bucket delete them: a lifecycle rule AbortIncompleteMultipartUpload of 7 days",
        )


def _speed(subject: str, measure: Callable[[int], tuple[float, float]]) -> Iterator[Diagnosis]:
    """Megabytes per second both ways; a slow line gets few bytes."""
    try:
        up, down = measure(2 * MIB)
        if min(up, down) > SLOW_MB_PER_S:
            up, down = measure(SPEED_BYTES)
    except StorageError as error:
        yield problem(subject, *_failed("transfer", error))
        return
    message = f"{up:.0f} MB/s up, {down:.0f} MB/s down"
    if min(up, down) < SLOW_MB_PER_S:
        yield warning(
            subject,
            f"{up:.1f} MB/s up, {down:.1f} MB/s down: a checkpoint of 136 MB takes "
            f"{136 / up:.0f} s",
            "train nearer to the storage, or raise train.save_every_steps",
        )
    else:
        yield ok(subject, message)


@contextlib.contextmanager
def scratch_store(url: str) -> Iterator[Store]:
    """A store in a new folder of the storage at ``url``, which is as before after the block."""
    scratch = _scratch(url)
    store = open_store(scratch)
    folder = store.local_path()
    if folder is None:
        from cluster.storage.s3_probes import boto3_probe

        with boto3_probe(scratch) as probe:
            yield probe
        return
    made = [path for path in folder.parents if not path.exists()]
    try:
        yield store
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _file_findings(root: Path, needed_bytes: int) -> Iterator[Diagnosis]:
    subject = f"storage {root}"
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    if not there.is_dir():
        yield problem(subject, f"{there} is a file", "give a folder")
        return
    with scratch_store(str(root)) as store:
        yield from _file_operations(subject, store)
    free = shutil.disk_usage(there).free
    message = f"{free / GIGABYTE:.1f} GB free"
    if free < needed_bytes:
        yield problem(
            subject,
            f"{message}, and {needed_bytes / GIGABYTE:.1f} GB are needed",
            "make room there, lower train.keep_checkpoints, or use another storage",
        )
    else:
        yield ok(subject, message)


def _file_operations(subject: str, store: Store) -> Iterator[Diagnosis]:
    folder = store.local_path()
    assert folder is not None
    data = os.urandom(SPEED_BYTES)
    try:
        store.put("probe", data[:1000])
        _same(store.get("probe"), data[:1000])
        _same(store.read_range("probe", 100, 50), data[100:150])
        _listed(store.list_keys(), "probe")
        written = time.time()
        store.put("speed", data)
        up_s = time.time() - written
        ahead_s = time.time() - (folder / "speed").stat().st_mtime
        read = time.perf_counter()
        with (folder / "speed").open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            _same(file.read(), data)
        down_s = time.perf_counter() - read
        won = _winners(folder / "raced")
        for key in ("probe", "speed", "raced"):
            store.delete(key)
    except OSError as error:
        yield problem(
            subject,
            describe_error(error),
            f"let this user write there (`ls -ld {folder.parent}`), or give another storage",
        )
        return
    yield ok(subject, "put, get, range, list and delete")
    if won != 1:
        yield warning(
            subject,
            f"{won} of {RACERS} programs that create one file at once succeeded, not one",
            "use a file system with exclusive creation for programs that lock by files",
        )
    if abs(ahead_s) > SKEW_S:  # of a file server
        yield from _clock(subject, ahead_s)
    megabytes = SPEED_BYTES / 1e6
    yield from _speed(subject, lambda _: (megabytes / up_s, megabytes / down_s))


def _winners(path: Path) -> int:
    def wins(_: int) -> bool:
        try:
            path.open("xb").close()
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(RACERS) as pool:
        return sum(pool.map(wins, range(RACERS)))
