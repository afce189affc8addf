"""Each way in which a recipe does not fit the machines: the line that names it, with its cure."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.nodes import NodeAnswer
from pipeline.config import load
from pipeline.doctor.recipe import recipe_findings
from tests.pipeline.data.tiny_dataset import sample_of, write_dataset
from tests.pipeline.doctor.lines import wrong
from tests.pipeline.doctor.test_machine import DEMO, GB, facts

ONE_BOX = NodeAnswer("box", 16, 1, facts())
EIGHT = NodeAnswer("big", 128, 8, facts())


def lines(*overrides: str, nodes: list[NodeAnswer]) -> list[str]:
    return wrong(recipe_findings(load(DEMO, ["storage=/nowhere/x", *overrides]), nodes))


@pytest.mark.parametrize(
    ("overrides", "nodes", "said", "cure"),
    [
        (
            ["train.workers=2"],
            [ONE_BOX],
            "problem recipe: 2 rank(s) need one GPU each, and the cluster has 1",
            "train.workers=auto",
        ),
        (
            ["train.device=cuda"],
            [NodeAnswer("cpus", 16, 0, facts(gpus=0, gpu_bytes=0))],
            "problem recipe: 1 rank(s) need one GPU each, and the cluster has 0",
            "train.device=auto",
        ),
        (
            [],
            [EIGHT],
            "warning recipe: 8 GPUs, and train.streams=2 feeds that many ranks alone",
            "raise train.streams",
        ),
        (
            ["train.streams=4", "train.global_batch=4", "train.workers=3"],
            [EIGHT],
            "warning recipe: 4 streams on 3 ranks: some ranks serve 2 of them, others 1",
            "a divisor of 4",
        ),
        (
            ["train.global_batch=4096", "train.size_px=136"],
            [ONE_BOX],
            "warning recipe: a step of 4096 images takes about 598 GB, and a rank has 80 GB",
            "train.precision=bf16",
        ),
        (
            [],
            [NodeAnswer("box", 64, 1, facts(memory_bytes=16 * GB))],
            "warning node box: preparing runs 64 workers of about 0.6 GB, and it has 16 GB",
            "--num-cpus=24",
        ),
        (
            ["data.source=folder", "data.root=/absent/images"],
            [ONE_BOX],
            "problem recipe: data.root=/absent/images was not found",
            "correct data.root",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_is_named(
    overrides: list[str], nodes: list[NodeAnswer], said: str, cure: str
) -> None:
    (line,) = lines(*overrides, nodes=nodes)
    assert line.startswith(said)
    assert cure in line.partition("->")[2]


def test_a_recipe_that_fits_has_no_such_line() -> None:
    assert lines(nodes=[ONE_BOX]) == []


def test_a_dataset_that_does_not_fit_the_recipe_is_named(tmp_path: Path) -> None:
    url = str(tmp_path / "datasets" / "bundled")
    write_dataset(url, tmp_path / "made", [("train", [sample_of(1), sample_of(2)])])
    record = tmp_path / "datasets" / "bundled" / "dataset.json"
    record.write_text(record.read_text().replace('"shaping": {}', '"shaping": {"stored_px": 144}'))
    found = lines(f"storage={tmp_path}", nodes=[ONE_BOX])
    assert any("2 training images cannot fill one global batch of 4" in line for line in found)
    assert any("has no held-out images -> raise data.val_fraction" in line for line in found)


def test_a_damaged_dataset_is_a_problem(tmp_path: Path) -> None:
    folder = tmp_path / "datasets" / "bundled"
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text("{")
    (line,) = lines(f"storage={tmp_path}", nodes=[ONE_BOX])
    assert line.startswith("problem recipe: ")
    assert "dataset.json" in line


@pytest.mark.parametrize(
    ("overrides", "nodes", "warnings"),
    [
        (["tracking.uri=sqlite:///x.db"], [ONE_BOX, EIGHT], 1),
        (["tracking.uri=sqlite:///x.db"], [EIGHT], 0),
        (["tracking.uri=http://tracker:5000"], [ONE_BOX, EIGHT], 0),
        (["tracking.uri=sqlite:///x.db", "train.launcher=local"], [ONE_BOX, EIGHT], 0),
    ],
)
def test_a_database_that_several_nodes_may_not_share_is_named(
    overrides: list[str], nodes: list[NodeAnswer], warnings: int
) -> None:
    found = [line for line in lines(*overrides, nodes=nodes) if "MLflow" in line]
    assert len(found) == warnings
    assert all("a file of this machine, and any of 2 nodes may write to it" in x for x in found)
    assert all("start an MLflow server" in line for line in found)
