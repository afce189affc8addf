"""The training loop of one rank: batches, updates, metrics, checkpoints."""

import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from cluster.git import git_commit
from cluster.session import job_metadata
from cluster.storage import join
from data_prep.images import decode
from data_prep.shards import Dataset
from models.masking import erase
from pipeline import networks
from pipeline import ranks as distributed
from pipeline.background_files import BackgroundFiles
from pipeline.checkpoints import LONGEST_WAIT_S, CheckpointStore, parse_best, refuse_other_model
from pipeline.config import Config
from pipeline.data.batch import DeviceBatch
from pipeline.data.batches import TrainLoader
from pipeline.data.loaders import train_loader, validation_batches, validation_definition
from pipeline.data.shard_cache import fetches_shards
from pipeline.device import refuse_precision, set_backends
from pipeline.errors import TrainingError
from pipeline.evaluation.evaluator import Evaluation, evaluate
from pipeline.goodput import HOURS, WallTime
from pipeline.hang_watch import HangWatch
from pipeline.health import GATES_EVERY, Alarms, readable, saturated_gates
from pipeline.interval import Interval, IntervalValues
from pipeline.lease import HeldLease
from pipeline.pair import NetworkPair, build_pair, fresh_networks
from pipeline.profiling import StepProfiler
from pipeline.progress import format_duration
from pipeline.rank_health import SlowRanks, different_replicas, own_times
from pipeline.rank_health import metrics as rank_metrics
from pipeline.ranks import Ranks
from pipeline.run_storage import RunStorage
from pipeline.schedule import learning_rates
from pipeline.state import Position, TrainingState
from pipeline.stop_request import StopRequest
from pipeline.tracking import Tracker, last_logged, open_training_tracker

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
    launched: float | None = None,
) -> Position:
    """What every rank runs, whoever launched it; collective from the first line to the last.

    Resumes from the newest checkpoint and ends at ``cfg.train.steps``, or two steps after ``stop``
    was requested on any rank. Everything is saved in both cases. Returns the last position.
    Rank 0, which saves, has the run's ``lease`` and calls ``on_step`` after each step. The wall
    time of the run counts from ``launched`` (seconds since 1970), by default from now.
    """
    device = ranks.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    refuse_precision(cfg.train.precision, device)
    set_backends(cfg.train.precision, deterministic=cfg.train.deterministic)
    if not ranks.first:
        logging.getLogger().setLevel(logging.WARNING)
    wall = _wall_time(storage, launched) if ranks.first else WallTime()
    torch.manual_seed(cfg.train_seed)  # equal initial weights on all ranks

    checkpoints = CheckpointStore(
        storage.checkpoints,
        keep=cfg.train.keep_checkpoints,
        best=parse_best(cfg.train.keep_best_by),
        keep_best=cfg.train.keep_best,
        every=cfg.train.keep_every_steps,
        save_deadline_s=cfg.train.save_deadline_s,
        # Meanwhile the other ranks wait: storage that hangs must not look like a rank that does.
        longest_wait_s=min(LONGEST_WAIT_S, cfg.train.hang_timeout_s / 2),
        before_commit=(lambda: None) if lease is None else lease.check,
        after_commit=stop.note_safe,  # at once: this rank may be waiting for the next save
    )
    if ranks.first:
        storage.run.clear_unfinished()
    state = _newest(cfg, checkpoints, dataset, ranks)
    position = state.position if state else Position()
    if checkpoints.safe_step is not None:  # the one that was loaded, on rank 0
        stop.note_safe(checkpoints.safe_step)

    generator, discriminator = fresh_networks(cfg.model, cfg.train, device)
    if not state:
        _load_initial_weights(cfg, generator=generator, discriminator=discriminator)
    pair = build_pair(cfg.model, cfg.train, generator, discriminator, ranks, state)
    with ExitStack() as stack:
        loader = train_loader(cfg, dataset, ranks)
        stack.callback(loader.close)
        tracker = stack.enter_context(
            open_training_tracker(cfg, storage, dataset, position.step, ranks)
        )
        if ranks.first and not state:
            tracker.log_image("dataset", 0, decode(dataset.store.get("contact_sheet.png")).pixels)
        stack.callback(checkpoints.close)
        watch = HangWatch(ranks, cfg.train.hang_timeout_s, excused=fetches_shards)
        stack.callback(watch.close)
        files = BackgroundFiles(storage.run)
        stack.callback(files.close)
        loop = TrainingLoop(
            *(cfg, ranks, dataset, pair, checkpoints, tracker, lease, watch, files, wall, on_step)
        )
        return loop.run(loader, position, stop)


def _wall_time(storage: RunStorage, launched: float | None) -> WallTime:
    """The wall time of the run so far, from what its earlier attempts recorded."""
    start_s = 0.0 if launched is None else max(time.time() - launched, 0.0)
    try:
        before = last_logged(storage.run, HOURS)
    except OSError as error:
        log.warning(
            "hours of earlier attempts are not counted, their record was not read: %s", error
        )
        return WallTime(before_s=start_s)
    hours = {name.removeprefix(HOURS): value for name, value in before.values.items()}
    return WallTime(hours, before.lost_s or start_s)


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
    ranks: Ranks
    dataset: Dataset
    pair: NetworkPair
    checkpoints: CheckpointStore
    tracker: Tracker
    lease: HeldLease | None
    watch: HangWatch
    files: BackgroundFiles
    wall: WallTime
    on_step: Callable[[int], None]
    alarms: Alarms = field(default_factory=Alarms)
    slow_ranks: SlowRanks = field(default_factory=SlowRanks)
    gates: tuple[int, float] | None = None
    """Step at which the share of saturated gates was measured last, and this share."""

    def run(self, loader: TrainLoader, position: Position, stop: StopRequest) -> Position:
        cfg, device = self.cfg.train, self.ranks.device
        vote = distributed.Vote(timedelta(seconds=1800))
        left = False
        interval, reported = Interval(self.ranks.weight(cfg.streams)), position.step
        profiler = self._profiler()
        for epoch, epoch_step, batch in self.wall.waiting(
            loader.batches(position.epoch, position.epoch_step), compiles=cfg.compile
        ):
            if profiler:
                profiler.before(position.step + 1)
            on_device = batch.to(device)
            result = self.pair.step(on_device, position.step)
            self.wall.enter("training")
            position = Position(position.step + 1, epoch, epoch_step + 1)
            interval.add(position, batch.keys, result)
            self.watch.progress(position.step)
            if profiler:
                profiler.after(position.step)

            if self.ranks.first:
                self.checkpoints.raise_failure()
                self.on_step(position.step)
            if self.lease is not None and self.lease.lost:
                self.lease.check()
            last = position.step >= cfg.steps
            stopping, leaving = vote.ask(stop.requested, stop.leaving)
            if last or stopping or position.step % cfg.log_every_steps == 0:
                self._report(position, interval, on_device, position.step - reported)
                reported = position.step
            every = cfg.check_replicas_every_steps
            if every and position.step % every == 0:
                self._check_replicas(position.step)
            if last or position.step % cfg.save_every_steps == 0:
                with self.wall.within("saving"), self.watch.during("the save"):
                    self._save(position, stop, validate=last or not (stopping or leaving))
            elif stopping or (leaving and not left):
                # The launcher kills this process after some seconds.
                log.warning("saving step=%d: %s", position.step, "stop" if stopping else "leave")
                with self.wall.within("saving"), self.watch.during("the save"):
                    self._save(position, stop, validate=False)
            left = left or leaving
            if last or stopping:
                break
        if profiler:
            profiler.close()
        vote.close()
        self.watch.close()
        if self.ranks.first:
            with self.wall.within("saving"):
                self.checkpoints.wait()  # a run is finished once its last checkpoint is committed
            self.tracker.log_metrics(position.step, self.wall.hours())
            log.info("wall time of the run %s", self.wall.summary())
        self.tracker.finish("FINISHED" if position.step >= cfg.steps else "KILLED")
        return position

    def _profiler(self) -> StepProfiler | None:
        steps = self.cfg.train.profile_steps
        if steps is None or not self.ranks.first:
            return None

        def keep(name: str, trace: bytes) -> None:
            self.files.put(name, trace)
            self.tracker.log_artifact(name, trace)

        return StepProfiler(*steps, keep)

    def _check_replicas(self, step: int) -> None:
        """Raise TrainingError where the ranks do not hold equal weights."""
        if self.ranks.world_size == 1:
            return
        fault = different_replicas(
            {
                "generator": self.pair.generator.module.parameters(),
                "discriminator": self.pair.discriminator.module.parameters(),
                "averaged generator": self.pair.average.module.parameters(),
            }
        )
        if fault is not None:
            raise TrainingError(
                f"the ranks hold different weights at step {step}: {fault}; a GPU or memory is "
                f"faulty, or the ranks compute on several kinds of GPUs; {self._healthy()}: run "
                "the same command without that node, or set train.check_replicas_every_steps=null"
            )

    def _measure_gates(self, step: int, batch: DeviceBatch) -> None:
        """Look at the gates again, at most every ``GATES_EVERY`` steps."""
        if self.gates is not None and step - self.gates[0] < GATES_EVERY:
            return
        share = saturated_gates(
            self.pair.generator.module,
            erase(batch.image, batch.mask),
            batch.mask,
            batch.sketch if self.cfg.model.guided else None,
        )
        if share is not None:
            mean = distributed.mean({"share": share}, self.ranks.device)
            self.gates = step, mean["share"]

    def _report(
        self, position: Position, interval: Interval, batch: DeviceBatch, steps: int
    ) -> None:
        """Log what the last ``steps`` did; ``batch`` is that of the last one."""
        device = self.ranks.device
        values = interval.read(device)
        self._measure_gates(position.step, batch)
        means = readable(values.means) | self.wall.speeds(steps, self.cfg.train.global_batch)
        if self.gates is not None:
            means["health/saturated_gates"] = self.gates[1]
        times = distributed.gathered(
            own_times(
                values.forward_ms / self.ranks.weight(self.cfg.train.streams),
                means["speed/data_wait_ms"],
                device,
            )
        )
        means |= rank_metrics(times)
        rates = learning_rates(self.cfg.train, position.step - 1)
        means["lr/generator"], means["lr/discriminator"] = rates
        adversarial = position.step > self.cfg.train.discriminator_start_step
        means["health/bad_steps"] = float(len(values.bad))
        alarms = self.alarms.look(position.step, means)
        means |= self.alarms.metrics()
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
        if self.ranks.first:
            for sentence in self.slow_ranks.look(times):
                log.warning("%s", sentence)
            for name, sentence in alarms.items():
                log.warning("alarm at step %d: %s", position.step, sentence)
                self.tracker.log_tag(f"project.alarm.{name}", f"step {position.step}: {sentence}")
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
            self.files.put(f"bad_steps/step-{last.position.step:08d}.jsonl", record.encode())
        if values.in_a_row >= self.cfg.train.max_bad_steps:
            raise TrainingError(
                f"{values.in_a_row} steps in a row were not finite (train.max_bad_steps="
                f"{self.cfg.train.max_bad_steps}), the last at step {last.position.step}: the "
                f"{last.faults[0]} first, with the batch {', '.join(last.keys)}; "
                f"{self._healthy()}; {self._advice()}"
            )

    def _healthy(self) -> str:
        """Which checkpoint a run that ends now leaves. Collective: all ranks end, and say so.

        By what rank 0 has loaded and saved: a newer one may lie there, which it passed over.
        """
        if self.ranks.first:
            try:
                self.checkpoints.wait()
            except Exception as error:  # the run ends for another reason, and others wait
                log.warning("the last save failed: %s", error)
        step = distributed.from_first(self.checkpoints.safe_step)
        if step is None:
            return "no checkpoint was saved"
        return f"the newest healthy checkpoint is that of step {step}"

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
        """Write a checkpoint; ``validate`` the averaged generator first, if there is time."""
        with self.wall.within("validation"):
            evaluation = self._validate(stop) if validate else None
        metrics = {}
        if evaluation is not None:
            metrics = {f"val/{k}": v for k, v in evaluation.means(distributed.total).items()}
        # Collective at ZeRO stages 1 and 2, so on every rank; only rank 0 writes.
        started = time.perf_counter()
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
            header = networks.weights_header(self.cfg.model)
            files = partial(state.copied().files, header, metrics=metrics)

            def contents() -> Mapping[str, bytes]:
                self.tracker.flush()  # whatever resumes here has the metrics of all steps before
                return files()

            if evaluation is not None:
                folder = self.checkpoints.folder(position.step)
                self.tracker.log_checkpoint(
                    position.step, join(self.checkpoints.url, folder), metrics
                )
            self.checkpoints.save(
                position.step,
                contents,
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
            stall_s = time.perf_counter() - started
            if evaluation is not None:
                self.tracker.log_image("samples", position.step, evaluation.sheet())
            measured = "".join(
                f" val_{name}={metrics[f'val/{name}']:.2f}"
                for name in ("l1_percent", "psnr_db")
                if f"val/{name}" in metrics  # a stop saves without a validation
            )
            log.info("checkpoint step=%d%s stall_s=%.3f", position.step, measured, stall_s)

    def _validate(self, stop: StopRequest) -> Evaluation | None:
        """None where a stop was requested meanwhile, or a node is about to go, on any rank."""

        def hurry() -> bool:
            return stop.requested or stop.leaving

        batches = validation_batches(
            self.cfg, self.dataset, self.ranks, self.cfg.evaluate.samples_while_training
        )
        evaluation = evaluate(
            self.pair.average.module,
            itertools.takewhile(lambda _: not hurry(), self.watch.each(batches)),
            device=self.ranks.device,
            keep=self.cfg.evaluate.sheet if self.ranks.first else 0,
        )
        if any(distributed.gathered(hurry())):
            return None
        return evaluation


def _adversarial_fields(means: Mapping[str, float]) -> str:
    names = ("loss/adversarial", "loss/discriminator", "score/margin")
    values = ((name.partition("/")[2], means.get(name, math.nan)) for name in names)
    return "".join(f"{name}={value:.4f} " for name, value in values)


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
