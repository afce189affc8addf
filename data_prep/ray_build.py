"""Shards made on a Ray cluster.

Plain tasks rather than Ray Data: one task per shard ran as fast as the same work in plain processes
(0.99x; with HED on actors 0.91x), Ray Data at 0.37x (0.77x), and its block order and file names
are not reproducible.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import ray
from jaxtyping import UInt8
from ray.exceptions import RayActorError, RayError, RayTaskError, WorkerCrashedError

from cluster.storage import describe_error, join
from data_prep.manifest import ShardRecord
from data_prep.samples import ImageBatch, SampleSettings
from data_prep.shard_job import EdgeFinder, ReportShard, ShardJob, make_shard, peak_bytes
from data_prep.shards import ShardError

RETRIES = 5  # of a shard whose worker or node was lost; its own errors are final
CANCEL_S = 10  # until canceled workers have ended
REPORT_S = 1.0
AHEAD = 2  # shards queued beyond those that run, so that no CPU waits for the driver


class RayScheduler:
    """One task per shard, and actors that find edges; Ray must be initialized."""

    def gpus(self) -> int:
        return int(ray.cluster_resources().get("GPU", 0))

    def run_shards(
        self, jobs: Sequence[ShardJob], report: ReportShard
    ) -> Generator[ShardRecord, None, None]:
        """Make every shard, giving each record once it is finished; closing this cancels the rest.

        Raises ShardError for a shard whose worker died again and again, and its own errors.
        """
        if not jobs:
            return
        settings = jobs[0].settings
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        count: Any = ray.remote(num_cpus=0, max_restarts=-1)(CountActor).remote()
        actors = _edge_actors(settings, min(cpus, len(jobs)))
        # A shard's own work is small beside HED on a CPU, so the two share one.
        share = 0.5 if actors and settings.hed_device == "cpu" else 1
        options = {"num_cpus": share, "max_retries": RETRIES, "scheduling_strategy": "SPREAD"}
        make: Any = ray.remote(**options)(shard_task)
        waiting = deque(jobs)
        running: dict[Any, tuple[ShardJob, int]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < cpus + AHEAD:
                    job = waiting.popleft()
                    load = [number for _, number in running.values()]
                    least = min(range(len(actors) or 1), key=load.count)
                    running[make.remote(job, count, *actors[least : least + 1])] = job, least
                ready, _ = ray.wait(list(running), timeout=REPORT_S)
                _pass_on(count, {job.name for job, _ in running.values()}, report)
                for reference in ready:
                    job, _ = running.pop(reference)
                    yield _result(reference, job)
        finally:
            for reference in running:
                with contextlib.suppress(RayError):
                    ray.cancel(reference, force=True)
            if running:
                ended, _ = ray.wait(list(running), num_returns=len(running), timeout=CANCEL_S)
                for reference in ended:  # Ray prints errors that were not fetched, with tracebacks
                    with contextlib.suppress(RayError):
                        ray.get(reference)
            for actor in (count, *actors):
                ray.kill(actor)


def _pass_on(count: Any, running: set[str], report: ReportShard) -> None:
    """Report the images done of the running shards. A count that is late is left for later."""
    with contextlib.suppress(RayError):
        for shard, (done, failed) in ray.get(count.all.remote(), timeout=REPORT_S).items():
            if shard in running:
                report(shard, done, failed)


def _result(reference: Any, job: ShardJob) -> ShardRecord:
    try:
        record: ShardRecord = ray.get(reference)
    except WorkerCrashedError:
        raise ShardError(
            f"{join(job.url, job.name)}: its worker died {RETRIES + 1} times "
            "(out of memory? then set fewer CPUs, or smaller shards)"
        ) from None
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, OSError | ValueError):  # one line for the user; others are our bugs
            raise cause from None
        if isinstance(cause, RayActorError):
            raise ShardError(
                f"{join(job.url, job.name)}: the edge detector ended {RETRIES + 1} times; where a "
                "GPU is at fault, set sketch.hed_device=cpu"
            ) from None
        if missing := re.search(r"No module named '([\w.]+)'", str(error)):
            raise ShardError(
                f"a node of the Ray cluster has no Python package {missing[1]}: submit the job "
                "with --runtime-env ray_job.yaml, or install the project on every node"
            ) from None
        raise
    return record


def _edge_actors(settings: SampleSettings, wanted: int) -> list[Any]:
    """Actors that hold the network: one per GPU, or ``wanted`` on half a CPU each."""
    if settings.hed_sha256 is None:
        return []
    options: dict[str, Any] = {"num_cpus": 0.5}
    if settings.hed_device == "cuda":
        wanted = int(ray.cluster_resources()["GPU"])
        options = {"num_cpus": 0, "num_gpus": 1}
    options |= {
        "max_restarts": -1,
        "max_task_retries": RETRIES,
        "scheduling_strategy": "SPREAD",
    }
    actor: Any = ray.remote(**options)(EdgeActor)
    return [actor.remote(settings) for _ in range(wanted)]


def _gpu_is_lost(error: Exception) -> bool:
    """Whether a process that met ``error`` can no longer use its GPU; full memory passes."""
    torch = sys.modules["torch"]
    return isinstance(error, torch.AcceleratorError) and not isinstance(
        error, torch.OutOfMemoryError
    )


class EdgeActor(EdgeFinder):
    """An edge finder in a separate process."""

    def strokes(self, images: ImageBatch) -> UInt8[np.ndarray, "batch height width"]:
        try:
            return super().strokes(images)
        except Exception as error:
            if not _gpu_is_lost(error):
                raise
            # CUDA refuses every later call of this process. Ray starts another and asks it again.
            print(f"the edge detector starts again: {describe_error(error)}", file=sys.stderr)
            os._exit(1)

    def peak_bytes(self) -> int:
        return peak_bytes()


class CountActor:
    """Holds how many images of every shard are done."""

    def __init__(self) -> None:
        self._counts: dict[str, tuple[int, int]] = {}

    def set(self, shard: str, done: int, failed: int) -> None:
        self._counts[shard] = done, failed

    def all(self) -> dict[str, tuple[int, int]]:
        return self._counts


def shard_task(job: ShardJob, count: Any, actor: Any = None) -> ShardRecord:
    """``make_shard`` on a worker, with edges from ``actor`` where there are scenes.

    ``count`` gets the number of images done, every second.
    """
    last = time.monotonic()

    def report(shard: str, done: int, failed: int) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_S:
            last = time.monotonic()
            count.set.remote(shard, done, failed)

    def start_edges(images: ImageBatch) -> Callable[[], UInt8[np.ndarray, "batch height width"]]:
        reference = actor.strokes.remote(images)
        return lambda: np.asarray(ray.get(reference))

    def edges_peak_bytes() -> int:
        return int(ray.get(actor.peak_bytes.remote())) if actor else 0

    return make_shard(job, start_edges, edges_peak_bytes, report)
