"""Training: the launch under Ray Train, torchrun or one plain process, and the loop of a worker."""

import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from cluster.storage import Store, join, open_store, pyarrow_filesystem
from data_prep.pictures import decode
from data_prep.shards import Dataset
from models import Generator
from models.gated_conv import fuse_gates
from pipeline import networks
from pipeline import ranks as distributed
from pipeline.checkpoint import BEST, CheckpointError, Checkpoints
from pipeline.config import Config
from pipeline.ema import Average
from pipeline.engine import Adam, Engine, build_engine
from pipeline.errors import TrainingError
from pipeline.evaluate import Evaluation, evaluate
from pipeline.feed import train_loader, validation_batches
from pipeline.loader import TrainLoader
from pipeline.locations import checkpoints_url, dataset_url, run_store, run_url
from pipeline.ranks import Ranks
from pipeline.state import Position, TrainingState
from pipeline.step import train_step
from pipeline.stopping import STOP_KEY, NoStop, SignalStop, StopRequest, StoredStop, request_stop
from pipeline.tracking import Story, Tracker, open_tracker

log = logging.getLogger(__name__)

T = TypeVar("T")

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
    if not sum(shard.samples for shard in dataset.shards("val")):
        raise ValueError(
            f"{dataset.url} holds no held-out pictures: raise data.val_fraction "
            f"(now {cfg.data.val_fraction})"
        )
    train_loader(cfg, dataset, Ranks()).close()
    checkpoints = Checkpoints(open_store(checkpoints_url(cfg)))
    if (step := checkpoints.newest()) is not None:
        _refuse_other_model(cfg, checkpoints.manifest(step))


def _refuse_other_model(cfg: Config, manifest: Mapping[str, Any]) -> None:
    saved, wanted = manifest["config"]["model"], cfg.model.model_dump(mode="json")
    if saved != wanted:
        differing = sorted(key for key in wanted if saved.get(key) != wanted[key])
        raise CheckpointError(
            f"run {cfg.name} at step {manifest['step']} has another model "
            f"({', '.join(differing)} differ): give the recipe a new name, or the old settings back"
        )


def finished(cfg: Config) -> bool:
    newest = Checkpoints(open_store(checkpoints_url(cfg))).newest()
    return newest is not None and newest >= cfg.train.steps


def _train_here(cfg: Config) -> bool:
    """In this process: one rank of torchrun's, or the only one."""
    if distributed.launched_by_torchrun():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
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

    from cluster.session import connect

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


def train_worker(cfg: Config, ranks: Ranks, stop: StopRequest) -> Position:
    """What every rank runs, whoever launched it; collective from the first line to the last.

    Goes on from the newest checkpoint, ends at ``cfg.train.steps`` or at a log interval after
    ``stop`` was made on any rank, and has saved in both cases. Returns where it ended.
    """
    device = ranks.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_flush_denormal(True)  # tails of the attention's softmax cost threefold otherwise
    if not ranks.first:
        logging.getLogger().setLevel(logging.WARNING)
    torch.manual_seed(cfg.seed)  # equal initial weights on all ranks

    dataset = Dataset.open(dataset_url(cfg))
    checkpoints = Checkpoints(
        open_store(checkpoints_url(cfg)),
        keep=cfg.train.keep_checkpoints,
        best=BEST,
    )
    state = _newest(cfg, checkpoints, dataset, ranks)
    position = state.position if state else Position()

    learning = networks.generator(cfg.model, recompute=cfg.train.recompute).to(device)
    average = Average(learning, cfg.train.ema_decay, position.step)
    critic = networks.discriminator(cfg.model).to(device)
    if state:
        average.module.load_state_dict(state.ema)
    if cfg.train.compile and device.type == "cuda":
        learning.compile()
        critic.compile()
    elif cfg.train.compile:
        fuse_gates(learning)  # oneDNN's convolutions are not compiled to advantage
    engine = partial(
        build_engine,
        cfg.train.engine,
        adam=Adam(cfg.train.learning_rate, (cfg.train.beta1, cfg.train.beta2)),
        ranks=ranks,
        zero_stage=cfg.train.zero_stage,
        batch_per_rank=cfg.train.global_batch // ranks.world_size,
    )
    generator = engine(learning, state=state.generator if state else None)
    discriminator = engine(critic, state=state.discriminator if state else None)
    with ExitStack() as stack:
        loader = train_loader(cfg, dataset, ranks)
        stack.callback(loader.close)
        tracker = stack.enter_context(open_run_tracker(cfg, dataset, position.step, ranks))
        if ranks.first and not state:
            tracker.image("dataset", 0, decode(dataset.store.get("contact_sheet.png")).pixels)
        stack.callback(checkpoints.close)
        worker = _Worker(
            cfg, ranks, dataset, generator, discriminator, average, checkpoints, tracker
        )
        return worker.run(loader, position, stop)


@dataclass
class _Worker:
    """The loop's parts, gathered so that its steps read in order."""

    cfg: Config
    ranks: Ranks
    dataset: Dataset
    generator: Engine
    discriminator: Engine
    average: Average[Generator]
    checkpoints: Checkpoints
    tracker: Tracker

    def run(self, loader: TrainLoader, position: Position, stop: StopRequest) -> Position:
        cfg, device = self.cfg.train, self.ranks.device
        clock = _Clock(cfg.global_batch)
        for epoch, epoch_step, batch in clock.waiting(
            loader.batches(position.epoch, position.epoch_step)
        ):
            losses = train_step(
                batch.to(device),
                self.generator,
                self.discriminator,
                l1_weight=cfg.l1_weight,
                gan_weight=cfg.gan_weight,
                guided=self.cfg.model.guided,
                precision=PRECISION[cfg.precision],
            )
            self.average.update()
            position = Position(position.step + 1, epoch, epoch_step + 1)
            clock.steps += 1

            last = position.step >= cfg.steps
            stopping = False
            if last or position.step % cfg.log_every_steps == 0:
                stopping = self._report(position, losses, clock, stop)
            if last or stopping or position.step % cfg.save_every_steps == 0:
                self._save(position)
                clock.restart()  # its time is no training time
            if last or stopping:
                break
        self.tracker.end("FINISHED" if position.step >= cfg.steps else "KILLED")
        return position

    def _report(
        self, position: Position, losses: dict[str, Tensor], clock: "_Clock", stop: StopRequest
    ) -> bool:
        """Read and log the losses, averaged over ranks; whether any rank was asked to stop."""
        means = distributed.mean(losses | {"stop": float(stop.made)}, self.ranks.device)
        stopping = means.pop("stop") > 0
        if not all(math.isfinite(value) for value in means.values()):
            raise TrainingError(
                f"losses are not finite at step {position.step}: {means}; the newest checkpoint is "
                "from before; raise train.l1_weight to 10 or lower train.gan_weight to 0.1"
            )
        means |= clock.read()
        means["lr/generator"] = means["lr/discriminator"] = self.cfg.train.learning_rate
        self.tracker.metrics(position.step, means)
        left_s = (self.cfg.train.steps - position.step) / means["speed/steps_per_s"]
        log.info(
            "step=%d/%d epoch=%d l1=%.4f adversarial=%.4f discriminator=%.4f images_per_s=%.1f "
            "left=%s",
            position.step,
            self.cfg.train.steps,
            position.epoch,
            means["loss/l1_refined"],
            means["loss/adversarial"],
            means["loss/discriminator"],
            means["speed/images_per_s"],
            time.strftime("%H:%M:%S", time.gmtime(left_s)),
        )
        return stopping

    def _save(self, position: Position) -> None:
        """Validate the averaged generator and write a checkpoint that carries its figures."""
        started = time.perf_counter()
        evaluation = self._validate()
        figures = {f"val/{k}": v for k, v in evaluation.means(distributed.total).items()}
        # Collective at ZeRO stages 1 and 2, so on every rank; only the first one writes.
        state = TrainingState(
            position, self.generator.state(), self.discriminator.state(), self.average.weights()
        )
        if self.ranks.first:
            self.checkpoints.save(
                position.step,
                state.files(networks.weights_header(self.cfg.model), metrics=figures),
                manifest={
                    "metrics": figures,
                    "dataset_digest": self.dataset.digest,
                    "mlflow_run": self.tracker.run_id,
                    "config_digest": self.cfg.digest(),
                    "config": self.cfg.model_dump(mode="json"),
                },
            )
            self.tracker.metrics(position.step, figures)
            self.tracker.image("samples", position.step, evaluation.sheet())
            log.info(
                "checkpoint step=%d val_l1_percent=%.2f val_psnr_db=%.2f stood_still_s=%.1f",
                position.step,
                figures["val/l1_percent"],
                figures["val/psnr_db"],
                time.perf_counter() - started,
            )

    def _validate(self) -> Evaluation:
        batches = validation_batches(
            self.cfg, self.dataset, self.ranks, self.cfg.evaluate.samples_while_training
        )
        return evaluate(
            self.average.module,
            batches,
            device=self.ranks.device,
            keep=self.cfg.evaluate.sheet if self.ranks.first else 0,
        )


class _Clock:
    """Speed since the last reading, without the time that saving took."""

    def __init__(self, global_batch: int) -> None:
        self.steps = 0
        self._global_batch = global_batch
        self._waited_s = 0.0
        self._since = time.perf_counter()

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """``batches``, with the time noted that each one kept us waiting."""
        while True:
            started = time.perf_counter()
            batch = next(batches)
            self._waited_s += time.perf_counter() - started
            yield batch

    def read(self) -> dict[str, float]:
        elapsed_s = max(time.perf_counter() - self._since, 1e-9)
        steps = max(self.steps, 1)
        values = {
            "speed/steps_per_s": steps / elapsed_s,
            "speed/images_per_s": steps * self._global_batch / elapsed_s,
            "speed/data_wait_ms": 1000 * self._waited_s / steps,
        }
        self.restart()
        return values

    def restart(self) -> None:
        self.steps, self._waited_s, self._since = 0, 0.0, time.perf_counter()


def open_run_tracker(cfg: Config, dataset: Dataset, resume_from_step: int, ranks: Ranks) -> Tracker:
    """The one tracker of the run; of each other machine one rank tells how that machine is."""
    story = Story(
        name=cfg.name,
        url=run_url(cfg),
        params=cfg.flat(),
        config_yaml=yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False),
        dataset_name=dataset.name,
        dataset_url=dataset.url,
        dataset_digest=dataset.digest,
    )
    return open_tracker(
        cfg.tracking.backend if ranks.local_rank == 0 else "none",
        story,
        store=run_store(cfg),
        resume_from_step=resume_from_step,
        experiment=cfg.tracking.experiment,
        uri=cfg.tracking.uri,
        node=ranks.machine,
    )


def _newest(
    cfg: Config, checkpoints: Checkpoints, dataset: Dataset, ranks: Ranks
) -> TrainingState | None:
    """The newest checkpoint that is intact, the same one on every rank."""
    found = checkpoints.load_newest() if ranks.first else None
    step = distributed.from_first(found[0] if found else None)
    if step is None:
        return None
    manifest = checkpoints.manifest(step)
    _refuse_other_model(cfg, manifest)
    if manifest["dataset_digest"] != dataset.digest:
        log.warning("the data set changed since step %d: the order of training is another", step)
    log.info("going on run=%s step=%d", cfg.name, step)
    return TrainingState.read(found[1] if found else checkpoints.load(step))
