"""Kinds of masks, sources of images and metrics are added from outside, in one file each."""

from __future__ import annotations

import importlib
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.build import SerialScheduler, build_dataset
from data_prep.manifest import describe
from data_prep.masks import MASK_KINDS, MaskSampler
from data_prep.shards import verify
from data_prep.sources import DATA_SOURCES
from pipeline.config import Config, ConfigError, load
from pipeline.data.batch import Batch
from pipeline.evaluation.evaluator import evaluate
from pipeline.evaluation.metrics import METRICS
from tests.pipeline.evaluation.test_evaluator import Gray

RECIPE = """
name: toys
storage: /nowhere
data: {name: toys, source: noise, subject: face, stored_px: 64}
masks: {mixture: {stripes: 1}}
train: {steps: 1, size_px: 64}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "toys.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def extensions() -> Iterator[None]:
    """The modules, imported as a user's own would be; the tables are restored afterwards."""
    tables: tuple[dict[str, Any], ...] = (MASK_KINDS, DATA_SOURCES, METRICS)
    before = [dict(table) for table in tables]
    for name in ("stripes", "noise", "largest"):
        importlib.reload(importlib.import_module(f"tests.extensions.{name}"))
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture
def cfg(recipe: Path, extensions: None) -> Config:
    return load(recipe)


def test_a_recipe_names_a_kind_of_mask_from_outside_and_it_is_drawn(cfg: Config) -> None:
    sampler = pickle.loads(pickle.dumps(MaskSampler(cfg.masks)))
    mask = sampler(32, 64, random.Random(0))
    assert mask.shape == (32, 64)
    assert mask.mean() == 0.25
    assert (mask[0] == mask).all()


def test_a_recipe_names_a_source_from_outside_and_a_dataset_is_built_of_it(
    cfg: Config, tmp_path: Path
) -> None:
    dataset = build_dataset(
        str(tmp_path / "set"), cfg.data, cfg.sketch, scheduler=SerialScheduler()
    )
    assert verify(dataset) == []
    keys = {
        split: [sample.key for shard in dataset.shards(split) for sample in dataset.read(shard)]
        for split in ("train", "val")
    }
    assert keys == {
        "train": [f"noise-{number}" for number in range(2, 8)],
        "val": ["noise-0", "noise-1"],
    }
    assert describe(dataset)["license"] == "CC0: nobody drew them."
    assert "CC0: nobody drew them." in (tmp_path / "set" / "README.md").read_text()


@pytest.mark.usefixtures("extensions")
def test_a_metric_from_outside_is_in_rows_means_captions_and_the_table_of_images() -> None:
    mask = torch.zeros(2, 16, 16, dtype=torch.uint8)
    mask[:, 4:8] = 1
    white = torch.full((2, 16, 16, 3), 255, dtype=torch.uint8)
    batch = Batch(white, mask, torch.zeros_like(mask), ("a", "b"))
    evaluation = evaluate(Gray(0.0), [batch], device=torch.device("cpu"), keep=1)
    assert [row.values["largest"] for row in evaluation.rows] == [0.5, 0.5]
    assert evaluation.means()["largest"] == 0.5
    assert evaluation.csv().splitlines()[0].endswith(",largest")
    assert "   largest 0.5   " in evaluation.captions()[0]


def test_without_the_extensions_the_recipe_is_refused_with_the_names_that_would_do(
    recipe: Path,
) -> None:
    with pytest.raises(ConfigError) as refused:
        load(recipe)
    assert "source 'noise' should be one of bundled, folder, " in str(refused.value)
    assert "kind 'stripes': it should be one of official, corrected, " in str(refused.value)
