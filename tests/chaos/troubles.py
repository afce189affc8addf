"""What goes wrong in a scenario: each begins with its block and is over after it."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import psutil  # type: ignore[import-untyped]
from botocore import auth

from cluster.services import S3Server, start_s3
from tests.chaos.outcome import CONTINUED
from tests.chaos.quick import quick
from tests.chaos.works import WORKS, Place
from tests.cluster.storage.faulty_s3 import FaultyS3

BUCKET = "chaos"
SECOND_KEY, SECOND_SECRET = "RENEWEDKEY0123456789", "renewed-secret-0123456789"
KILLED_WITHIN_S = 300  # the first one imports everything


class RestartableServer:
    """An S3 server that is killed and started again on the same data."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, ExitStack()
        self.running = self.start()

    def start(self) -> S3Server:
        started = self._stack.enter_context(
            start_s3(self._folder, access_key="FIRSTKEY0123456789AB", secret_key="first-secret")
        )
        started.make_bucket(BUCKET)
        self.running = started
        return started

    def kill(self) -> None:
        """kill -9 of the server and of the process that guards it."""
        guard = psutil.Process(self.running.pid)
        for process in [*guard.children(recursive=True), guard]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._stack.close()

    def close(self) -> None:
        self._stack.close()


@contextlib.contextmanager
def spoilt(kind: str, place: Place, proxy: FaultyS3) -> Iterator[None]:
    """Some of the next requests, of any kind or of one, get the fault ``kind``."""
    rng, name = place.rng, place.url.rpartition("/")[2]
    if kind == "away":
        proxy.away = True
    elif kind == "late listing":
        proxy.fault(kind, "GET", "list-type=2", rng.randint(1, 6))
    else:
        proxy.fault("nothing", "", name, rng.randint(0, 12))
        method = rng.choice(["", "", "GET", "PUT", "DELETE"])
        long = rng.random() < 0.3  # longer than any number of attempts
        times = rng.randint(1, 2) if kind == "hang" else 500 if long else rng.randint(1, 9)
        proxy.fault(kind, method, name, times)
    yield


@contextlib.contextmanager
def server_killed(place: Place, proxy: FaultyS3, server: RestartableServer) -> Iterator[None]:
    """The server dies at one of the next requests or writes, and is started again."""
    any_request = place.rng.random() < 0.5
    left, lock, restarts = place.rng.randint(1, 6), threading.Lock(), list[threading.Thread]()

    def restart() -> None:
        proxy.server_url = server.start().url

    def before(method: str, path: str) -> None:
        nonlocal left
        with lock:
            left -= any_request or method in ("PUT", "POST", "DELETE")
            if left or restarts:
                return
            server.kill()
            restarts.append(threading.Thread(target=restart))
            restarts[0].start()

    proxy.before = before
    try:
        yield
    finally:
        proxy.before = lambda method, path: None
        for thread in restarts:
            thread.join()


@contextlib.contextmanager
def disk_full(place: Place) -> Iterator[None]:
    """No file here can grow beyond some size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (place.rng.randrange(30_000), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def clock_skewed(place: Place) -> Iterator[None]:
    """The clock of this machine is hours off at some of the next requests."""
    right = vars(auth)["get_current_datetime"]
    hours, left = place.rng.choice([-3, 2]), itertools.count(place.rng.randint(1, 30), -1)

    def skewed(*arguments: Any, **options: Any) -> Any:
        now = right(*arguments, **options)
        return now + timedelta(hours=hours) if next(left) > 0 else now

    with mock.patch.object(auth, "get_current_datetime", skewed):
        yield


@contextlib.contextmanager
def credentials_expire(
    place: Place, proxy: FaultyS3, environment: Mapping[str, str]
) -> Iterator[None]:
    """The keys in the file of credentials expire; after some refusals it holds new ones."""
    file, left = place.folder / "credentials", itertools.count(place.rng.randint(1, 9), -1)

    def write(key: str, secret: str) -> None:
        text = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
        new = file.with_suffix(".new")
        new.write_text(text)
        new.replace(file)

    def renew() -> None:
        if next(left) == 0:
            write(SECOND_KEY, SECOND_SECRET)

    key, secret = environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]
    write(key, secret)
    without = {
        name: value
        for name, value in os.environ.items()
        if name not in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    }
    with mock.patch.dict(
        "os.environ", without | {"AWS_SHARED_CREDENTIALS_FILE": str(file)}, clear=True
    ):
        proxy.refused_key, proxy.on_refusal = key, renew
        yield
        write(SECOND_KEY, SECOND_SECRET)


def kill_writer(work: str, place: Place, seed: int, proxy: FaultyS3 | None) -> str:
    """Run ``work`` in another process and kill -9 it at one of its writes; how that ended.

    On S3 that is before a request, or before its answer; on a disk before any change to it.
    """
    boundary = place.rng.randint(1, 100 if work == "write dataset" else 25)
    spawning = multiprocessing.get_context("forkserver")
    spawning.set_forkserver_preload([__name__])
    own = boundary if proxy is None else 0
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    writer = spawning.Process(target=_write, args=(work, place, seed, own, aws))
    left, lock = boundary, threading.Lock()

    def at_write(method: str, path: str) -> None:
        nonlocal left
        with lock:
            left -= method in ("PUT", "POST", "DELETE")
            if left == 0:
                writer.kill()

    writer.start()
    if proxy is not None:
        proxy.before = proxy.after = at_write
    writer.join(KILLED_WITHIN_S)
    assert writer.exitcode is not None, "the writer hangs"
    return f"killed at write {boundary}" if writer.exitcode == -signal.SIGKILL else CONTINUED


def _write(work: str, place: Place, seed: int, boundary: int, aws: Mapping[str, str]) -> None:
    acting = WORKS[work](place)
    changes = itertools.count(1)
    kinds = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}

    def at_change(event: str, arguments: tuple[Any, ...]) -> None:
        wants = event in kinds or (event == "open" and _writes(arguments))
        if wants and next(changes) == boundary:
            os.kill(os.getpid(), signal.SIGKILL)

    with quick(aws):
        if boundary:
            sys.addaudithook(at_change)
        with contextlib.redirect_stderr(None), contextlib.suppress(OSError, RuntimeError):
            acting.run()


def _writes(arguments: tuple[Any, ...]) -> bool:
    """Whether the arguments of an audited ``open`` ask to write a file on a disk."""
    path, _, flags = arguments
    asked = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    return bool(asked) and not str(path).startswith("/dev")
