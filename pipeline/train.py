"""Where training runs: under Ray Train, under torchrun, or in one plain process."""

import logging
import os
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist

from cluster.session import connect
from cluster.storage import join, pyarrow_filesystem
from data_prep.masks import MaskSampler
from data_prep.shards import Dataset
from pipeline import ranks as distributed
from pipeline.checkpoints import CheckpointStore, refuse_other_model
from pipeline.config import Config
from pipeline.data.sample_order import dataset_misfits
from pipeline.errors import TrainingError
from pipeline.loop import train_on_rank
from pipeline.networks import starting_weights
from pipeline.run_storage import RunStorage
from pipeline.stop_request import (
    STOP_KEY,
    NoStop,
    SignalStop,
    StopRequest,
    StoredStop,
    request_stop,
)

log = logging.getLogger(__name__)


def train(cfg: Config, storage: RunStorage) -> bool:
    """Train to ``cfg.train.steps``, from the newest checkpoint if there is one.

    Returns whether that step was reached; False means stopped on request, with everything saved.
    """
    checkpoints = CheckpointStore(storage.checkpoints)
    if _finished(cfg, checkpoints):
        log.info("training already finished run=%s step=%d", cfg.name, cfg.train.steps)
        return True
    dataset = storage.open_dataset()
    _refuse_early(cfg, dataset, checkpoints)
    if distributed.launched_by_torchrun() or cfg.train.launcher == "local":
        return _train_here(cfg, storage, dataset)
    _train_on_ray(cfg, storage)
    return _finished(cfg, checkpoints)


def _refuse_early(cfg: Config, dataset: Dataset, checkpoints: CheckpointStore) -> None:
    """Raise here, before any machine starts, what would stop every rank."""
    samples = {
        split: sum(shard.samples for shard in dataset.shards(split)) for split in ("train", "val")
    }
    faults = dataset_misfits(
        train_samples=samples["train"],
        val_samples=samples["val"],
        stored_px=dataset.settings["shaping"]["stored_px"],
        size_px=cfg.train.size_px,
        streams=cfg.train.streams,
        global_batch=cfg.train.global_batch,
    )
    if faults:
        raise ValueError(f"{dataset.url} does not fit the recipe: {'; '.join(faults)}")
    MaskSampler(cfg.masks)  # raises where a folder of masks is empty
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


def _train_here(cfg: Config, storage: RunStorage, dataset: Dataset) -> bool:
    """In this process: one rank of torchrun's, or the only one."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if distributed.launched_by_torchrun():
        dist.init_process_group(backend)
    elif cfg.train.engine == "deepspeed":  # needs a process group, even of one rank
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        with SignalStop().listening() as stop:
            # By its own count: rank 0 may still be writing the last checkpoint.
            end = train_on_rank(cfg, storage, dataset, distributed.current(), stop)
            return end.step >= cfg.train.steps
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _train_on_ray(cfg: Config, storage: RunStorage) -> None:
    """Under Ray Train, which replaces lost workers; they resume from the newest checkpoint."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    # Paths in recipes, and mlflow.db, are relative to this folder: workers have to stay in it.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    with connect():
        gpus = int(ray.cluster_resources().get("GPU", 0))
        workers = max(gpus, 1) if cfg.train.workers == "auto" else cfg.train.workers
        if cfg.train.streams % workers:
            raise ValueError(
                f"{workers} workers cannot share train.streams={cfg.train.streams}: "
                "set train.workers to a divisor of it"
            )
        filesystem, path = pyarrow_filesystem(join(storage.run_url, "ray"))
        storage.run.delete(STOP_KEY)
        trainer = TorchTrainer(
            _train_in_ray_worker,
            train_loop_config={"config": cfg.model_dump(mode="json")},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus > 0),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            run_config=RunConfig(
                # A new name each time: the state is in our checkpoints, so Ray resumes nothing.
                name=time.strftime("%Y%m%d-%H%M%S", time.gmtime()),
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=cfg.train.max_failures),
            ),
        )
        failure: list[BaseException] = []

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:
                failure.append(error)

        # In a thread of its own: in the main one Ray's handler of Ctrl-C aborts the workers, and
        # ours lets them save first.
        with SignalStop().listening() as stop:
            thread = threading.Thread(target=fit, name="ray-train", daemon=True)
            thread.start()
            passed_on = False
            while thread.is_alive():
                thread.join(0.5)
                if stop.requested and not passed_on:
                    request_stop(storage.run)
                    passed_on = True
        storage.run.delete(STOP_KEY)
        if failure and isinstance(failure[0], TrainingFailedError):
            raise TrainingError(_reason(failure[0])) from failure[0]
        if failure:
            raise failure[0]


def _reason(error: BaseException) -> str:
    """The error of the first rank that failed, in one line."""
    workers: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    for rank, failure in sorted(workers.items()):
        cause = getattr(failure, "cause", None) or failure
        return f"rank {rank}: {type(cause).__name__}: {str(cause).strip().splitlines()[-1]}"
    return str(error).strip().splitlines()[-1]


def _train_in_ray_worker(loop_config: dict[str, Any]) -> None:
    import ray.train

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cfg = Config.model_validate(loop_config["config"])
    storage = RunStorage.open(cfg)
    context = ray.train.get_context()
    ranks = distributed.current(context.get_local_rank(), context.get_node_rank())
    with ExitStack() as stack:
        stop: StopRequest = NoStop()
        if ranks.first:
            stop = StoredStop(storage.run)
            stack.callback(stop.close)
        train_on_rank(cfg, storage, storage.open_dataset(), ranks, stop)
