"""Ray sessions: a temporary local head, and a driver's connection to a cluster."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cluster.guard import guarded
from cluster.ports import LOOPBACK, free_ports
from cluster.private_file import write_private
from cluster.storage import describe_error, without_password

log = logging.getLogger(__name__)

R = TypeVar("R")

READY_S = 90
TOKEN = "auth_token"
OBJECT_STORE_BYTES = 500_000_000  # values passed are small; Ray's default is a third of the memory
# The option that sets the port of each listener of a head, so that two heads can share a machine.
PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "node-manager-port",
    "object-manager-port",
    "ray-client-server-port",
)


class SessionError(RuntimeError):
    """A Ray session could not be started or joined."""


@dataclass(frozen=True)
class RayHead:
    """A running head: ``address`` for drivers and nodes, ``dashboard_url`` for jobs.

    It accepts clients whose environment includes ``environment``, which names the token's file.
    """

    address: str
    dashboard_url: str
    environment: Mapping[str, str]


@contextlib.contextmanager
def local_ray(
    folder: Path, *, environment: Mapping[str, str], cpus: int | None = None
) -> Iterator[RayHead]:
    """A Ray head on loopback that takes jobs; afterwards its logs are in ``folder``.

    The head, its workers and its jobs inherit this process's environment plus ``environment``.
    Credentials reach a job in this way, never through runtime_env. The head and everything it
    started end with the block, and with this process however that ends. ``cpus`` is the number of
    CPUs that Ray schedules on, by default all. Raises SessionError if the head cannot be started.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SessionError(f"another Ray head is running on {folder}: end it first") from None
        with _short_folder(folder) as session, contextlib.ExitStack() as stack:
            ports = free_ports(PORTS)
            token = {
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(_new_token(folder)),
                "RAY_AUTH_TOKEN": "",  # a token in our environment would override the file
            }
            process = stack.enter_context(
                guarded(
                    _command(ports, session, cpus),
                    environment=_inherited(environment) | token,
                    log=folder / "ray.log",
                    folder=folder,
                    grace_s=10,
                    keep_open=[lock.fileno()],
                    leftovers=[session],
                )
            )
            stack.push(lambda *_: _keep_logs(session, folder))
            dashboard = f"http://{LOOPBACK}:{ports['dashboard-port']}"
            agent = f"http://{LOOPBACK}:{ports['dashboard-agent-listen-port']}"
            for address in (f"{dashboard}/api/version", f"{agent}/api/local_raylet_healthz"):
                _wait_for(address, process, folder)
            log.info("Ray ready dashboard=%s folder=%s", dashboard, folder)
            yield RayHead(f"{LOOPBACK}:{ports['port']}", dashboard, token)


@contextlib.contextmanager
def connect() -> Iterator[None]:
    """Connect this process to the cluster at RAY_ADDRESS, or else to a new local one.

    In a submitted job RAY_ADDRESS is set. A local cluster ends with the block and has all CPUs.
    Raises SessionError where RAY_ADDRESS does not answer, and where Ray does not start.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith(("http://", "https://")):
        raise SessionError(
            f"RAY_ADDRESS={without_password(address)} is a dashboard, which takes submitted jobs "
            "only: put `ray job submit --runtime-env ray_job.yaml --` before the command, or unset "
            "RAY_ADDRESS to run on this machine"
        )
    if address and not _answers(address):
        raise SessionError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: start one, or unset RAY_ADDRESS"
        )
    local: dict[str, Any] = {
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,  # ten processes with 1 GB, for a cluster nobody else joins
        "_node_ip_address": LOOPBACK,
    }
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Silences the warning that new clusters ask for a token.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    if threading.current_thread() is not threading.main_thread():
        # Silences the warning that Ray sets its handler of SIGTERM in the main thread only.
        logging.getLogger("ray._private.worker").setLevel(logging.ERROR)
    try:
        ray.init(address or "local", logging_level=logging.WARNING, **({} if address else local))
    except Exception as error:  # of Ray's many kinds, some of them plain Exception
        with contextlib.suppress(Exception):
            ray.shutdown()
        raise SessionError(_not_started(address, error)) from error
    try:
        yield
    finally:
        ray.shutdown()


def run_on_gpus(function: Callable[[int, int], R]) -> list[R]:
    """``function(share, shares)`` for every share, one on each GPU of the connected cluster.

    Where the cluster has no GPU, or without a connection, there is one share, in this process.
    """
    ray = sys.modules.get("ray")
    connected = ray is not None and ray.is_initialized()
    shares = int(ray.cluster_resources().get("GPU", 0)) if ray is not None and connected else 0
    if ray is None or not shares:
        return [function(0, 1)]
    remote = ray.remote(num_gpus=1)(function)
    results: list[R] = ray.get([remote.remote(share, shares) for share in range(shares)])
    return results


def job_metadata() -> dict[str, str]:
    """The metadata of the Ray job that this process belongs to; empty outside of a job.

    ``job_submission_id`` is set by Ray, ``git_commit`` by ``cluster.submit``.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return {}
    return dict(ray._private.worker.global_worker.core_worker.get_job_config().metadata)


def job_has_ended(submission_id: str) -> bool:
    """Whether the connected cluster knows this Ray job, and that it has ended."""
    import ray
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(ray.get_runtime_context().gcs_address)
        return bool(client.get_job_status(submission_id).is_terminal())
    except (RuntimeError, ConnectionError, OSError):  # an unknown job, or no dashboard
        return False


def _not_started(address: str | None, error: Exception) -> str:
    if address:
        token = (
            ""
            if os.environ.get("RAY_AUTH_MODE") == "token"
            else "; where the cluster asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        )
        return (
            f"joining the Ray cluster at RAY_ADDRESS={without_password(address)} failed: check "
            f"that it runs, with the versions of Ray and Python of this machine{token} "
            f"({describe_error(error)})"
        )
    return (
        "Ray did not start on this machine, which may be busy or short of memory: run fewer jobs "
        f"at once, free memory, or run the same command again ({describe_error(error)})"
    )


def package_url() -> str | None:
    """The package of files that Ray gave this process; None outside of a job with one."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    url: str | None = ray.get_runtime_context().runtime_env.get("working_dir")
    return url


def _answers(address: str) -> bool:
    """Whether a server listens at ``host:port``; other forms of address are left to Ray.

    Ray itself would try for minutes before it fails.
    """
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdigit():
        return True
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def _command(ports: Mapping[str, int], session: Path, cpus: int | None) -> list[str]:
    return [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        f"--node-ip-address={LOOPBACK}",
        f"--dashboard-host={LOOPBACK}",
        "--disable-usage-stats",
        f"--temp-dir={session}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        *(f"--{option}={port}" for option, port in ports.items()),
        *([] if cpus is None else [f"--num-cpus={cpus}"]),
    ]


def _inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of head and jobs, in which ``python`` is the interpreter of this process."""
    bin_folder = str(Path(sys.executable).parent)
    ours = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ours["PATH"] = os.pathsep.join([bin_folder, ours.get("PATH", os.defpath)])
    ours["RAY_USAGE_STATS_ENABLED"] = "0"
    ours["GLOO_SOCKET_IFNAME"] = "lo"  # ranks meet on loopback, out of reach for others
    return ours | dict(environment)


@contextlib.contextmanager
def _short_folder(folder: Path) -> Iterator[Path]:
    """A folder with a short path for Ray's Unix sockets, whose paths have at most 107 bytes.

    The same ``folder`` always gives the same one, so the next start removes what a crashed machine
    left behind.
    """
    name = hashlib.sha256(f"{os.getuid()} {folder}".encode()).hexdigest()[:12]
    short = Path("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir(), f"ray-{name}")
    shutil.rmtree(short, ignore_errors=True)
    short.mkdir(mode=0o700)
    try:
        yield short
    finally:
        shutil.rmtree(short, ignore_errors=True)


def _new_token(folder: Path) -> Path:
    """A new token in a private file, because Ray listens on all interfaces of the machine."""
    path = folder / TOKEN
    write_private(path, secrets.token_hex(32))
    return path


def _keep_logs(session: Path, folder: Path) -> None:
    shutil.rmtree(folder / "logs", ignore_errors=True)
    for logs in session.glob("session_*/logs"):
        if not logs.parent.is_symlink():  # session_latest
            shutil.copytree(logs, folder / "logs", dirs_exist_ok=True)


def _wait_for(url: str, process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait until ``url`` answers with success; SessionError after READY_S or the head's end."""
    token = (folder / TOKEN).read_text()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + READY_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                state = f"not ready after {READY_S} s" if process.poll() is None else "ended"
                raise SessionError(f"Ray {state} ({error}); see {folder / 'ray.log'}") from error
        time.sleep(0.2)
