"""Held-out images get the same holes in every run; threads follow the machine."""

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.shards import Dataset
from pipeline.config import Config
from pipeline.data import loaders
from pipeline.data.batch import Batch
from pipeline.data.loaders import train_loader, validation_batches, validation_definition
from pipeline.data.reader import BatchReader
from pipeline.ranks import Ranks
from tests.pipeline.data.tiny_dataset import shards_of, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("tiny")
    shards = [*shards_of([8], "train"), *shards_of([5], "val")]
    write_dataset(str(folder / "set"), folder / "made", shards)
    return Dataset.open(str(folder / "set"))


def config(**changes: Any) -> Config:
    tree: dict[str, Any] = {
        "name": "tiny",
        "storage": "/nowhere",
        "data": {"name": "tiny", "source": "folder", "root": "/nowhere"},
        "train": {"steps": 1, "size_px": 32, "global_batch": 2, "streams": 1},
    }
    return Config.model_validate(tree | changes)


def held_out(dataset: Dataset, cfg: Config) -> list[Batch]:
    return list(validation_batches(cfg, dataset, Ranks(), None))


def test_two_recipes_validate_on_the_same_holes_although_they_train_on_others(
    dataset: Dataset, tmp_path: Path
) -> None:
    first = config()
    second = config(seed=7, masks={"mixture": {"brush": 1}, "box": {"min_side": 0.1}})
    for one, other in zip(held_out(dataset, first), held_out(dataset, second), strict=True):
        assert one.keys == other.keys
        np.testing.assert_array_equal(one.mask, other.mask)
        np.testing.assert_array_equal(one.image, other.image)
    assert validation_definition(first) == validation_definition(second)
    masks = []
    for cfg in (first, second):
        with train_loader(cfg, dataset, Ranks()) as loader:
            masks.append(next(loader.batches())[2].mask)
    assert not np.array_equal(masks[0], masks[1])


def test_the_definition_of_validation_names_its_masks_seed_and_size() -> None:
    definition = validation_definition(config())
    assert definition["masks"]["mixture"] == {"corrected": 1, "box": 1}
    assert (definition["seed"], definition["size_px"]) == (0, 32)


@pytest.mark.parametrize(
    ("cores", "gpus", "threads"), [(64, 8, 8), (128, 4, 16), (4, 4, 2), (2, 0, 2)]
)
def test_auto_gives_each_gpu_its_share_of_the_cores_for_decoding(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, cores: int, gpus: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    device = torch.device("cuda" if gpus else "cpu", 0)
    monkeypatch.setattr(Ranks, "device", device)
    used: list[int] = []
    monkeypatch.setattr(loaders, "TrainLoader", lambda _, **given: used.append(given["threads"]))
    size = {"steps": 1, "size_px": 32, "global_batch": 2, "streams": 1}
    train_loader(config(train=size | {"loader_threads": "auto"}), dataset, Ranks())
    assert used == [threads]


def test_threads_that_pin_memory_use_the_gpu_of_their_rank(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: dict[str, int] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda,
        "set_device",
        lambda number: chosen.setdefault(threading.current_thread().name, number),
    )
    reader = BatchReader(dataset, "train", threads=1)
    assert list(reader.in_order([lambda: 1])) == [1]
    reader.close()
    assert list(chosen.values()) == [3]
    assert next(iter(chosen)).startswith("decode")
