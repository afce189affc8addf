"""The batches of training and validation that a configuration asks for."""

import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from data_prep.masks import MaskSampler, MaskSettings
from data_prep.shards import Dataset
from pipeline import config
from pipeline.data.batch import Batch
from pipeline.data.batches import TrainLoader, val_batches
from pipeline.data.sample_order import dataset_misfits
from pipeline.ranks import Ranks

VALIDATION_MASKS = MaskSettings(mixture={"corrected": 1.0, "box": 1.0})
"""Masks of held-out images, whatever a recipe trains on, so that recipes are comparable."""
VALIDATION_SEED = 0
FEWEST_THREADS, MOST_THREADS = 2, 16  # of decoding, for each rank


def train_loader(cfg: config.Config, dataset: Dataset, ranks: Ranks) -> TrainLoader:
    """This rank's loader of training batches."""
    return TrainLoader(
        dataset,
        size_px=cfg.train.size_px,
        global_batch=cfg.train.global_batch,
        streams=cfg.train.streams,
        shuffle_block=cfg.train.shuffle_block,
        seed=cfg.train_seed,
        masks=MaskSampler(cfg.masks),
        mask_per_sample=cfg.masks.per_sample,
        flip=cfg.train.flip,
        threads=_decoding_threads(cfg, ranks),
        cache_bytes=int(cfg.train.cache_gib * 2**30),
        away_s=cfg.train.save_deadline_s,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


def _decoding_threads(cfg: config.Config, ranks: Ranks) -> int:
    """``train.loader_threads``; ``auto`` divides the cores of the node among its GPUs."""
    if cfg.train.loader_threads != "auto":
        return cfg.train.loader_threads
    if ranks.device.type != "cuda":
        return FEWEST_THREADS  # the networks need the cores
    share = len(os.sched_getaffinity(0)) // torch.cuda.device_count()
    return min(max(share, FEWEST_THREADS), MOST_THREADS)


def recipe_misfits(cfg: config.Config, dataset: Dataset) -> list[str]:
    """Why ``dataset`` cannot serve the recipe, one line for each fault; empty if it can."""
    return dataset_misfits(
        train_samples=dataset.samples("train"),
        val_samples=dataset.samples("val"),
        stored_px=dataset.settings["shaping"]["stored_px"],
        size_px=cfg.train.size_px,
        streams=cfg.train.streams,
        global_batch=cfg.train.global_batch,
    )


def validation_batches(
    cfg: config.Config, dataset: Dataset, ranks: Ranks, limit: int | None
) -> Iterator[Batch]:
    """This rank's share of the first ``limit`` held-out images, or of all.

    Their masks are the same for every recipe: see ``validation_definition``.
    """
    return val_batches(
        dataset,
        size_px=cfg.train.size_px,
        batch=cfg.evaluate.batch,
        masks=MaskSampler(VALIDATION_MASKS),
        seed=VALIDATION_SEED,
        rank=ranks.rank,
        world_size=ranks.world_size,
        limit=limit,
        cache_bytes=int(cfg.train.cache_gib * 2**30),
        away_s=cfg.train.save_deadline_s,
    )


def validation_definition(cfg: config.Config) -> dict[str, Any]:
    """What has to be equal, beside the dataset, for metrics of held-out images to be comparable."""
    return {
        "seed": VALIDATION_SEED,
        "size_px": cfg.train.size_px,
        "masks": _validation_masks(),
    }


def _validation_masks() -> dict[str, Any]:
    """The settings that older records have as well; the others are of kinds not drawn here."""
    masks = asdict(VALIDATION_MASKS)
    kept = ("mixture", "per_sample", "brush", "box", "folder", "white_is_hole")
    return {name: masks[name] for name in kept}
