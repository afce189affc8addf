"""Commands as Ray tasks: as many at a time as the cluster has room for."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.ray_train import Mailbox

POLL_S = 0.3
STOPPED = 3
"""Exit code of commands that were asked to end, and of tasks whose last commands were not run."""
LOST = 1
"""Exit code of a task whose machine or worker was lost."""
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""With this variable Ray gives a submitted job its files; commands of tasks need them as well."""


@dataclass(frozen=True)
class Room:
    """What one task takes of the cluster."""

    resource: Literal["CPU", "GPU"]
    """``GPU``: its own GPU. ``CPU``: its own core."""
    workers: int | Literal["auto"] = 0
    """Ranks of this resource that the commands start on the cluster themselves; 0: the task is the
    only one and takes the resource. ``auto``: all of them."""

    def fits(self) -> bool:
        """Whether the connected cluster, empty, has room for one task."""
        there = ray.cluster_resources().get(self.resource, 0)
        return self.workers == "auto" or there >= max(self.workers, 1)

    def at_once(self) -> int | None:
        """How many tasks the connected cluster has room for; None where Ray decides it."""
        if not self.workers:
            return None
        if self.workers == "auto":
            return 1
        there = int(ray.cluster_resources().get(self.resource, 0))
        return max(there // self.workers, 1)


def has_gpus() -> bool:
    """Whether the connected cluster has any GPU."""
    return bool(ray.cluster_resources().get("GPU"))


def run_commands(
    lists: Mapping[str, Sequence[Sequence[str]]],
    room: Room,
    *,
    owner: str,
    most: int | None = None,
    stop: Callable[[], bool],
    started: Callable[[str], None],
) -> dict[str, int]:
    """Run every list of commands as a Ray task; returns exit codes by name.

    The commands of a list run one after another, until one fails. A list is started when the
    cluster has room for it, ``most`` lists at a time at most. Where ``stop`` comes, no further list
    is started, and running commands get SIGTERM: lists that were not started have no exit code.
    ``owner`` names the mailbox. Needs a connected cluster.
    """
    mailbox = Mailbox(owner)
    mailbox.clear()
    limits = [limit for limit in (room.at_once(), most) if limit is not None]
    at_once = min(limits) if limits else len(lists)
    task = _task(room)
    environment = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address} if room.workers else {}
    if JOB_CONFIG in os.environ:
        environment[JOB_CONFIG] = os.environ[JOB_CONFIG]

    waiting = list(lists)
    running: dict[ray.ObjectRef, str] = {}
    codes: dict[str, int] = {}
    stopping = False
    while running or (waiting and not stopping):
        if stop() and not stopping:
            stopping = True
            mailbox.put("stop", "1")
        while waiting and len(running) < at_once and not stopping:
            name = waiting.pop(0)
            running[task.remote(name, lists[name], owner, environment)] = name
            started(name)
        ended, _ = ray.wait(list(running), timeout=POLL_S)
        for reference in ended:
            codes[running.pop(reference)] = _code(reference)
    return codes


def _task(room: Room) -> ray.remote_function.RemoteFunction:
    if room.workers:  # on this node, where paths mean what they mean here
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(_run)
    if room.resource == "GPU":
        return ray.remote(num_gpus=1, max_retries=0)(_run)
    return ray.remote(num_cpus=1, max_retries=0)(_run)


def _code(reference: ray.ObjectRef) -> int:
    try:
        return int(ray.get(reference))
    except ray.exceptions.RayError:
        return LOST


def _run(
    name: str, commands: Sequence[Sequence[str]], owner: str, environment: Mapping[str, str]
) -> int:
    mailbox = Mailbox(owner)
    for command in commands:
        if mailbox.get("stop") is not None:
            return STOPPED
        # In a separate session: the mailbox alone stops it.
        process = subprocess.Popen(
            command, env=os.environ | dict(environment), start_new_session=True
        )
        asked = False
        while process.poll() is None:
            if not asked and mailbox.get("stop") is not None:
                process.terminate()
                asked = True
            time.sleep(POLL_S)
        if process.returncode:
            return process.returncode
    return 0
