"""The stage `evaluate`: measure a run's best checkpoint once, and keep the result in the run."""

import json
import logging
from collections.abc import Iterator, Mapping
from functools import partial

from cluster.storage import Store, join
from data_prep.images import encode_png
from data_prep.shards import Dataset
from pipeline import networks
from pipeline import ranks as distributed
from pipeline.checkpoints import BEST, CheckpointError, CheckpointStore
from pipeline.config import Config
from pipeline.data.batch import Batch
from pipeline.data.loaders import validation_batches, validation_definition
from pipeline.device import device_for_filling
from pipeline.evaluation.evaluator import Evaluation, evaluate
from pipeline.evaluation.metrics import METRICS
from pipeline.evaluation.shares import measured_in_shares
from pipeline.logs import configure_logs
from pipeline.progress import progress
from pipeline.ranks import Ranks
from pipeline.run_storage import RunStorage
from pipeline.tracking import open_run_tracker
from pipeline.tracking.opening import resolve_uri
from pipeline.tracking.registry import CANDIDATE, Registry, RegistryError

log = logging.getLogger(__name__)


def evaluate_run(cfg: Config, storage: RunStorage) -> dict[str, float]:
    """Measure the best checkpoint's averaged generator on held-out images.

    The metrics (see ``pipeline/evaluation/metrics.py``), one row per image, and a sheet of
    samples are kept in ``<run>/evaluation/step-<step>/``; equal settings are measured once.
    Under torchrun all ranks share the images, and the first writes. Raises CheckpointError where
    the run has no checkpoint.
    """
    with distributed.sharing_work():
        return _evaluate_run(cfg, storage)


def _evaluate_run(cfg: Config, storage: RunStorage) -> dict[str, float]:
    checkpoints = CheckpointStore(storage.checkpoints)
    step = checkpoints.best(*BEST)
    if step is None:
        raise CheckpointError(f"run {cfg.name} has no checkpoint yet: train it first")
    dataset = storage.open_dataset()
    run, folder = storage.run, f"evaluation/step-{step:08d}"
    settings = {
        "step": step,
        "dataset_digest": dataset.digest,
        **validation_definition(cfg),
        "samples": cfg.evaluate.samples,
    }
    if run.exists(f"{folder}/metrics.json"):
        known = json.loads(run.get(f"{folder}/metrics.json"))
        if known["settings"] == settings and known["metrics"].keys() == METRICS.keys():
            log.info("evaluated already best step=%d %s", step, _fields(known["metrics"]))
            register_generator(cfg, storage, checkpoints, step, known["metrics"])
            return dict(known["metrics"])

    share = partial(_measure_share, cfg, storage.checkpoints, step, dataset)
    parts = measured_in_shares(share, cfg.train.device)
    evaluation = None if parts is None else Evaluation.joined(parts, cfg.evaluate.sheet)
    metrics = distributed.from_first({} if evaluation is None else evaluation.means())
    if evaluation is None:
        return metrics
    sheet = evaluation.sheet()
    run.put(f"{folder}/samples.png", encode_png(sheet))
    run.put(f"{folder}/rows.csv", evaluation.csv().encode())
    record = {"settings": settings, "pictures": len(evaluation.rows), "metrics": metrics}
    run.put(f"{folder}/metrics.json", json.dumps(record, indent=1).encode())  # last: finished
    # The tracker resumes from the newest step, so what training logged after the best one stays.
    newest = max(checkpoints.steps())
    with open_run_tracker(cfg, storage, dataset, newest, Ranks()) as tracker:
        tracker.log_metrics(step, {f"evaluation/{name}": value for name, value in metrics.items()})
        tracker.log_image("evaluation", step, sheet)
        tracker.finish("FINISHED" if newest >= cfg.train.steps else "KILLED")
    log.info("evaluated best step=%d images=%d %s", step, len(evaluation.rows), _fields(metrics))
    register_generator(cfg, storage, checkpoints, step, metrics)
    return metrics


def register_generator(
    cfg: Config,
    storage: RunStorage,
    checkpoints: CheckpointStore,
    step: int,
    metrics: Mapping[str, float],
) -> None:
    """Make the averaged generator of ``step`` a version of ``tracking.register``, once.

    The first rank does it; the others return at once. A warning where MLflow refuses or is away.
    """
    name = cfg.tracking.register
    if name is None or not distributed.current(device=cfg.train.device).first:
        return
    weights = checkpoints.read(step, networks.EMA)
    generator = networks.read_generator(weights, f"{networks.EMA} of step {step}")
    try:
        version = Registry(resolve_uri(cfg.tracking.uri), name).register(
            experiment=cfg.tracking.experiment,
            run_url=storage.run_url,
            weights_url=join(storage.run_url, "checkpoints", checkpoints.folder(step)),
            step=step,
            weights=weights,
            options=generator.options,
            trained_px=cfg.train.size_px,
            metrics=metrics,
        )
    except RegistryError as error:  # what was measured stays
        log.warning("not registered, repeat `evaluate` to register: %s", error)
        return
    log.info("registered models:/%s/%s alias=%s", version.name, version.number, CANDIDATE)


def _measure_share(
    cfg: Config, checkpoints: Store, step: int, dataset: Dataset, share: int, shares: int
) -> Evaluation:
    """A share of the held-out images through the averaged generator of ``step``."""
    configure_logs()  # for a worker of Ray's
    device = device_for_filling(distributed.current(device=cfg.train.device))
    weights = CheckpointStore(checkpoints).read(step, networks.EMA)
    generator = networks.read_generator(weights, f"{networks.EMA} of step {step}").to(device)
    limit = None if cfg.evaluate.samples == "all" else cfg.evaluate.samples
    images = dataset.samples("val")
    mine = Ranks(share, world_size=shares)
    batches = validation_batches(cfg, dataset, mine, limit)
    advancing = _advancing(batches, -(-min(images, limit or images) // shares))
    return evaluate(generator, advancing, device=device, keep=cfg.evaluate.sheet)


def _advancing(batches: Iterator[Batch], images: int) -> Iterator[Batch]:
    with progress("evaluate", "images") as advance:
        done = 0
        for batch in batches:
            yield batch
            done += len(batch.keys)
            advance(done, images)


def _fields(metrics: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in metrics.items())
