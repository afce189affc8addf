"""The stages of a job, and all of them in order."""

import json
import logging

from cluster.session import connect, run_on_gpu
from cluster.storage import open_store
from data_prep.build import build_dataset
from data_prep.shards import Dataset
from pipeline import networks
from pipeline.checkpoints import BEST, CheckpointError, CheckpointStore
from pipeline.config import Config
from pipeline.data.loaders import validation_batches
from pipeline.evaluation.evaluator import Evaluation
from pipeline.evaluation.evaluator import evaluate as measure
from pipeline.progress import progress
from pipeline.ranks import Ranks
from pipeline.run_storage import checkpoints_url, dataset_url, run_store
from pipeline.stop_request import sigterm_interrupts
from pipeline.tracking import png
from pipeline.tracking.opening import open_run_tracker
from pipeline.train import train

log = logging.getLogger(__name__)


def run(cfg: Config) -> bool:
    """Prepare, train, evaluate; finished stages are skipped. False: stopped on request."""
    open_store(cfg.storage)  # as in prepare
    with connect():
        prepare(cfg)
        if not train(cfg):
            return False
        evaluate(cfg)
    return True


def prepare(
    cfg: Config, *, replace: bool = False, update: bool = False, retry_failed: bool = False
) -> Dataset:
    """The sharded data set of the recipe, built where it is not finished yet.

    A finished one is touched only where it is asked for: ``replace`` for other settings,
    ``update`` for pictures that came or went, ``retry_failed`` for those that could not be read.
    """
    open_store(cfg.storage)  # what is no storage is told before Ray starts
    # Inside connect: Ray takes SIGTERM for itself there.
    with connect(), sigterm_interrupts(), progress("prepare", "pictures") as advance:
        return build_dataset(
            dataset_url(cfg),
            name=cfg.data.name,
            source=cfg.data.source,
            root=cfg.data.root,
            subject=cfg.data.subject,
            stored_px=cfg.data.stored_px,
            jpeg_quality=cfg.data.jpeg_quality,
            shard_samples=cfg.data.shard_samples,
            val_fraction=cfg.data.val_fraction,
            max_pixels=cfg.data.max_pixels,
            max_failed_fraction=cfg.data.max_failed_fraction,
            split=cfg.data.split,
            partial=cfg.data.partial,
            duplicates=cfg.data.duplicates,
            replace=replace,
            update=update,
            retry_failed=retry_failed,
            threshold=cfg.sketch.threshold,
            line_width=cfg.sketch.line_width_px,
            hed_weights=cfg.sketch.hed_weights,
            hed_precision=cfg.sketch.hed_precision,
            hed_output=cfg.sketch.hed_output,
            hed_device=cfg.sketch.hed_device,
            seed=cfg.seed,
            progress=advance,
        )


def evaluate(cfg: Config) -> dict[str, float]:
    """Measure the best checkpoint's averaged generator on held-out pictures.

    The metrics (see ``pipeline/evaluation/metrics.py``), one row per image, and a sheet of
    samples are kept in ``<run>/evaluation/<step>/``; equal settings are measured once.
    """
    checkpoints = CheckpointStore(open_store(checkpoints_url(cfg)))
    step = checkpoints.best(*BEST)
    if step is None:
        raise CheckpointError(f"run {cfg.name} has no checkpoint yet: train it first")
    dataset = Dataset.open(dataset_url(cfg))
    store, folder = run_store(cfg), f"evaluation/step-{step:08d}"
    settings = {
        "step": step,
        "dataset_digest": dataset.digest,
        "seed": cfg.seed,
        "size_px": cfg.train.size_px,
        "masks": cfg.masks.model_dump(mode="json"),
        "samples": cfg.evaluate.samples,
    }
    if store.exists(f"{folder}/metrics.json"):
        known = json.loads(store.get(f"{folder}/metrics.json"))
        if known["settings"] == settings:
            log.info("evaluated already step=%d %s", step, _figures(known["metrics"]))
            return dict(known["metrics"])

    evaluation = run_on_gpu(_measure, cfg, step)
    metrics, sheet = evaluation.means(), evaluation.sheet()
    store.put(f"{folder}/samples.png", png(sheet))
    store.put(f"{folder}/rows.csv", evaluation.csv().encode())
    record = {"settings": settings, "pictures": len(evaluation.rows), "metrics": metrics}
    store.put(f"{folder}/metrics.json", json.dumps(record, indent=1).encode())  # last: finished
    # From the newest step, not from the best one: what training told after that stays.
    newest = max(checkpoints.steps())
    with open_run_tracker(cfg, dataset, newest, Ranks()) as tracker:
        tracker.log_metrics(step, {f"evaluation/{name}": value for name, value in metrics.items()})
        tracker.log_image("evaluation", step, sheet)
        tracker.finish("FINISHED" if newest >= cfg.train.steps else "KILLED")
    log.info("evaluated step=%d pictures=%d %s", step, len(evaluation.rows), _figures(metrics))
    return metrics


def _measure(cfg: Config, step: int) -> Evaluation:
    """The held-out pictures through the averaged generator of ``step``."""
    device = Ranks().device
    weights = CheckpointStore(open_store(checkpoints_url(cfg))).read(step, networks.EMA)
    generator = networks.read_generator(weights, f"{networks.EMA} of step {step}").to(device)
    limit = None if cfg.evaluate.samples == "all" else cfg.evaluate.samples
    batches = validation_batches(cfg, Dataset.open(dataset_url(cfg)), Ranks(), limit)
    return measure(generator, batches, device=device, keep=cfg.evaluate.sheet)


def _figures(metrics: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in metrics.items())
