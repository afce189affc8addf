"""Ranks under Ray Train: room for them first, machines are retried, mistakes are not."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import ray
from ray.autoscaler import sdk as autoscaler
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.experimental import internal_kv as kv
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import (
    ENABLE_NCCL_HANG_DETECTOR_ENV_VAR,
    NCCL_RAS_ACTION_ENV_VAR,
    NCCL_RAS_ACTION_OBSERVE,
    NCCL_RAS_CONFIRM_DURATION_S_ENV_VAR,
    get_env_vars_to_propagate,
)
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group import (
    Worker,
    WorkerGroup,
    WorkerGroupPollStatus,
    WorkerGroupState,
)
from ray.train.v2.api.exceptions import WorkerGroupError
from ray.util.placement_group import PlacementGroup, placement_group_table

from cluster.standby import Standby
from cluster.storage import join, pyarrow_filesystem

Resource = Literal["GPU", "CPU"]

BUSY_S = 15.0  # what ended a moment ago may still hold its place
CONTROLLER_FAILURES = 3  # Ray Train's default is to try without end
RESIZE_S = 30.0  # between two looks whether more ranks would fit
PLACE_S = 20.0  # in which Ray finds a place where it has one; it notices a lost node after 15 s
REPLACEMENT_S = 60.0  # a node that is lost may have a successor
REST_S = 60.0  # after a restart, before processes stand by for the next one
POLL_S = 0.5  # between two looks at the ranks; Ray Train's default is 2
FINISH_S = 20.0  # that the first rank has for a save under way, where others are lost

_leaving = threading.Event()


class RoomError(RuntimeError):
    """The cluster has less room than training asks for."""


@dataclass(frozen=True)
class Workers:
    """How many ranks, and what each of them takes one of."""

    count: int
    resource: Resource
    between: tuple[int, int] | None = None
    """How few and how many they may become, as nodes go and come; None: always ``count``."""


def find_room(
    wanted: int | tuple[int, int] | Literal["auto"],
    resource: Resource | None,
    *,
    most: int,
    wait_s: float,
    waiting: Callable[[str], None],
    interrupted: Callable[[], bool],
) -> Workers | None:
    """The ranks that fit the connected cluster now; each takes one ``resource``.

    Without a ``resource``: a GPU where the cluster has some, else a CPU. ``auto`` is one rank for
    each that exists, and ``most`` at most; of a pair, the first has to fit. A cluster that is too
    small has ``wait_s`` to grow, and one that is busy at least ``BUSY_S`` to become free;
    ``waiting`` gets one line about it. Raises RoomError afterwards. None where ``interrupted`` came
    first.
    """
    started, reported = time.monotonic(), False
    while True:
        kind, there = _existing(resource)
        unused = int(ray.available_resources().get(kind, 0))
        count, hoped = _asked_for(wanted, there, most)
        if count <= unused:
            if not isinstance(wanted, tuple):
                return Workers(count, kind)
            return Workers(min(unused, hoped), kind, between=wanted)
        asked = _shortage(count, kind, there) + (f", {unused} of them free" if there else "")
        patience_s = max(wait_s, BUSY_S) if count <= there else wait_s
        if time.monotonic() - started >= patience_s:
            raise RoomError(asked)
        if interrupted():
            return None
        if not reported:
            waiting(f"{asked}: waiting for up to {patience_s:.0f} s")
            reported = True
            autoscaler.request_resources(bundles=[{kind: 1}] * hoped)
        time.sleep(0.5)


def refuse_more_than_exist(
    wanted: int | tuple[int, int] | Literal["auto"], resource: Resource | None, *, most: int
) -> None:
    """Raise RoomError where the connected cluster, as it is, could never hold ``wanted`` ranks."""
    kind, there = _existing(resource)
    count, _ = _asked_for(wanted, there, most)
    if count > there:
        raise RoomError(_shortage(count, kind, there))


def _existing(resource: Resource | None) -> tuple[Resource, int]:
    """What each rank takes one of, and how many of it the connected cluster has."""
    exists = ray.cluster_resources()
    kind: Resource = resource or ("GPU" if exists.get("GPU") else "CPU")
    return kind, int(exists.get(kind, 0))


def _asked_for(
    wanted: int | tuple[int, int] | Literal["auto"], there: int, most: int
) -> tuple[int, int]:
    """The fewest ranks that will do, and how many are hoped for."""
    if isinstance(wanted, tuple):
        return wanted
    count = max(min(there, most), 1) if wanted == "auto" else wanted
    return count, count


def _shortage(count: int, kind: Resource, there: int) -> str:
    return f"{count} rank{'s' * (count > 1)} need one {kind} each, and the cluster has {there}"


def run_workers(
    function: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    workers: Workers,
    *,
    mailbox: Mailbox,
    storage_url: str,
    max_failures: int,
    wait_s: float,
    timeout_s: float,
    hang_s: float,
    mistakes: tuple[type[BaseException], ...],
    check: Callable[[], None],
    finish: Callable[[], None],
    given_up: Callable[[], bool] = lambda: False,
) -> None:
    """Run ``function(config)`` on every rank of a process group, until all ranks have returned.

    Before they form the group, each of them calls ``check``, which may raise one of ``mistakes``.
    Where other ranks were lost, the first one calls ``finish`` before it is ended.

    Ranks that are lost start again together; so does whatever fails with an exception that is none
    of ``mistakes``. That happens ``max_failures`` times without a new safe step in ``mailbox``.
    One of ``mistakes`` ends all ranks at once. Where the number of ranks may change, they are asked
    to save before a change, see ``is_leaving``, and wait ``wait_s`` for nodes where too few are
    left. While ranks train on CPUs, as many processes stand by for lost ones. Collectives fail
    after ``timeout_s``; NCCL's detector reports them after half of ``hang_s``. Once ``given_up``
    says so, all ranks are killed; their places are free when this process ends. Raises WorkersError
    with the line of the first rank that failed, or where Ray Train's controller is lost, and
    RoomError where the ranks have no place.
    """
    # Paths in recipes are relative to this folder: workers have to stay in it.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    filesystem, path = pyarrow_filesystem(join(storage_url))
    on_gpus = workers.resource == "GPU"
    if on_gpus:
        _watch_nccl(hang_s / 2)

    def run() -> None:
        function(config)

    torch_config = _Torch(backend="nccl" if on_gpus else "gloo", timeout_s=int(timeout_s))
    torch_config.check = check
    trainer = _Trainer(
        run,  # a train_loop_config would be shown by Ray's dashboard, passwords in it included
        scaling_config=ScalingConfig(
            num_workers=workers.between or workers.count,
            use_gpu=on_gpus,
            elastic_resize_monitor_interval_s=RESIZE_S,
        ),
        torch_config=torch_config,
        run_config=RunConfig(
            # A new name each time: the state is in our checkpoints, so Ray resumes nothing.
            name=time.strftime("%Y%m%d-%H%M%S", time.gmtime()),
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(
                max_failures=max_failures, controller_failure_limit=CONTROLLER_FAILURES
            ),
        ),
    )
    trainer.mistakes, trainer.mailbox, trainer.wait_s = mistakes, mailbox, wait_s
    trainer.finish, trainer.given_up = finish, given_up
    try:
        trainer.fit()
    except TrainingFailedError as error:
        cause = getattr(error, "controller_failure", None)
        if isinstance(cause, WorkerGroupStartupTimeoutError):
            cause = RoomError(f"{cause.num_workers} ranks have no place any more, nodes are gone")
        if isinstance(cause, RoomError):
            raise cause from error
        raise WorkersError(_reason(error, mistakes)) from error
    except (RayActorError, OutOfMemoryError) as error:
        raise WorkersError(
            f"Ray Train's controller was lost: run the same command to resume ({_last_line(error)})"
        ) from error


def _watch_nccl(after_s: float) -> None:
    """Have Ray Train report the collectives in which ranks on GPUs stand for ``after_s``.

    It only logs: the ranks end by their own watch, and Ray Train would leave a group in order that
    hangs. It asks `ncclras`, which pip's NCCL lacks, and would warn of that in every run.
    """
    if shutil.which("ncclras") is None:
        return
    os.environ.setdefault(ENABLE_NCCL_HANG_DETECTOR_ENV_VAR, "1")
    os.environ.setdefault(NCCL_RAS_ACTION_ENV_VAR, NCCL_RAS_ACTION_OBSERVE)
    os.environ.setdefault(NCCL_RAS_CONFIRM_DURATION_S_ENV_VAR, str(after_s))


class Mailbox:
    """A few short values that a driver and its workers share, under names of ``owner``.

    Ray's head keeps them, so they arrive also while storage is away.
    """

    NAMES = ("stop", "safe step", "step")

    def __init__(self, owner: str) -> None:
        self._prefix = f"{owner}/"

    def put(self, name: str, value: str) -> None:
        kv._internal_kv_put(self._prefix + name, value, overwrite=True)

    def get(self, name: str) -> str | None:
        value = kv._internal_kv_get(self._prefix + name)
        return None if value is None else value.decode()

    def clear(self) -> None:
        for name in self.NAMES:
            kv._internal_kv_del(self._prefix + name)


class WorkersError(RuntimeError):
    """The ranks ended with an error; the message is that of the rank where it began."""


def place_in_node() -> tuple[int, int]:
    """The local rank of this worker, and the number of its node."""
    context = ray.train.get_context()
    return context.get_local_rank(), context.get_node_rank()


def is_leaving() -> bool:
    """Whether this worker ends soon: by SIGTERM, with its node, or for another number of ranks."""
    return _leaving.is_set() or get_train_context().preemption_context.preemption_info is not None


def _listen() -> None:
    """Handle SIGTERM in this worker; runs in its main thread, unlike the training."""

    def leave(signum: int, frame: FrameType | None) -> None:
        _leaving.set()

    signal.signal(signal.SIGTERM, leave)


class _Torch(TorchConfig):  # type: ignore[misc]
    check: Callable[[], None]

    @property
    def backend_cls(self) -> type:
        return _Backend


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_listen)
        worker_group.execute(backend_config.check)
        super().on_start(worker_group, backend_config)


class _Trainer(TorchTrainer):  # type: ignore[misc]
    mistakes: tuple[type[BaseException], ...]
    mailbox: Mailbox
    wait_s: float
    finish: Callable[[], None]
    given_up: Callable[[], bool]

    def _create_default_callbacks(self) -> list[Any]:
        """Without two that start processes which nothing here needs.

        Ray Data is not used; its process would import beside the first steps after a restart. The
        cleaner ends the ranks of a controller that is dead, as the end of our driver does. It asks
        the first dashboard it finds, and one of another cluster on this machine says "dead".
        """
        return [
            callback
            for callback in super()._create_default_callbacks()
            if not isinstance(callback, (DatasetsCallback, PlacementGroupCleanerCallback))
        ]

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        """As Ray does, with our controller and our policies."""
        variables = {
            "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_S),
        }
        failures = self.run_config.failure_config
        kwargs["failure_policy"] = _RetryMachines(failures, self.mistakes, self.mailbox)
        if self.scaling_config.elasticity_enabled:
            wait_s = max(self.wait_s, REPLACEMENT_S)
            kwargs["scaling_policy"] = _Resizing(self.scaling_config, self.mailbox, wait_s)
            variables |= {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(PLACE_S)}
        here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        variables |= get_env_vars_to_propagate()
        actor = ray.remote(num_cpus=0, label_selector=here, runtime_env={"env_vars": variables})
        controller = actor(_Controller).remote(self.mailbox, self.finish, **kwargs)
        ended = controller.run.remote()
        # Never a wait without end: the process can crash where Ray disconnects amid one.
        while not ray.wait([ended], timeout=POLL_S)[0]:
            if self.given_up():
                ray.kill(controller)
                raise WorkersError("the ranks were given up")
        ray.get(ended)
        return ray.get(controller.get_result.remote())


class _RankGroup(WorkerGroup):  # type: ignore[misc]
    """Ray's own, except that a rank that fails while all start counts as one that fails later.

    Where ranks have failed, the others end without leaving their process group: it is broken, and
    they may wait in it. Before, the first rank may finish what it saves.
    """

    standby = Standby()  # of the controller, which has one group after the other
    finish: Callable[[], None]

    def _create_workers(
        self,
        num_workers: int,
        placement_group: PlacementGroup,
        resources_per_worker: dict[str, float],
        **of_replicas: Any,
    ) -> list[Worker]:
        """Ray's own, except that processes that stand by take the places they can."""
        nodes = placement_group_table(placement_group)["bundles_to_node_id"]
        taken = self.standby.take({index: nodes[index] for index in range(num_workers)})
        self.standby.end()
        workers = [
            Worker(*ready, resources_per_worker, placement_group_bundle_index=index)
            for index, ready in taken.items()
        ]
        if left := [index for index in range(num_workers) if index not in taken]:
            try:
                workers += super()._create_workers(
                    len(left),
                    placement_group,
                    resources_per_worker,
                    placement_group_bundle_indices=left,
                    **of_replicas,
                )
            except Exception:
                for worker in workers:
                    ray.kill(worker.actor)
                raise
        ranks: list[Worker] = WorkerGroup._assign_worker_ranks(workers)
        return ranks

    def shutdown(self) -> None:
        status = self.get_latest_poll_status()
        if status is not None and status.errors:
            if 0 not in status.errors:
                saved = self.get_workers()[0].execute_async(_call, type(self).finish)
                ray.wait([saved], timeout=FINISH_S)
            self.abort()
        else:
            super().shutdown()

    def _start(self) -> None:
        try:
            super()._start()
        except Exception as error:
            if not self.has_started():
                raise
            workers = self.get_workers()
            self.abort()  # else its place stays taken, and the next group finds none
            lost = error.__cause__ if isinstance(error, WorkerGroupStartupFailedError) else error
            # A rank's own exception, or its end. Ray ends the whole run for some of them.
            if not isinstance(lost, (RayError, RuntimeError)):
                raise
            rank = next((r for r, worker in enumerate(workers) if _is_of(lost, worker)), 0)
            failure = lost.cause if isinstance(lost, RayTaskError) else lost
            raise WorkerGroupError(str(failure), {rank: failure}) from error


def _is_of(error: Exception, worker: Worker) -> bool:
    """Whether ``error`` was raised in this worker, or is its end."""
    actor: str = worker.actor._actor_id.hex()
    pid: int = worker.metadata.pid
    return getattr(error, "actor_id", None) == actor or getattr(error, "pid", None) == pid


class _Controller(TrainController):  # type: ignore[misc]
    """Ray's own, with processes that stand by for lost ranks once all ranks train."""

    worker_group_cls = _RankGroup

    def __init__(self, mailbox: Mailbox, finish: Callable[[], None], **kwargs: Any) -> None:
        self._mailbox = mailbox
        self.worker_group_cls.finish = staticmethod(finish)
        self._step_before: str | None = None
        self._prepared, self._groups = False, 0
        super().__init__(**kwargs)

    def _start_worker_group(self, num_workers: int, resources_per_worker: dict[str, float]) -> None:
        self._step_before = self._mailbox.get("step")
        self._prepared = "GPU" in resources_per_worker
        self._groups, self._since = self._groups + 1, time.monotonic()
        super()._start_worker_group(num_workers, resources_per_worker)

    async def _poll_workers(self) -> WorkerGroupPollStatus:
        status = await super()._poll_workers()
        # After the first step: imports beside it would slow the ranks' own start. After a restart
        # lost steps come first.
        busy = self._groups > 1 and time.monotonic() - self._since < REST_S
        if not self._prepared and not busy and self._mailbox.get("step") != self._step_before:
            self._prepared = True
            group = self.get_worker_group()
            environment = group._get_worker_runtime_env(self._run_config.worker_runtime_env)
            group.standby.prepare(group.get_workers(), environment)
        return status

    async def _shutdown(self) -> Any:
        self.worker_group_cls.standby.end()
        return await super()._shutdown()


class _RetryMachines(DefaultFailurePolicy):  # type: ignore[misc]
    """Ray's own policy, except that a mistake would only be repeated, and a safe step absolves."""

    def __init__(
        self, config: FailureConfig, mistakes: tuple[type[BaseException], ...], mailbox: Mailbox
    ) -> None:
        super().__init__(config)
        self._mistakes, self._mailbox = mistakes, mailbox
        self._safe_step: str | None = None

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if _mistake(training_failed_error, self._mistakes) is not None:
            return FailureDecision.RAISE
        if (safe_step := self._mailbox.get("safe step")) != self._safe_step:
            self._safe_step = safe_step
            self._worker_group_failures = self._controller_failures = 0
        return super().make_decision(training_failed_error)


class _Resizing(ElasticScalingPolicy):  # type: ignore[misc]
    """Ray's own policy, except that ranks save before others join them, and no wait is endless."""

    def __init__(self, config: ScalingConfig, mailbox: Mailbox, wait_s: float) -> None:
        super().__init__(config)
        self._mailbox, self._wait_s = mailbox, wait_s
        self._waiting_since: float | None = None
        self._saving: tuple[ScalingDecision, str | None] | None = None
        """What happens once there is another safe step than this one."""

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        """Without the nodes that have just gone: Ray hears of them after up to 20 s."""
        kind: Resource = "GPU" if self.scaling_config.use_gpu else "CPU"
        alive = sum(node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"])
        possible: int = super()._count_possible_workers(reserved_resources)
        return min(int(alive), possible)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._saving = None
        decision = super().make_decision_for_non_running_worker_group()
        if not isinstance(decision, NoopDecision):
            self._waiting_since = None
            return decision
        now = time.monotonic()
        self._waiting_since = self._waiting_since or now
        if now - self._waiting_since > self._wait_s or self._mailbox.get("stop") is not None:
            waited_s = now - self._waiting_since
            least = self.scaling_config.min_workers
            raise RoomError(f"{least} ranks have had no place for {waited_s:.0f} s")
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        if self._saving is not None:
            decision, before = self._saving
            if self._mailbox.get("safe step") == before:
                return NoopDecision()
            self._saving = None
            return decision
        decision = super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )
        if not isinstance(decision, NoopDecision):
            self._saving = decision, self._mailbox.get("safe step")
            for worker in worker_group_state.workers:
                worker.execute_async(_leave)
        return NoopDecision()


def _leave() -> None:
    _leaving.set()


def _call(function: Callable[[], None]) -> None:  # Ray takes only what has a name
    function()


def _failures(error: TrainingFailedError) -> Mapping[int, BaseException]:
    """The exceptions of the ranks that failed, as they were raised there."""
    if not isinstance(error, WorkerGroupError):
        return {}
    return {
        rank: getattr(failure, "_base_exc", failure)
        for rank, failure in sorted(error.worker_failures.items())
    }


def _mistake(
    error: TrainingFailedError, mistakes: tuple[type[BaseException], ...]
) -> BaseException | None:
    return next((e for e in _failures(error).values() if isinstance(e, mistakes)), None)


def _reason(error: TrainingFailedError, mistakes: tuple[type[BaseException], ...]) -> str:
    """The worker's own line for a mistake, else rank and kind of the first error."""
    if (mistake := _mistake(error, mistakes)) is not None:
        return str(mistake)
    # Ranks that lost the connection to another one, which torch reports so, come last.
    failures = sorted(_failures(error).items(), key=lambda f: isinstance(f[1], RuntimeError))
    for rank, failure in failures:
        return f"rank {rank}: {type(failure).__name__}: {_last_line(failure)}"
    return f"the ranks were lost: {_last_line(error)}"


def _last_line(error: BaseException) -> str:
    """The last line of its message, without Ray's advice."""
    message = str(error).strip() or "without a message"
    return message.splitlines()[-1].split(". Some common causes")[0]
