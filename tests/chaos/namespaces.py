"""Two machines on one computer: network namespaces, with addresses of their own and a cable."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cluster.guard import guarded

ADDRESSES = ("10.213.7.1", "10.213.7.2")
CARD = "df0"  # the network card of each machine
PORT = 6379
RAY_ADDRESS = f"{ADDRESSES[0]}:{PORT}"
# Given, or Ray's node ends where its agents do not report theirs within seconds.
AGENT_PORTS = {
    "dashboard-agent-listen-port": 52365,
    "dashboard-agent-grpc-port": 52366,
    "runtime-env-agent-port": 52367,
    "metrics-export-port": 52368,
}
READY_S = 240.0  # for Ray, on a computer that may be busy
NAME = re.compile(r"deepfill-(\d+)-[ab]")
# Ray declares a silent node dead after some ten seconds, and not after a minute.
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_raylet_start_wait_time_s": "240",
    "GLOO_SOCKET_IFNAME": CARD,
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}


def why_not() -> str | None:
    """What keeps this computer from being two machines; None where nothing does."""
    if missing := [name for name in ("ip", "nsenter", "tc") if shutil.which(name) is None]:
        return f"{' and '.join(missing)} not found"
    try:
        _Cable().close()
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted: {error.stderr.strip()}"
    return None


class _Cable:
    """Two network namespaces with one card each. What a killed process left is removed first."""

    def __init__(self) -> None:
        for left in _namespaces():
            if not Path(f"/proc/{NAME.fullmatch(left)[1]}").exists():  # type: ignore[index]
                _remove(left)
        self.names = [f"deepfill-{os.getpid()}-{side}" for side in "ab"]
        try:
            for name in self.names:
                _run("ip", "netns", "add", name)
            first, second = self.names
            peer = ("peer", "name", CARD, "netns", second)
            _run("ip", "-n", first, "link", "add", CARD, "type", "veth", *peer)
            for name, address in zip(self.names, ADDRESSES, strict=True):
                _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", CARD)
                _run("ip", "-n", name, "link", "set", CARD, "up")
                _run("ip", "-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for name in self.names:
            _remove(name)


class Machines:
    """Two machines with one CPU each for Ray, whose head is on the first."""

    def __init__(self, log: Path) -> None:
        self._log, self._cable = log, _Cable()
        self._services = contextlib.ExitStack()
        self._temporary = Path(tempfile.mkdtemp(prefix="df-", dir="/tmp"))
        self._drivers: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start Ray on both."""
        head = ("--head", f"--port={PORT}", "--no-monitor")
        self._ray(0, *head, f"--temp-dir={self._temporary}")
        self.join()

    def join(self) -> None:
        """Start Ray on the second machine."""
        self._ray(1, f"--address={RAY_ADDRESS}", "--include-log-monitor=false")

    def _ray(self, machine: int, *options: str) -> None:
        log = self._log.with_name(f"ray-{machine}-{time.monotonic_ns()}")
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", *options]
        ray += ["--num-cpus=1", "--disable-usage-stats", "--object-store-memory=200000000"]
        ray += [f"--node-ip-address={ADDRESSES[machine]}"]
        ray += [f"--{option}={port}" for option, port in AGENT_PORTS.items()]
        process = self._services.enter_context(
            guarded(
                self._on(machine, ray),
                environment=os.environ | ENVIRONMENT | QUICK,
                log=log,
                folder=log.parent,
                grace_s=0,
                leftovers=[self._temporary],
            )
        )
        deadline = time.monotonic() + READY_S
        while "Ray runtime started" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Ray did not start: {log.read_text()[-2000:]}")
            time.sleep(0.1)

    def drive(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start ``command`` on the first machine, as a driver of its Ray; it prints to the log."""
        with self._log.open("ab") as log:
            driver = subprocess.Popen(
                self._on(0, command),
                env=os.environ | ENVIRONMENT | {"RAY_ADDRESS": RAY_ADDRESS},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._drivers.append(driver)
        return driver

    def _on(self, machine: int, command: Sequence[str]) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self._cable.names[machine]}", *command]

    def cut(self) -> None:
        """Pull the cable out of the second machine: the first one hears nothing any more."""
        _run("ip", "-n", self._cable.names[1], "link", "set", CARD, "down")

    def restart(self) -> None:
        """End everything on the second machine, plug the cable in, and start Ray again."""
        _end(self._cable.names[1])
        _run("ip", "-n", self._cable.names[1], "link", "set", CARD, "up")
        self.join()

    def slow_down(self, megabits_per_s: float) -> None:
        """A cable that carries so much in each direction."""
        for name in self._cable.names:
            limits = ("rate", f"{megabits_per_s}mbit", "burst", "128kb", "latency", "400ms")
            _run("tc", "-n", name, "qdisc", "replace", "dev", CARD, "root", "tbf", *limits)

    def close(self) -> None:
        """End every process on the machines, and take them away."""
        for driver in self._drivers:
            driver.kill()
            driver.wait()
        self._services.close()
        self._cable.close()
        shutil.rmtree(self._temporary, ignore_errors=True)


@contextlib.contextmanager
def two_machines(log: Path) -> Iterator[Machines]:
    """Machines with Ray, which end with the block, and with this process however that ends."""
    machines = Machines(log)
    try:
        machines.start()
        yield machines
    finally:
        machines.close()


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def _namespaces() -> list[str]:
    words = [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.strip()]
    return [word for word in words if NAME.fullmatch(word)]


def _remove(namespace: str) -> None:
    if namespace in _namespaces():
        _end(namespace)
        _run("ip", "netns", "del", namespace)


def _end(namespace: str) -> None:
    """Kill every process in a namespace."""
    deadline = time.monotonic() + 20
    while (pids := _run("ip", "netns", "pids", namespace).split()) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.1)
