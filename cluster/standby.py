"""Processes that have imported what a rank needs, before a rank is lost."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import psutil  # type: ignore[import-untyped]
import ray
from ray.exceptions import RayError
from ray.train.v2._internal.execution.worker_group.worker import (
    ActorMetadata,
    RayTrainWorker,
    Worker,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

LEAST_MEMORY = 2 * 2**30  # bytes that a node has left
ASK_S = 2.0  # that a rank has to name its modules; else nothing stands by
START_S = 60.0  # in which a process has begun, or has no use
THREAD = "standby"

_enough = threading.Event()


class Standby:
    """Actors of Ray Train that wait on the nodes of ranks, one for each, to take a rank's place.

    They have imported what the ranks have. Ray counts no CPU for them: where one becomes a rank,
    it uses what that rank's place has reserved. GPUs are assigned when a process begins, so none
    can stand by for a rank on one.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, list[Any]] = {}

    def prepare(self, workers: Sequence[Worker], runtime_env: Mapping[str, Any]) -> None:
        """Start one for each of ``workers``, with their environment; hardly waits."""
        try:
            modules = ray.get(workers[0].execute_async(_imported), timeout=ASK_S)
        except RayError:
            return  # the rank is busy, or has just been lost
        actor = ray.remote(num_cpus=0, runtime_env=dict(runtime_env))(RayTrainWorker)
        for worker in workers:
            node = worker.metadata.node_id
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            waiting = actor.options(scheduling_strategy=there).remote()
            waiting.execute.remote(_import_beside, modules)
            self._waiting.setdefault(node, []).append(waiting)

    def take(self, nodes: Mapping[int, str]) -> dict[int, tuple[Any, ActorMetadata]]:
        """For as many places as possible, one that waits on the node of that place.

        One that has only just begun is further than a new process would be. It imports nothing
        more beside its rank: where two threads import modules that import each other, Python gives
        one of them a half of a module.
        """
        places = {
            place: self._waiting[node].pop()
            for place, node in nodes.items()
            if self._waiting.get(node)
        }
        for actor in places.values():
            actor.execute.remote(_stop_importing)  # an actor does one thing after the other
        answers = {place: actor.get_metadata.remote() for place, actor in places.items()}
        if answers:
            ray.wait(list(answers.values()), num_returns=len(answers), timeout=START_S)
        taken = {}
        for place, actor in places.items():
            try:
                taken[place] = actor, ray.get(answers[place], timeout=0)
            except RayError:
                ray.kill(actor)
        return taken

    def end(self) -> None:
        """End those that still wait."""
        for actors in self._waiting.values():
            for actor in actors:
                ray.kill(actor)
        self._waiting.clear()


def _imported() -> list[str]:
    """The modules of this process, in the order of their import."""
    return list(sys.modules)


def _import_beside(modules: Sequence[str]) -> None:
    """Import in a thread, so that the process answers; none stays where memory is short."""
    if psutil.virtual_memory().available < LEAST_MEMORY:
        ray.actor.exit_actor()
    threading.Thread(target=_import, args=(modules,), name=THREAD, daemon=True).start()


def _stop_importing() -> None:
    """Return once the thread that imports has ended, after the module that it is at."""
    _enough.set()
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join()


def _import(modules: Sequence[str]) -> None:
    for module in modules:
        if _enough.is_set():
            return
        # Some names are of objects that a package puts among the modules.
        with contextlib.suppress(Exception):
            importlib.import_module(module)
