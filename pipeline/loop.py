"""The training loop of one rank: batches, updates, metrics, checkpoints."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from data_prep.images import decode
from data_prep.shards import Dataset
from models import Generator
from models.gated_conv import fuse_gates
from pipeline import networks
from pipeline import ranks as distributed
from pipeline.checkpoints import BEST, CheckpointStore, refuse_other_model
from pipeline.config import Config
from pipeline.data.batches import TrainLoader
from pipeline.data.loaders import train_loader, validation_batches
from pipeline.ema import ExponentialMovingAverage
from pipeline.engine import Adam, Engine, build_engine
from pipeline.errors import TrainingError
from pipeline.evaluation.evaluator import Evaluation, evaluate
from pipeline.progress import format_duration
from pipeline.ranks import Ranks
from pipeline.run_storage import RunStorage
from pipeline.state import Position, TrainingState
from pipeline.step import train_step
from pipeline.stop_request import StopRequest
from pipeline.tracking import Tracker, open_training_tracker

log = logging.getLogger(__name__)

T = TypeVar("T")

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train_on_rank(
    cfg: Config, storage: RunStorage, dataset: Dataset, ranks: Ranks, stop: StopRequest
) -> Position:
    """What every rank runs, whoever launched it; collective from the first line to the last.

    Resumes from the newest checkpoint and ends at ``cfg.train.steps``, or at a log interval after
    ``stop`` was requested on any rank. Everything is saved in both cases. Returns the last
    position.
    """
    device = ranks.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_flush_denormal(True)  # tails of the attention's softmax cost threefold otherwise
    if not ranks.first:
        logging.getLogger().setLevel(logging.WARNING)
    torch.manual_seed(cfg.seed)  # equal initial weights on all ranks

    checkpoints = CheckpointStore(storage.checkpoints, keep=cfg.train.keep_checkpoints, best=BEST)
    if ranks.first:
        storage.run.clear_unfinished()
    state = _newest(cfg, checkpoints, dataset, ranks)
    position = state.position if state else Position()

    generator_module = networks.generator(
        cfg.model, activation_checkpointing=cfg.train.activation_checkpointing
    ).to(device)
    discriminator_module = networks.discriminator(cfg.model).to(device)
    if not state:
        _load_initial_weights(cfg, generator=generator_module, discriminator=discriminator_module)
    average = ExponentialMovingAverage(generator_module, cfg.train.ema_decay, position.step)
    if state:
        average.module.load_state_dict(state.ema)
    if cfg.train.compile and device.type == "cuda":
        generator_module.compile()
        discriminator_module.compile()
    elif cfg.train.compile:
        fuse_gates(generator_module)  # compiling oneDNN's convolutions gains nothing
    engine = partial(
        build_engine,
        cfg.train.engine,
        adam=Adam(cfg.train.learning_rate, (cfg.train.beta1, cfg.train.beta2)),
        ranks=ranks,
        zero_stage=cfg.train.zero_stage,
        batch_per_rank=cfg.train.global_batch // ranks.world_size,
    )
    generator = engine(generator_module, state=state.generator if state else None)
    discriminator = engine(discriminator_module, state=state.discriminator if state else None)
    with ExitStack() as stack:
        loader = train_loader(cfg, dataset, ranks)
        stack.callback(loader.close)
        tracker = stack.enter_context(
            open_training_tracker(cfg, storage, dataset, position.step, ranks)
        )
        if ranks.first and not state:
            tracker.log_image("dataset", 0, decode(dataset.store.get("contact_sheet.png")).pixels)
        stack.callback(checkpoints.close)
        loop = TrainingLoop(
            cfg, ranks, dataset, generator, discriminator, average, checkpoints, tracker
        )
        return loop.run(loader, position, stop)


def _load_initial_weights(cfg: Config, **modules: nn.Module) -> None:
    """Load the trained weights that the recipe names into fresh modules."""
    for name, weights in networks.starting_weights(cfg).items():
        modules[name].load_state_dict(weights)
    log.info(
        "starting run=%s generator=%s discriminator=%s",
        cfg.name,
        cfg.train.init_from or "fresh",
        cfg.train.init_discriminator_from or "fresh",
    )


@dataclass
class TrainingLoop:
    """One rank's engines and outputs, and the loop over batches."""

    cfg: Config
    ranks: Ranks
    dataset: Dataset
    generator: Engine
    discriminator: Engine
    average: ExponentialMovingAverage[Generator]
    checkpoints: CheckpointStore
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
                clock.restart()  # saving is no training time
            if last or stopping:
                break
        self.tracker.finish("FINISHED" if position.step >= cfg.steps else "KILLED")
        return position

    def _report(
        self, position: Position, losses: dict[str, Tensor], clock: "_Clock", stop: StopRequest
    ) -> bool:
        """Log the losses averaged over ranks; whether a stop was requested on any rank."""
        means = distributed.mean(losses | {"stop": float(stop.requested)}, self.ranks.device)
        stopping = means.pop("stop") > 0
        if not all(math.isfinite(value) for value in means.values()):
            raise TrainingError(
                f"losses are not finite at step {position.step}: {means}; the newest checkpoint is "
                "from before; raise train.l1_weight to 10 or lower train.gan_weight to 0.1"
            )
        means |= clock.read()
        means["lr/generator"] = means["lr/discriminator"] = self.cfg.train.learning_rate
        self.tracker.log_metrics(position.step, means)
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
            format_duration(left_s),
        )
        return stopping

    def _save(self, position: Position) -> None:
        """Validate the averaged generator and write a checkpoint that carries the metrics."""
        started = time.perf_counter()
        evaluation = self._validate()
        metrics = {f"val/{k}": v for k, v in evaluation.means(distributed.total).items()}
        # Collective at ZeRO stages 1 and 2, so on every rank; only rank 0 writes.
        state = TrainingState(
            position, self.generator.state(), self.discriminator.state(), self.average.weights()
        )
        if self.ranks.first:
            self.checkpoints.save(
                position.step,
                state.files(networks.weights_header(self.cfg.model), metrics=metrics),
                manifest={
                    "metrics": metrics,
                    "dataset_digest": self.dataset.digest,
                    "mlflow_run": self.tracker.run_id,
                    "config_digest": self.cfg.digest(),
                    "config": self.cfg.model_dump(mode="json"),
                },
            )
            self.tracker.log_metrics(position.step, metrics)
            self.tracker.log_image("samples", position.step, evaluation.sheet())
            log.info(
                "checkpoint step=%d val_l1_percent=%.2f val_psnr_db=%.2f stall_s=%.1f",
                position.step,
                metrics["val/l1_percent"],
                metrics["val/psnr_db"],
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
    """Speed since the last reading; saving does not count."""

    def __init__(self, global_batch: int) -> None:
        self.steps = 0
        self._global_batch = global_batch
        self._waited_s = 0.0
        self._since = time.perf_counter()

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield from ``batches`` and measure the wait for each one."""
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


def _newest(
    cfg: Config, checkpoints: CheckpointStore, dataset: Dataset, ranks: Ranks
) -> TrainingState | None:
    """The newest checkpoint that is intact, the same one on every rank."""
    found = checkpoints.load_newest() if ranks.first else None
    step = distributed.from_first(found[0] if found else None)
    if step is None:
        return None
    manifest = checkpoints.manifest(step)
    refuse_other_model(cfg.name, manifest, cfg.model)
    if manifest["dataset_digest"] != dataset.digest:
        log.warning("the dataset changed after step %d: training continues in another order", step)
    log.info("resuming run=%s step=%d", cfg.name, step)
    return TrainingState.read(found[1] if found else checkpoints.load(step))
