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
from cluster.storage import Store, join, open_store, pyarrow_filesystem
from data_prep.shards import Dataset
from pipeline import ranks as distributed
from pipeline.checkpoints import CheckpointStore
from pipeline.config import Config
from pipeline.data.sample_order import dataset_misfits
from pipeline.errors import TrainingError
from pipeline.loop import refuse_other_model, train_worker
from pipeline.networks import starting_weights
from pipeline.run_storage import checkpoints_url, dataset_url, run_store
from pipeline.stop_request import (
    STOP_KEY,
    NoStop,
    SignalStop,
    StopRequest,
    StoredStop,
    request_stop,
)

log = logging.getLogger(__name__)


def train(cfg: Config) -> bool:
    """Train to ``cfg.train.steps``, from the newest checkpoint if there is one.

    Returns whether that step was reached; False means stopped on request, with everything saved.
    """
    run = run_store(cfg)
    if finished(cfg):
        log.info("training finished already run=%s step=%d", cfg.name, cfg.train.steps)
        return True
    _refuse_early(cfg)
    if distributed.launched_by_torchrun() or cfg.train.launcher == "local":
        return _train_here(cfg)
    _train_on_ray(cfg, run)
    return finished(cfg)


def _refuse_early(cfg: Config) -> None:
    """Tell before any machine starts what would stop every worker."""
    dataset = Dataset.open(dataset_url(cfg))
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
    checkpoints = CheckpointStore(open_store(checkpoints_url(cfg)))
    if (step := checkpoints.newest()) is not None:
        refuse_other_model(cfg, checkpoints.manifest(step))
    else:
        starting_weights(cfg)


def finished(cfg: Config) -> bool:
    newest = CheckpointStore(open_store(checkpoints_url(cfg))).newest()
    return newest is not None and newest >= cfg.train.steps


def _train_here(cfg: Config) -> bool:
    """In this process: one rank of torchrun's, or the only one."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if distributed.launched_by_torchrun():
        dist.init_process_group(backend)
    elif cfg.train.engine == "deepspeed":  # which wants a group, be it of one
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        with SignalStop().listening() as stop:
            # By its own count: the first rank may still be writing the last checkpoint.
            return train_worker(cfg, distributed.current(), stop).step >= cfg.train.steps
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _train_on_ray(cfg: Config, run: Store) -> None:
    """Under Ray Train: lost workers are replaced, and go on from the newest checkpoint."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    # Else its workers leave the folder that paths in recipes, and mlflow.db, are relative to.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    with connect():
        gpus = int(ray.cluster_resources().get("GPU", 0))
        workers = max(gpus, 1) if cfg.train.workers == "auto" else cfg.train.workers
        if cfg.train.streams % workers:
            raise ValueError(
                f"{workers} workers cannot share train.streams={cfg.train.streams}: "
                "set train.workers to a divisor of it"
            )
        filesystem, path = pyarrow_filesystem(join(cfg.storage, "runs", cfg.name, "ray"))
        run.delete(STOP_KEY)
        trainer = TorchTrainer(
            _ray_worker,
            train_loop_config={"config": cfg.model_dump(mode="json")},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus > 0),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            run_config=RunConfig(
                # A new name each time: our checkpoints are the state, Ray is to keep none.
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

        # In a thread of its own: in the main one Ray's handler of Ctrl-C would abort the workers
        # where ours lets them save first.
        with SignalStop().listening() as stop:
            thread = threading.Thread(target=fit, name="ray-train", daemon=True)
            thread.start()
            asked = False
            while thread.is_alive():
                thread.join(0.5)
                if stop.made and not asked:
                    request_stop(run)
                    asked = True
        run.delete(STOP_KEY)
        if failure and isinstance(failure[0], TrainingFailedError):
            raise TrainingError(_reason(failure[0])) from failure[0]
        if failure:
            raise failure[0]


def _reason(error: BaseException) -> str:
    """The first worker's own words."""
    workers: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    for rank, failure in sorted(workers.items()):
        cause = getattr(failure, "cause", None) or failure
        return f"rank {rank}: {type(cause).__name__}: {str(cause).strip().splitlines()[-1]}"
    return str(error).strip().splitlines()[-1]


def _ray_worker(loop_config: dict[str, Any]) -> None:
    import ray.train

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cfg = Config.model_validate(loop_config["config"])
    context = ray.train.get_context()
    ranks = distributed.current(context.get_local_rank(), context.get_node_rank())
    with ExitStack() as stack:
        stop: StopRequest = NoStop()
        if ranks.first:
            stop = StoredStop(run_store(cfg))
            stack.callback(stop.close)
        train_worker(cfg, ranks, stop)
