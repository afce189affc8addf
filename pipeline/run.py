"""The stages of a job in order: prepare, train, evaluate."""

from cluster.session import connect
from cluster.storage import open_store
from data_prep.build import build_dataset
from data_prep.settings import BuildOptions
from data_prep.shards import Dataset
from data_prep.sources import refuse_missing_root
from pipeline.config import Config
from pipeline.evaluation.job import evaluate_run
from pipeline.progress import progress
from pipeline.run_storage import RunStorage
from pipeline.stop_request import sigterm_interrupts
from pipeline.train import refuse_missing_room, train


def run(cfg: Config, storage: RunStorage, *, replace: bool = False) -> bool:
    """Prepare, train, evaluate; finished stages are skipped. False: stopped on request.

    ``replace`` builds over a dataset of other settings.
    """
    refuse_missing_images(cfg, storage)
    with connect():
        refuse_missing_room(cfg, storage)
        prepare(cfg, storage, replace=replace)
        if not train(cfg, storage):
            return False
        with sigterm_interrupts():
            evaluate_run(cfg, storage)
    return True


def prepare(
    cfg: Config,
    storage: RunStorage,
    *,
    replace: bool = False,
    update: bool = False,
    retry_failed: bool = False,
) -> Dataset:
    """The sharded dataset of the recipe, built where it is not finished yet.

    A finished one changes only on request: ``replace`` builds over one of other settings,
    ``update`` follows images that came or went, ``retry_failed`` reads those again that failed.
    """
    refuse_missing_images(cfg, storage)
    # Inside connect: Ray takes SIGTERM for itself there.
    with connect(), sigterm_interrupts(), progress("prepare", "images") as advance:
        return build_dataset(
            storage.dataset_url,
            cfg.data,
            cfg.sketch,
            seed=cfg.data_seed,
            options=BuildOptions(replace=replace, update=update, retry_failed=retry_failed),
            progress=advance,
        )


def refuse_missing_images(cfg: Config, storage: RunStorage) -> None:
    """Raise before Ray starts where there are no images to prepare; finished ones need none."""
    if not open_store(storage.dataset_url).exists("dataset.json"):
        refuse_missing_root(cfg.data)
