"""Sweeps: combinations, names, what is skipped, the parent run and the comparison at the end."""

import tarfile
from pathlib import Path

import pytest

from pipeline.arguments.common import DONE
from pipeline.cli import main
from pipeline.commands.sweep import plan_sweep, split_values
from pipeline.config import ConfigError
from pipeline.tracking.database import ensure_database

FIXTURE = Path(__file__).parents[2] / "fixtures" / "before_1.0" / "storage.tar.xz"
DEMO = Path("pipeline/recipes/demo.yaml")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1", ["1"]),
        ("1,10", ["1", "10"]),
        ("{box: 1, brush: 1},{box: 1}", ["{box: 1, brush: 1}", "{box: 1}"]),
        ("[1,2]", ["[1,2]"]),
        ("'a,b',c", ["'a,b'", "c"]),
    ],
)
def test_commas_part_values_outside_of_brackets_and_quotes(text, values):
    assert split_values(text) == values


def test_every_combination_has_a_name_that_says_what_differs():
    children = plan_sweep(DEMO, ["train.l1_weight=1,10", "model.convolution=gated,partial"])
    assert [child.cfg.name for child in children] == [
        "demo-l1_weight-1-convolution-gated",
        "demo-l1_weight-1-convolution-partial",
        "demo-l1_weight-10-convolution-gated",
        "demo-l1_weight-10-convolution-partial",
    ]
    assert {child.cfg.data.name for child in children} == {"bundled"}
    assert children[2].cfg.train.l1_weight == 10


def test_settings_that_shape_the_dataset_give_each_value_a_dataset():
    children = plan_sweep(DEMO, ["sketch.threshold=0.5,0.6"])
    assert [child.cfg.data.name for child in children] == [
        "bundled-threshold-0-5",
        "bundled-threshold-0-6",
    ]


def test_mistakes_are_found_before_anything_starts():
    with pytest.raises(ValueError, match="nothing varies"):
        plan_sweep(DEMO, ["train.steps=5"])
    with pytest.raises(ConfigError, match="l1_weight"):
        plan_sweep(DEMO, ["train.l1_weight=1,nonsense"])
    with pytest.raises(ValueError, match="would be called"):
        plan_sweep(DEMO, ["train.l1_weight=1,1"])


@pytest.mark.slow
def test_a_sweep_trains_under_one_parent_and_compares(tmp_path, capfd):
    from mlflow import MlflowClient

    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    ensure_database(tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    recipe = FIXTURE.with_name("recipe.yaml")
    arguments = [
        *("sweep", str(recipe), "train.l1_weight=1,10", f"storage={tmp_path / 'storage'}"),
        *("model.width=4", "train.steps=1", "tracking.backend=mlflow", f"tracking.uri={uri}"),
    ]
    assert main(arguments) == DONE
    assert "train.l1_weight" in capfd.readouterr().out
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("deepfill").experiment_id])
    (parent,) = [run for run in runs if "project.sweep" in run.data.tags]
    children = [run for run in runs if "project.run" in run.data.tags]
    assert parent.info.status == "FINISHED"
    assert sorted(run.info.run_name for run in children) == [
        "before-l1_weight-1",
        "before-l1_weight-10",
    ]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}


@pytest.mark.slow
def test_children_that_start_together_agree_on_one_parent(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    from pipeline.tracking.mlflow import MlflowRun
    from pipeline.tracking.protocol import RunInfo

    ensure_database(tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(uri)
    experiment = client.create_experiment("sweeps")
    child = MlflowRun(RunInfo("child", "", parent="storage/sweeps/demo"), uri, "sweeps")
    child._client = MlflowClient(uri)
    create = child._client.create_run

    def late(*args, **kwargs):
        client.create_run(*args, **kwargs)  # another child comes first
        return create(*args, **kwargs)

    monkeypatch.setattr(child._client, "create_run", late)
    parent = child._parent_id(experiment)
    (run,) = client.search_runs([experiment], "tags.`project.sweep` = 'storage/sweeps/demo'")
    assert run.info.run_id == parent == child._parent_id(experiment)
