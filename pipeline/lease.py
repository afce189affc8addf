"""One trainer per run: a lease in the run's folder, renewed while the trainer lives."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from cluster.storage import MissingKeyError, StorageError, Store, join
from cluster.storage.records import RecordError, read_insisting, seal, unseal
from pipeline.checkpoints.manifest import CheckpointError

log = logging.getLogger(__name__)

LEASE = "lease.json"
FORMAT_VERSION = 1
RENEWAL_S = 5.0
TIME_TO_LIVE_S = 30.0
RELEASE_S = 5.0  # that the end of a run waits for the release
SETTLING_S = 0.5  # so that of two who write at once, one reads the other's


class RunTakenError(ValueError):
    """Another process trains this run, and is alive."""


class LeaseLostError(CheckpointError):
    """Another process has taken the run over; this one may commit nothing."""


@dataclass(frozen=True)
class Lease:
    """Who may commit to a run. What is on storage decides; this is a copy."""

    token: int
    """Larger than that of every holder before."""
    id: str
    host: str
    pid: int
    process: str
    """Identity of the process beyond its number: machine, boot, namespace, start."""
    job: str
    """Submission id of the Ray job, or empty."""
    since: str
    renewals: int = 0
    released: bool = False

    def __str__(self) -> str:
        job = f" of Ray job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


@dataclass
class HeldLease:
    """A lease of this process, or of the driver that started it. Picklable."""

    run: Store
    lease: Lease
    lost: bool = field(default=False)
    """Whether a renewal found another holder."""

    def check(self) -> None:
        """Raise LeaseLostError where storage names another holder. May raise StorageError."""
        found = _read_back(self.run)
        if found is None or found.id != self.lease.id:
            self.lost = True
            raise LeaseLostError(
                f"{self.run.url} was taken over by {found or 'nobody'}: this process ends without "
                "committing anything"
            )


@contextlib.contextmanager
def held(run: Store, *, job: str, job_has_ended: Callable[[str], bool]) -> Iterator[HeldLease]:
    """Hold the lease of ``run`` inside the block, and renew it.

    A holder that released it, whose process is gone from this machine, or whose Ray job has ended,
    is replaced at once. Any other is watched for ``TIME_TO_LIVE_S``. Raises RunTakenError where it
    renews its lease meanwhile.
    """
    lease = HeldLease(run, _acquired(run, job, job_has_ended))
    done = threading.Event()
    renewer = threading.Thread(target=_renew, args=(lease, done), name="lease", daemon=True)
    renewer.start()
    try:
        yield lease
    finally:
        done.set()
        # Storage that hangs keeps nobody from the end: the lease runs out by itself.
        releaser = threading.Thread(
            target=_release, args=(lease, renewer), name="lease-release", daemon=True
        )
        releaser.start()
        releaser.join(RELEASE_S)


def may_be_trained(run: Store, *, job_has_ended: Callable[[str], bool]) -> bool:
    """Whether a process trains ``run``, as far as its lease shows.

    False where the lease was released, or its holder is gone; True without a lease. Any other
    holder is watched for ``TIME_TO_LIVE_S``.
    """
    found = _read(run)
    if found is None:
        return True
    if _is_over(found, job_has_ended):
        return False
    try:
        _outwait(run, found)
    except RunTakenError:
        return True
    return False


def _acquired(run: Store, job: str, job_has_ended: Callable[[str], bool]) -> Lease:
    while True:
        before = _read(run)
        if before is not None and not _is_over(before, job_has_ended):
            _outwait(run, before)
        mine = Lease(
            token=before.token + 1 if before else 1,
            id=secrets.token_hex(8),
            host=socket.gethostname(),
            pid=os.getpid(),
            process=_process(os.getpid()) or "",
            job=job,
            since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        _write(run, mine)
        if before is not None:
            time.sleep(SETTLING_S)
        found = _read_back(run)
        if found is not None and found.id == mine.id:
            return mine


def _is_over(lease: Lease, job_has_ended: Callable[[str], bool]) -> bool:
    """Whether the holder is known to be gone."""
    if lease.released:
        return True
    if _machine() == lease.process.partition(" ")[0] and _process(lease.pid) != lease.process:
        log.info("taking over from %s: its process is gone", lease)
        return True
    if lease.job and job_has_ended(lease.job):
        log.info("taking over from %s: its job has ended", lease)
        return True
    return False


def _outwait(run: Store, before: Lease) -> None:
    """Return once the lease has run out. Raises RunTakenError where it is renewed."""
    log.warning("waiting up to %.0f s whether the run is alive: %s", TIME_TO_LIVE_S, before)
    until = time.monotonic() + TIME_TO_LIVE_S
    while time.monotonic() < until:
        time.sleep(min(1.0, TIME_TO_LIVE_S / 10))
        now = _read(run)
        if now is None or now.released:
            return
        if now != before:
            raise RunTakenError(
                f"{run.url} is being trained by {now}: stop it first, or train under another name"
            )


def _renew(held: HeldLease, done: threading.Event) -> None:
    renewals = 0
    while not done.wait(RENEWAL_S):
        renewals += 1
        try:
            held.check()
            _write(held.run, replace(held.lease, renewals=renewals))
        except LeaseLostError as error:
            log.error("%s", error)
            return
        except OSError as error:  # the lease may run out; a commit reads it again
            log.warning("lease not renewed: %s", error)


def _release(held: HeldLease, renewer: threading.Thread) -> None:
    renewer.join()  # what it has begun to write would come after
    with contextlib.suppress(OSError, LeaseLostError):
        held.check()
        _write(held.run, replace(held.lease, released=True))


def _read(run: Store) -> Lease | None:
    try:
        return _parsed(run)
    except MissingKeyError:
        return None
    except RecordError as error:
        log.warning("%s/%s is damaged and counts as missing: %s", run.url, LEASE, error)
        return None


def _read_back(run: Store) -> Lease | None:
    """What a living trainer finds. Raises StorageError where every reading finds damage: that says
    nothing about who has the run."""
    try:
        return _parsed(run)
    except MissingKeyError:
        return None
    except RecordError as error:
        raise StorageError(f"{join(run.url, LEASE)} cannot be read: {error}") from error


def _parsed(run: Store) -> Lease:
    """Raises MissingKeyError, and RecordError where every reading finds damage."""

    def parse(store: Store) -> Lease:
        try:
            return Lease(**unseal(store.get(LEASE), version=FORMAT_VERSION))
        except TypeError as error:
            raise RecordError(str(error)) from error

    return read_insisting(run, parse, key=LEASE)


def _write(run: Store, lease: Lease) -> None:
    run.put(LEASE, seal(asdict(lease), version=FORMAT_VERSION))


def _process(pid: int) -> str | None:
    """Which process ``pid`` is, over all machines and times; None where it does not exist."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()
    return None if state == "Z" else f"{_machine()} {rest[18]}"  # its start, in clock ticks


def _machine() -> str:
    """The machine since its boot, and the namespace in which its process numbers hold."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
