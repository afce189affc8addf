"""The batches of training and validation that a configuration asks for."""

from collections.abc import Iterator

from data_prep.masks import MaskSampler
from data_prep.shards import Dataset
from pipeline import config
from pipeline.data.batch import Batch
from pipeline.data.batches import TrainLoader, val_batches
from pipeline.ranks import Ranks


def train_loader(cfg: config.Config, dataset: Dataset, ranks: Ranks) -> TrainLoader:
    """This rank's loader of training batches."""
    return TrainLoader(
        dataset,
        size_px=cfg.train.size_px,
        global_batch=cfg.train.global_batch,
        streams=cfg.train.streams,
        shuffle_block=cfg.train.shuffle_block,
        seed=cfg.seed,
        masks=MaskSampler(cfg.masks),
        mask_per_sample=cfg.masks.per_sample,
        flip=cfg.train.flip,
        threads=cfg.train.loader_threads,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


def validation_batches(
    cfg: config.Config, dataset: Dataset, ranks: Ranks, limit: int | None
) -> Iterator[Batch]:
    """This rank's share of the first ``limit`` held-out images, or of all."""
    return val_batches(
        dataset,
        size_px=cfg.train.size_px,
        batch=cfg.evaluate.batch,
        masks=MaskSampler(cfg.masks),
        seed=cfg.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        limit=limit,
    )
