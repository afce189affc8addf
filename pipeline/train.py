"""Where training runs: under Ray Train, under torchrun, or in one plain process."""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from cluster.session import connect, job_has_ended, job_metadata
from cluster.storage import StorageRefusedError, join
from data_prep.masks import MaskSampler
from data_prep.shards import Dataset
from pipeline import ranks as distributed
from pipeline.checkpoints import (
    CheckpointError,
    CheckpointStore,
    finish_saves,
    refuse_other_model,
)
from pipeline.config import Config
from pipeline.data.loaders import recipe_misfits
from pipeline.device import memory_explained
from pipeline.errors import TrainingError
from pipeline.evaluation.metrics import METRICS
from pipeline.lease import HeldLease, RunTakenError, held
from pipeline.logs import configure_logs
from pipeline.loop import train_on_rank
from pipeline.networks import starting_weights
from pipeline.progress import leave_terminal, progress
from pipeline.ranks import Device, Ranks
from pipeline.run_storage import RunStorage
from pipeline.stop_request import PolledStop, SignalStop, not_saved, stop_with_launcher
from pipeline.tracking import refuse_early

log = logging.getLogger(__name__)

RESOURCE: Mapping[Device, Literal["GPU", "CPU"] | None] = {
    "auto": None,
    "cpu": "CPU",
    "cuda": "GPU",
}
"""What a rank takes one of in a Ray cluster."""
NO_ROOM = (
    "set train.workers=auto, a smaller number or [fewest, most], or cluster.wait_s where the "
    "cluster still grows"
)
KILL_S = 5.0  # that Ray has to kill ranks which are given up, of the little time that is left
MISTAKES = (ValueError, FileNotFoundError, StorageRefusedError, CheckpointError, TrainingError)
"""What would only happen again if a rank were started again."""


def train(cfg: Config, storage: RunStorage) -> bool:
    """Train to ``cfg.train.steps``, from the newest checkpoint if there is one.

    Returns whether that step was reached; False means stopped on request, with everything saved.
    """
    launched = time.time()
    checkpoints = CheckpointStore(storage.checkpoints)
    if _finished(cfg, checkpoints):
        log.info("training already finished run=%s step=%d", cfg.name, cfg.train.steps)
        return True
    dataset = storage.open_dataset()
    cfg = with_its_masks(cfg, checkpoints)
    _refuse_early(cfg, dataset, checkpoints)
    if _trains_here(cfg):
        return _train_here(cfg, storage, dataset, launched)
    _train_on_ray(cfg, storage, launched)
    return _finished(cfg, checkpoints)


def _trains_here(cfg: Config) -> bool:
    """Whether this process is a rank itself, with no Ray Train above it."""
    return distributed.launched_by_torchrun() or cfg.train.launcher == "local"


def with_its_masks(cfg: Config, checkpoints: CheckpointStore) -> Config:
    """A run that is resumed draws its masks as it began, whatever has changed since then."""
    manifest = checkpoints.newest_manifest()
    if manifest is None:
        return cfg
    recorded = manifest.config.get("masks")
    drawing = cfg.masks.drawing if recorded is None else recorded.get("drawing", 1)
    if drawing == cfg.masks.drawing:
        return cfg
    log.info("masks are drawn as the run began masks.drawing=%d", drawing)
    return cfg.model_copy(update={"masks": replace(cfg.masks, drawing=drawing)})


def _refuse_early(cfg: Config, dataset: Dataset, checkpoints: CheckpointStore) -> None:
    """Raise here, before any machine starts, what would stop every rank."""
    if faults := recipe_misfits(cfg, dataset):
        raise ValueError(f"{dataset.url} does not fit the recipe: {'; '.join(faults)}")
    refuse_early(cfg)
    metric = cfg.train.keep_best_by.partition(":")[0].removeprefix("val/")
    if metric not in METRICS:
        raise ValueError(
            f"train.keep_best_by={cfg.train.keep_best_by} names no validation metric: give "
            f"val/NAME:min or :max, with NAME of {', '.join(METRICS)}"
        )
    MaskSampler(cfg.masks).check(cfg.train.size_px, cfg.train.size_px)
    if (manifest := checkpoints.newest_manifest()) is not None:
        refuse_other_model(cfg.name, manifest, cfg.model)
    elif checkpoints.newest() is None:
        starting_weights(cfg)


def _finished(cfg: Config, checkpoints: CheckpointStore) -> bool:
    newest = checkpoints.newest()
    if newest is None or newest < cfg.train.steps:
        return False
    if fault := checkpoints.fault(newest):
        log.warning("the last checkpoint is damaged, training resumes before it: %s", fault)
    return fault is None


def _train_here(cfg: Config, storage: RunStorage, dataset: Dataset, launched: float) -> bool:
    """In this process: one rank of torchrun's, or the only one."""
    backend = "gloo" if _device_here(cfg).type == "cpu" else "nccl"
    if distributed.launched_by_torchrun():
        stop_with_launcher()  # ranks that outlive it would keep the run from who starts it again
        with lost_rank_as_error():
            distributed.join_torchrun(backend, timedelta(seconds=_collectives_wait_s(cfg)))
    elif cfg.train.engine == "deepspeed":  # needs a process group, even of one rank
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)

    def end_now() -> None:
        # Whatever waits for storage or other ranks would keep the interpreter from its end.
        if ranks.first:
            log.error(not_saved(stop.safe_step))
            leave_terminal()
        logging.shutdown()
        os._exit(1)

    ranks = distributed.current(device=cfg.train.device)
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    stop = SignalStop(max_hours=cfg.train.max_hours, at_once=end_now, give_up=end_now)
    showing = _showing_steps(cfg) if ranks.first else contextlib.nullcontext(lambda step: None)
    try:
        with (
            lost_rank_as_error(),
            stop.listening(),
            _lease_of_first(storage, ranks) as lease,
            showing as show,
        ):
            # By its own count: rank 0 may still be writing the last checkpoint.
            with memory_explained(cfg.train):
                end = train_on_rank(cfg, storage, dataset, ranks, stop, lease, show, launched)
            return end.step >= cfg.train.steps
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _collectives_wait_s(cfg: Config) -> float:
    """How long ranks wait for one that hangs, which ends by its watch, or that lacks a shard."""
    hang_s = cfg.train.hang_timeout_s
    return hang_s + max(hang_s, cfg.train.save_deadline_s)


@contextlib.contextmanager
def _showing_steps(cfg: Config) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, beside the lines of the loop; call it with each step that is done."""
    with progress("train", "steps", lines=False) as advance:
        yield lambda step: advance(step, cfg.train.steps)


@contextlib.contextmanager
def lost_rank_as_error() -> Iterator[None]:
    """Raise TrainingError where this rank cannot reach the others."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        # Gloo's errors have no type of their own; they begin with the place in its source.
        if not isinstance(error, dist.DistError) and "gloo" not in reason:
            raise
        raise TrainingError(
            f"another rank has ended or is out of reach: run the same command to resume ({reason})"
        ) from error


def _device_here(cfg: Config) -> torch.device:
    """What this rank computes on. Raises TrainingError where a rank would have no GPU."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = distributed.Ranks(local_rank=local_rank, kind=cfg.train.device).device
    if device.type == "cuda" and local_rank >= (gpus := torch.cuda.device_count()):
        raise TrainingError(
            f"local rank {local_rank} has no GPU, the node has {gpus}: start one rank per GPU, or "
            "set train.device=cpu"
        )
    return device


@contextlib.contextmanager
def _lease_of_first(storage: RunStorage, ranks: Ranks) -> Iterator[HeldLease | None]:
    """The run's lease on rank 0, None on others; where it is refused, all ranks raise."""
    with ExitStack() as stack:
        lease, refusal = None, None
        if ranks.first:
            try:
                lease = stack.enter_context(_lease(storage))
            except (RunTakenError, OSError) as error:
                refusal = str(error)
        if refusal := distributed.from_first(refusal):
            raise RunTakenError(refusal)
        yield lease


def _lease(storage: RunStorage) -> contextlib.AbstractContextManager[HeldLease]:
    job = job_metadata().get("job_submission_id", "")
    return held(storage.run, job=job, job_has_ended=job_has_ended)


def refuse_missing_room(cfg: Config, storage: RunStorage) -> None:
    """Raise TrainingError where a run still to train has too few places, and none may come."""
    if _trains_here(cfg) or cfg.cluster.wait_s:
        return
    if (CheckpointStore(storage.checkpoints).newest() or 0) >= cfg.train.steps:
        return
    from cluster import ray_train

    with _shortage_as_error():
        ray_train.refuse_more_than_exist(
            cfg.train.workers, RESOURCE[cfg.train.device], most=cfg.train.streams
        )


@contextlib.contextmanager
def _shortage_as_error() -> Iterator[None]:
    """Raise TrainingError, which says what to set, where the ranks have no room."""
    from cluster.ray_train import RoomError

    try:
        yield
    except RoomError as error:
        raise TrainingError(f"{error}: {NO_ROOM}") from error


def _train_on_ray(cfg: Config, storage: RunStorage, launched: float) -> None:
    """Under Ray Train, which replaces lost workers; they resume from the newest checkpoint."""
    with connect():
        from cluster import ray_train

        mailbox = ray_train.Mailbox(storage.run_url)
        with (
            SignalStop(max_hours=cfg.train.max_hours).listening() as stop,
            _lease(storage) as lease,
            _showing_steps(cfg) as show,
        ):
            with _shortage_as_error():
                workers = ray_train.find_room(
                    cfg.train.workers,
                    RESOURCE[cfg.train.device],
                    most=cfg.train.streams,
                    wait_s=cfg.cluster.wait_s,
                    waiting=log.info,
                    interrupted=lambda: stop.requested,
                )
            if workers is None:
                return
            log.info("training on %d rank(s), one %s each", workers.count, workers.resource)
            mailbox.clear()
            device: Device = "cuda" if workers.resource == "GPU" else "cpu"
            failure: list[BaseException] = []
            given_up = threading.Event()

            def find_device() -> None:
                _ = Ranks(kind=device).device  # raises where a node lacks it, before NCCL fails

            def fit() -> None:
                try:
                    ray_train.run_workers(
                        _train_in_ray_worker,
                        {
                            "config": cfg.model_dump(mode="json"),
                            "device": device,
                            "lease": lease,
                            "launched": launched,
                        },
                        workers,
                        mailbox=mailbox,
                        storage_url=join(storage.run_url, "ray"),
                        max_failures=cfg.train.max_failures,
                        wait_s=cfg.cluster.wait_s,
                        timeout_s=_collectives_wait_s(cfg),
                        hang_s=cfg.train.hang_timeout_s,
                        mistakes=MISTAKES,
                        check=find_device,
                        finish=finish_saves,
                        given_up=given_up.is_set,
                    )
                except BaseException as error:
                    failure.append(error)

            # In another thread: in the main one Ray's handler of Ctrl-C aborts the workers,
            # and ours lets them save first.
            thread = threading.Thread(target=fit, name="ray-train", daemon=True)
            thread.start()
            try:
                while thread.is_alive():
                    thread.join(0.5)
                    if sys.stderr.isatty() and (step := mailbox.get("step")) is not None:
                        show(int(step))
                    if stop.requested and mailbox.get("stop") is None:
                        mailbox.put("stop", "1")
                    if stop.too_late:
                        raise KeyboardInterrupt
                    if lease.lost:
                        lease.check()
            except KeyboardInterrupt:
                safe = mailbox.get("safe step")
                raise TrainingError(not_saved(int(safe) if safe else None)) from None
            finally:
                given_up.set()
                thread.join(KILL_S)
        if failure and isinstance(failure[0], ray_train.WorkersError):
            raise TrainingError(str(failure[0])) from failure[0]
        if failure:
            with _shortage_as_error():
                raise failure[0]


def _train_in_ray_worker(loop_config: dict[str, Any]) -> None:
    from cluster import ray_train

    configure_logs()
    cfg = Config.model_validate(loop_config["config"])
    storage = RunStorage.open(cfg)
    ranks = distributed.current(*ray_train.place_in_node(), device=loop_config["device"])
    mailbox = ray_train.Mailbox(storage.run_url)
    stop = PolledStop(
        lambda: mailbox.get("stop") is not None,
        ray_train.is_leaving,
        lambda step: mailbox.put("safe step", str(step)),
        lambda step: mailbox.put("step", str(step)),
    )
    with contextlib.closing(stop), memory_explained(cfg.train):
        lease = loop_config["lease"] if ranks.first else None
        dataset = storage.open_dataset()
        launched = loop_config["launched"]
        train_on_rank(cfg, storage, dataset, ranks, stop, lease, stop.note_step, launched)
