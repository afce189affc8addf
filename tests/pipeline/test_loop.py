"""A run that diverges: what it leaves, and what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.storage import open_store
from pipeline.arguments.common import DONE, MISTAKE
from pipeline.checkpoints import CheckpointStore
from pipeline.goodput import HOURS, PHASES
from pipeline.tracking.history import read_history
from tests.small_dataset import FIXTURE, unpack_dataset

DIVERGING = ("train.learning_rate=1e10", "train.steps=20")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with a small dataset."""
    return unpack_dataset(tmp_path_factory.mktemp("diverging"))


def trained(storage: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "pipeline", "train", str(FIXTURE / "recipe.yaml")),
            *(f"storage={storage}", *overrides),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_diverged_run_commits_nothing_and_the_same_run_trains_with_sane_settings(storage):
    checkpoints = CheckpointStore(open_store(f"{storage}/runs/poisoned/checkpoints"))
    ran = trained(storage, "name=poisoned", *DIVERGING, "train.save_every_steps=1")
    assert ran.returncode == MISTAKE
    message = ran.stderr.splitlines()[-1]
    assert "step 1 was not saved" in message
    assert "no checkpoint was saved; lower train.learning_rate (now 1e+10)" in message
    assert checkpoints.steps() == []
    ran = trained(storage, "name=poisoned", "train.steps=1")
    assert ran.returncode == DONE, ran.stderr[-4000:]
    assert checkpoints.verify(1) == []
    assert "wall time of the run hours=" in ran.stderr
    curves = read_history(open_store(f"{storage}/runs/poisoned")).curves
    assert {f"{HOURS}{phase}" for phase in PHASES} <= curves.keys()
    assert {
        "health/coarse_contrast",
        "health/saturated_gates",
        "health/l1_in_hole",
    } <= curves.keys()
    assert curves["health/alarm_dead_discriminator"].values.tolist() == [0.0]
    assert curves["speed/peak_memory_gib"].values[-1] > 0.05


def test_too_many_bad_steps_in_a_row_end_the_run_with_a_diagnosis(storage):
    ran = trained(
        *(storage, "name=stuck", *DIVERGING, "train.max_bad_steps=3"),
        *("train.log_every_steps=5", "train.save_every_steps=100"),
    )
    assert ran.returncode == MISTAKE
    message = ran.stderr.splitlines()[-1]
    assert "4 steps in a row were not finite (train.max_bad_steps=3)" in message
    assert "the generator output first, with the batch scene_" in message
    run = open_store(f"{storage}/runs/stuck")
    record = run.get("bad_steps/step-00000005.jsonl").decode().splitlines()
    assert [json.loads(line)["position"]["step"] for line in record] == [2, 3, 4, 5]
    assert all(len(json.loads(line)["keys"]) == 2 for line in record)
