"""Ray on the machine at hand: a head of our own for a while, and a driver's way into a cluster."""

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
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from cluster.guard import guarded

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

READY_S = 90
TOKEN = "auth_token"
# On Linux Ray replaces 127.0.0.1 by the machine's outward address, and leaves its neighbour alone.
LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
OBJECT_STORE_BYTES = 500_000_000  # we pass small values; Ray's default is a third of the memory
# Every listener of a head, by the option that sets its port: two heads on one machine share none.
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

    It lets in only those who have ``environment`` in theirs: that says where the token is kept.
    """

    address: str
    dashboard_url: str
    environment: Mapping[str, str]


@contextlib.contextmanager
def local_ray(
    folder: Path, *, environment: Mapping[str, str], cpus: int | None = None
) -> Iterator[RayHead]:
    """A Ray head on loopback that takes jobs, with its logs in ``folder`` afterwards.

    ``environment`` is added to what the head, its workers and its jobs inherit from us: this is
    how credentials reach a job, and runtime_env never holds them. The head and all that it started
    end with the block, and with this process however that ends. ``cpus`` is what Ray may hand out,
    by default what the machine has.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SessionError(f"another Ray head is running on {folder}: end it first") from None
        with _short_folder(folder) as session, contextlib.ExitStack() as stack:
            ports = _free_ports()
            token = {
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(_new_token(folder)),
                "RAY_AUTH_TOKEN": "",  # one in our environment would go before the file
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
def connect(*, cpus: int | None = None) -> Iterator[None]:
    """This process as a driver: of the cluster in RAY_ADDRESS, else of a Ray of its own.

    Inside a submitted job RAY_ADDRESS is set. A Ray of its own ends with the block.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address and not _answers(address):
        raise SessionError(
            f"no Ray cluster at RAY_ADDRESS={address}: start one, or unset RAY_ADDRESS"
        )
    own: dict[str, Any] = {
        "num_cpus": cpus,
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": True,  # Ray Train asks it whether its controller lives
        "_node_ip_address": LOOPBACK,
    }
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # It warns that new clusters ask for a token, which is as it should be.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    ray.init(address or "local", logging_level=logging.WARNING, **({} if address else own))
    try:
        yield
    finally:
        ray.shutdown()


def run_on_gpu(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What ``function`` returns, run on a GPU of the cluster that we are connected to.

    Here in this process where the cluster has no GPU, or where there is no cluster. Arguments and
    result travel, so they must be picklable.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or not ray.cluster_resources().get("GPU"):
        return function(*args, **kwargs)
    result: R = ray.get(ray.remote(num_gpus=1)(function).remote(*args, **kwargs))
    return result


def job_metadata() -> dict[str, str]:
    """What the Ray job of this process was submitted with; empty outside of a submitted job.

    ``job_submission_id`` is Ray's, ``git_commit`` comes from ``cluster.submit``.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return {}
    return dict(ray._private.worker.global_worker.core_worker.get_job_config().metadata)


def _answers(address: str) -> bool:
    """Whether somebody listens at ``host:port``; other forms of address are for Ray to judge.

    Ray itself tries for minutes before it says so.
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
    """What head and jobs see. Jobs say ``python``, and mean the one that runs us."""
    bin_folder = str(Path(sys.executable).parent)
    ours = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ours["PATH"] = os.pathsep.join([bin_folder, ours.get("PATH", os.defpath)])
    ours["RAY_USAGE_STATS_ENABLED"] = "0"
    ours["GLOO_SOCKET_IFNAME"] = "lo"  # ranks meet on loopback, where nobody else listens
    return ours | dict(environment)


@contextlib.contextmanager
def _short_folder(folder: Path) -> Iterator[Path]:
    """A folder for Ray's unix sockets, whose names have 107 bytes at most.

    It is the same for the same ``folder``, so what a machine that went down left behind is cleared
    away at the next start.
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
    """Ray listens on all interfaces whatever address it is given, so it asks for a token."""
    path = folder / TOKEN
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path


def _keep_logs(session: Path, folder: Path) -> None:
    shutil.rmtree(folder / "logs", ignore_errors=True)
    for logs in session.glob("session_*/logs"):
        if not logs.parent.is_symlink():  # session_latest
            shutil.copytree(logs, folder / "logs", dirs_exist_ok=True)


def _wait_for(url: str, process: subprocess.Popen[bytes], folder: Path) -> None:
    """Until ``url`` answers with success. Raises SessionError when the head has ended instead."""
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


def _free_ports() -> dict[str, int]:
    """A free port for every listener; all are held until all are known, so they differ."""
    with contextlib.ExitStack() as stack:
        ports = {}
        for option in PORTS:
            listener = stack.enter_context(socket.socket())
            listener.bind((LOOPBACK, 0))
            ports[option] = listener.getsockname()[1]
        return ports
