"""Where a checkpoint came from, link by link; a flipped byte names its link."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from safetensors.numpy import save as save_tensors

from cluster.git import git_commit
from cluster.storage import open_store
from data_prep.build import SerialScheduler, build_dataset
from pipeline import cli
from pipeline.arguments.common import DONE, MISTAKE
from pipeline.checkpoints import CheckpointStore
from pipeline.config import load

pytestmark = pytest.mark.slow  # seconds together

RECIPE = """
name: traced
storage: {storage}
data: {{name: small, source: folder, root: {root}, subject: face, stored_px: 64}}
train: {{steps: 1, size_px: 64}}
tracking: {{uri: "sqlite:///{storage}/absent.db"}}
"""


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """A storage with a dataset of three images, and a checkpoint that was trained on it."""
    storage, root = tmp_path / "storage", tmp_path / "images"
    for name in "abc":
        (root / name).mkdir(parents=True)
        pixels = np.random.default_rng(ord(name)).integers(0, 255, (64, 64, 3), np.uint8)
        cv2.imwrite(str(root / name / f"{name}.png"), pixels)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(storage=storage, root=root))
    cfg = load(tmp_path / "recipe.yaml")
    url = str(storage / "datasets/small")
    dataset = build_dataset(url, cfg.data, cfg.sketch, scheduler=SerialScheduler())
    checkpoints = CheckpointStore(open_store(str(storage / "runs/traced/checkpoints")))
    checkpoints.save(
        10,
        {"ema.safetensors": save_tensors({"kernel": np.ones(4, np.float32)})},
        manifest={
            "metrics": {},
            "dataset_digest": dataset.digest,
            "config": cfg.recorded(),
            "config_digest": cfg.digest(),
            "mlflow_run": "0123456789abcdef",
            "git_commit": git_commit(),
            "ray_submission": "job-1",
        },
    )
    checkpoints.close()
    return storage


def trace(storage: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    run = str(storage / "runs/traced")
    code = cli.main(["checkpoints", "show", run, "--trace", "--json"])
    return code, {link["name"]: link for link in json.loads(capsys.readouterr().out)}


def test_the_chain_from_the_checkpoint_to_the_job_is_printed_and_checked(
    storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, links = trace(storage, capsys)
    assert code == DONE
    assert {name: link["found"] for name, link in links.items()} == {
        "checkpoint": "every byte is whole",
        "recipe": "the settings in the manifest have this digest",
        "dataset": f"{storage}/datasets/small has this digest",
        "source images": "manifest.parquet has this sha256, and 3 images",
        "detector": "recorded for every image",
        "git commit": "in this checkout",
        "MLflow run": f"not reached: sqlite:///{storage}/absent.db was not found",
        "Ray submission": "recorded",
    }
    assert links["Ray submission"]["value"] == "job-1"
    assert cli.main(["checkpoints", "show", str(storage / "runs/traced"), "--trace"]) == DONE
    assert "manifest.parquet has this sha256" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/traced/checkpoints/step-00000010/ema.safetensors", "checkpoint"),
        ("datasets/small/dataset.json", "dataset"),
        ("datasets/small/manifest.parquet", "source images"),
    ],
)
def test_a_flipped_byte_names_its_link(
    storage: Path, capsys: pytest.CaptureFixture[str], path: str, name: str
) -> None:
    data = bytearray((storage / path).read_bytes())
    data[len(data) // 2] ^= 1
    (storage / path).write_bytes(data)
    code, links = trace(storage, capsys)
    assert code == MISTAKE
    assert [link["name"] for link in links.values() if link["fault"]] == [name]


def test_links_that_cannot_be_reached_are_no_faults(
    storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (storage / "datasets/small/dataset.json").unlink()
    code, links = trace(storage, capsys)
    assert code == DONE
    assert "not reached" in links["dataset"]["found"]
