"""Where the dataset and the run of a recipe are."""

import pickle
from pathlib import Path

import pytest

from cluster.storage import StorageError
from data_prep.shards import ShardError
from pipeline import config
from pipeline.run_storage import RunStorage


def recipe(storage: str) -> config.Config:
    return config.load(
        Path("pipeline/recipes/demo.yaml"), [f"storage='{storage}'", "name=one", "data.name=small"]
    )


def test_the_dataset_and_the_run_lie_below_the_storage_of_the_recipe(tmp_path):
    storage = RunStorage.open(recipe(str(tmp_path)))
    assert storage.dataset_url == f"{tmp_path}/datasets/small"
    assert storage.run_url == storage.run.url == f"{tmp_path}/runs/one"
    assert storage.checkpoints.url == f"{tmp_path}/runs/one/checkpoints"
    assert not list(tmp_path.iterdir())  # opening touches nothing


def test_the_storage_of_a_run_travels_to_another_process():
    storage = RunStorage.open(recipe("s3://bucket/prefix"))
    assert pickle.loads(pickle.dumps(storage)).checkpoints.url == storage.checkpoints.url


def test_a_dataset_that_is_not_prepared_is_an_error_that_says_so(tmp_path):
    with pytest.raises(ShardError, match="prepare it first"):
        RunStorage.open(recipe(str(tmp_path))).open_dataset()


@pytest.mark.parametrize("storage", ["ftp://somewhere/x", ""])
def test_what_names_no_storage_is_refused(storage):
    with pytest.raises((config.ConfigError, StorageError), match="file://"):
        RunStorage.open(recipe(storage))
