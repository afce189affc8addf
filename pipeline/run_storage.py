"""Where a recipe's data set and run are on its storage."""

from cluster.storage import Store, join, open_store
from pipeline.config import Config


def dataset_url(cfg: Config) -> str:
    return join(cfg.storage, "datasets", cfg.data.name)


def run_url(cfg: Config) -> str:
    return join(cfg.storage, "runs", cfg.name)


def run_store(cfg: Config) -> Store:
    return open_store(run_url(cfg))


def checkpoints_url(cfg: Config) -> str:
    return join(run_url(cfg), "checkpoints")
