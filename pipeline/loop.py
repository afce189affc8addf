"""The training loop of one rank: batches, updates, metrics, checkpoints."""

import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
from torch import nn

from cluster.git import git_commit
from cluster.session import job_metadata
from cluster.storage import join
from data_prep.images import decode
from data_prep.shards import Dataset
from pipeline import networks
from pipeline import ranks as distributed
from pipeline.checkpoints import CheckpointStore, parse_best, refuse_other_model
from pipeline.config import Config
from pipeline.data.batches import TrainLoader
from pipeline.data.loaders import train_loader, validation_batches, validation_definition
from pipeline.device import memory_explained, refuse_precision, set_backends
from pipeline.errors import TrainingError
from pipeline.evaluation.evaluator import Evaluation, evaluate
from pipeline.hang_watch import HangWatch
from pipeline.interval import Interval, IntervalValues
from pipeline.lease import HeldLease
from pipeline.pair import NetworkPair, build_pair, fresh_networks
from pipeline.progress import format_duration
from pipeline.ranks import Ranks
from pipeline.run_storage import RunStorage
from pipeline.schedule import learning_rates
from pipeline.state import Position, TrainingState
from pipeline.stop_request import StopRequest
from pipeline.tracking import Tracker, open_training_tracker

log = logging.getLogger(__name__)

T = TypeVar("T")


def train_on_rank(
    cfg: Config,
    storage: RunStorage,
    dataset: Dataset,
    ranks: Ranks,
    stop: StopRequest,
    lease: HeldLease | None,
    on_step: Callable[[int], None] = lambda step: None,
) -> Position:
    """What every rank runs, whoever launched it; collective from the first line to the last.

    Resumes from the newest checkpoint and ends at ``cfg.train.steps``, or two steps after ``stop``
    was requested on any rank. Everything is saved in both cases. Returns the last position.
    Rank 0, which saves, has the run's ``lease`` and calls ``on_step`` after each step.
    """
    device = ranks.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    refuse_precision(cfg.train.precision, device)
    set_backends(cfg.train.precision, deterministic=cfg.train.deterministic)
    if not ranks.first:
        logging.getLogger().setLevel(logging.WARNING)
    torch.manual_seed(cfg.train_seed)  # equal initial weights on all ranks

    checkpoints = CheckpointStore(
        storage.checkpoints,
        keep=cfg.train.keep_checkpoints,
        best=parse_best(cfg.train.keep_best_by),
        keep_best=cfg.train.keep_best,
        every=cfg.train.keep_every_steps,
        save_deadline_s=60 * cfg.train.save_deadline_minutes,
        before_commit=(lambda: None) if lease is None else lease.check,
    )
    if ranks.first:
        storage.run.clear_unfinished()
    state = _newest(cfg, checkpoints, dataset, ranks)
    position = state.position if state else Position()

    generator, discriminator = fresh_networks(cfg.model, cfg.train, device)
    if not state:
        _load_initial_weights(cfg, generator=generator, discriminator=discriminator)
    pair = build_pair(cfg.model, cfg.train, generator, discriminator, ranks, state)
    with memory_explained(cfg.train), ExitStack() as stack:
        loader = train_loader(cfg, dataset, ranks)
        stack.callback(loader.close)
        tracker = stack.enter_context(
            open_training_tracker(cfg, storage, dataset, position.step, ranks)
        )
        if ranks.first and not state:
            tracker.log_image("dataset", 0, decode(dataset.store.get("contact_sheet.png")).pixels)
        stack.callback(checkpoints.close)
        watch = HangWatch(ranks, cfg.train.hang_timeout_s)
        stack.callback(watch.close)
        loop = TrainingLoop(
            cfg, storage, ranks, dataset, pair, checkpoints, tracker, lease, watch, on_step
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
    """One rank's networks and outputs, and the loop over batches."""

    cfg: Config
    storage: RunStorage
    ranks: Ranks
    dataset: Dataset
    pair: NetworkPair
    checkpoints: CheckpointStore
    tracker: Tracker
    lease: HeldLease | None
    watch: HangWatch
    on_step: Callable[[int], None]

    def run(self, loader: TrainLoader, position: Position, stop: StopRequest) -> Position:
        cfg, device = self.cfg.train, self.ranks.device
        vote = distributed.Vote(timedelta(seconds=1800))
        left = False
        clock, interval = _Clock(cfg.global_batch), Interval(self.ranks.weight(cfg.streams))
        for epoch, epoch_step, batch in clock.waiting(
            loader.batches(position.epoch, position.epoch_step)
        ):
            result = self.pair.step(batch.to(device), position.step)
            position = Position(position.step + 1, epoch, epoch_step + 1)
            interval.add(position, batch.keys, result)
            clock.steps += 1
            self.watch.progress(position.step)

            if self.ranks.first:
                self.checkpoints.raise_failure()
                self._note_safe(stop)
                self.on_step(position.step)
            if self.lease is not None and self.lease.lost:
                self.lease.check()
            last = position.step >= cfg.steps
            stopping, leaving = vote.ask(stop.requested, stop.leaving)
            if last or stopping or position.step % cfg.log_every_steps == 0:
                self._report(position, interval, clock)
            if last or position.step % cfg.save_every_steps == 0:
                self._save(position, stop, validate=last or not stopping)
                clock.restart()  # the speed of training leaves saving out
            elif stopping or (leaving and not left):
                # The launcher kills this process after some seconds.
                log.warning("saving step=%d: %s", position.step, "stop" if stopping else "leave")
                self._save(position, stop, validate=False)
                clock.restart()
            left = left or leaving
            if last or stopping:
                break
        vote.close()
        self.watch.close()
        if self.ranks.first:
            self.checkpoints.wait()  # a run is finished once its last checkpoint is committed
            self._note_safe(stop)
        self.tracker.finish("FINISHED" if position.step >= cfg.steps else "KILLED")
        return position

    def _note_safe(self, stop: StopRequest) -> None:
        if (step := self.checkpoints.safe_step) is not None:
            stop.note_safe(step)

    def _report(self, position: Position, interval: Interval, clock: "_Clock") -> None:
        """Log what the last steps did."""
        device = self.ranks.device
        values = interval.read(device)
        means = values.means | clock.read()
        rates = learning_rates(self.cfg.train, position.step - 1)
        means["lr/generator"], means["lr/discriminator"] = rates
        adversarial = position.step > self.cfg.train.discriminator_start_step
        for network in ("generator", "discriminator") if adversarial else ("generator",):
            squared = means.pop(f"health/squared_grad_norm_{network}", math.nan)
            means[f"health/grad_norm_{network}"] = math.sqrt(squared)
        means["health/bad_steps"] = float(len(values.bad))
        self.tracker.log_metrics(position.step, means)
        left_s = (self.cfg.train.steps - position.step) / means["speed/steps_per_s"]
        log.info(
            "step=%d/%d epoch=%d l1=%.4f %simages_per_s=%.1f left=%s",
            position.step,
            self.cfg.train.steps,
            position.epoch,
            means.get("loss/l1_refined", math.nan),
            _adversarial_fields(means) if adversarial else "",
            means["speed/images_per_s"],
            format_duration(left_s),
        )
        if values.bad:
            self._report_bad_steps(values)

    def _report_bad_steps(self, values: IntervalValues) -> None:
        """Write down the samples of bad steps. Raises TrainingError after too many in a row."""
        bad = [
            replace(step, keys=tuple(itertools.chain(*keys)))
            for step, keys in zip(
                values.bad,
                zip(*distributed.gathered([step.keys for step in values.bad]), strict=True),
                strict=True,
            )
        ]
        last = bad[-1]
        if self.ranks.first:
            log.warning(
                "steps changed nothing, something was not finite: count=%d last=%d first_fault=%r "
                "keys=%s",
                len(bad),
                last.position.step,
                last.faults[0],
                ",".join(last.keys),
            )
            record = "".join(json.dumps(asdict(step)) + "\n" for step in bad)
            try:
                self.storage.run.put(
                    f"bad_steps/step-{last.position.step:08d}.jsonl", record.encode()
                )
            except OSError as error:  # training continues while storage is away
                log.warning("bad steps were not written down: %s", error)
        if values.in_a_row >= self.cfg.train.max_bad_steps:
            raise TrainingError(
                f"{values.in_a_row} steps in a row were not finite (train.max_bad_steps="
                f"{self.cfg.train.max_bad_steps}), the last at step {last.position.step}: the "
                f"{last.faults[0]} first, with the batch {', '.join(last.keys)}; "
                f"{self._healthy()}; {self._advice()}"
            )

    def _healthy(self) -> str:
        """Which checkpoint a run that ends now leaves."""
        self.checkpoints.wait()
        newest = self.checkpoints.newest()
        if newest is None:
            return "no checkpoint was saved"
        return f"the newest checkpoint, of step {newest}, is healthy"

    def _advice(self) -> str:
        cfg = self.cfg.train
        settings = [f"lower train.learning_rate (now {cfg.learning_rate:g})"]
        if cfg.gan_weight > 0.1:
            settings.append("set train.gan_weight=0.1")
        if cfg.l1_weight < 10:
            settings.append("set train.l1_weight=10")
        if cfg.precision != "fp32":
            settings.append("set train.precision=fp32")
        return " or ".join(settings)

    def _save(self, position: Position, stop: StopRequest, *, validate: bool) -> None:
        """Write a checkpoint; ``validate`` the averaged generator first, unless a stop comes."""
        started = time.perf_counter()
        evaluation = self._validate(stop) if validate else None
        metrics = {}
        if evaluation is not None:
            metrics = {f"val/{k}": v for k, v in evaluation.means(distributed.total).items()}
        # Collective at ZeRO stages 1 and 2, so on every rank; only rank 0 writes.
        pair = self.pair
        state = TrainingState(
            position, pair.generator.state(), pair.discriminator.state(), pair.average.weights()
        )
        faults = [name for name, value in metrics.items() if not math.isfinite(value)]
        # Decided by rank 0, so that all ranks end together.
        if faults := distributed.from_first(faults + state.not_finite()):
            raise TrainingError(
                f"step {position.step} was not saved, since {faults[0]} is not finite; "
                f"{self._healthy()}; {self._advice()}"
            )
        if self.ranks.first:
            job = job_metadata()
            self.checkpoints.save(
                position.step,
                state.files(networks.weights_header(self.cfg.model), metrics=metrics),
                manifest={
                    "metrics": metrics,
                    "validation": validation_definition(self.cfg)
                    | {"samples": self.cfg.evaluate.samples_while_training},
                    "dataset_digest": self.dataset.digest,
                    "mlflow_run": self.tracker.run_id,
                    "config_digest": self.cfg.digest(),
                    "lease_token": self.lease.lease.token if self.lease else 0,
                    "config": self.cfg.recorded(),
                    "git_commit": job.get("git_commit") or git_commit() or "",
                    "ray_submission": job.get("job_submission_id") or "",
                },
            )
            if evaluation is not None:
                folder = self.checkpoints.folder(position.step)
                self.tracker.log_checkpoint(
                    position.step, join(self.checkpoints.url, folder), metrics
                )
                self.tracker.log_image("samples", position.step, evaluation.sheet())
            log.info(
                "checkpoint step=%d val_l1_percent=%.2f val_psnr_db=%.2f stall_s=%.1f",
                position.step,
                metrics.get("val/l1_percent", math.nan),
                metrics.get("val/psnr_db", math.nan),
                time.perf_counter() - started,
            )

    def _validate(self, stop: StopRequest) -> Evaluation | None:
        """None where a stop was requested meanwhile, on any rank."""
        batches = validation_batches(
            self.cfg, self.dataset, self.ranks, self.cfg.evaluate.samples_while_training
        )
        evaluation = evaluate(
            self.pair.average.module,
            itertools.takewhile(lambda _: not stop.requested, self.watch.each(batches)),
            device=self.ranks.device,
            keep=self.cfg.evaluate.sheet if self.ranks.first else 0,
        )
        if any(distributed.gathered(stop.requested)):
            return None
        return evaluation


def _adversarial_fields(means: Mapping[str, float]) -> str:
    names = ("loss/adversarial", "loss/discriminator", "score/margin")
    values = ((name.partition("/")[2], means.get(name, math.nan)) for name in names)
    return "".join(f"{name}={value:.4f} " for name, value in values)


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
    if manifest.dataset_digest != dataset.digest:
        log.warning("the dataset changed after step %d: training continues in another order", step)
    log.info("resuming run=%s step=%d", cfg.name, step)
    return TrainingState.read(found[1] if found else checkpoints.load(step))
