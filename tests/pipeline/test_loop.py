"""A run that diverges: what it leaves, and what it says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.storage import open_store
from pipeline.arguments.common import DONE, MISTAKE
from pipeline.checkpoints import CheckpointError, CheckpointStore
from pipeline.cli import main
from pipeline.data.batch import DeviceBatch
from pipeline.goodput import HOURS, PHASES
from pipeline.loop import TrainingLoop
from pipeline.pair import NetworkPair
from pipeline.ranks import Ranks
from pipeline.step import StepResult
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
    (report,) = [line for line in ran.stderr.splitlines() if "step=1/1 " in line]
    assert re.search(r" discriminator=\d\.\d+ margin=-?\d\.\d+ ", report)
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


def trained_here(storage: Path, *overrides: str) -> int:
    """The exit code of a training in this process, which a test can disturb."""
    return main(["train", str(FIXTURE / "recipe.yaml"), f"storage={storage}", *overrides])


def spoil(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """Make a gradient of the generator NaN in the steps from ``first`` to ``last``."""
    real = NetworkPair.step

    def step(pair: NetworkPair, batch: DeviceBatch, done: int) -> StepResult:
        if not first <= done + 1 <= last:
            return real(pair, batch, done)
        parameter = next(iter(pair.generator.module.parameters()))
        hook = parameter.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))
        try:
            return real(pair, batch, done)
        finally:
            hook.remove()

    monkeypatch.setattr(NetworkPair, "step", step)


@pytest.mark.slow
def test_one_gradient_that_is_nan_costs_one_step_and_no_checkpoint(storage, monkeypatch):
    spoil(monkeypatch, 3, 3)
    assert (
        trained_here(
            *(storage, "name=once", "model.width=8", "train.steps=20", "train.save_every_steps=2"),
            *("train.log_every_steps=20", "train.keep_checkpoints=10"),
            *("evaluate.samples_while_training=1",),
        )
        == DONE
    )
    run = open_store(f"{storage}/runs/once")
    checkpoints = CheckpointStore(open_store(f"{storage}/runs/once/checkpoints"))
    assert checkpoints.steps() == [*range(2, 21, 2)]
    assert [fault for step in checkpoints.steps() for fault in checkpoints.verify(step)] == []
    (bad,) = run.get("bad_steps/step-00000003.jsonl").decode().splitlines()
    assert json.loads(bad)["position"]["step"] == 3
    assert json.loads(bad)["faults"] == ["generator gradient"]
    updates = [json.loads(checkpoints.read(s, "state.json"))["adam_steps"] for s in (2, 4, 20)]
    assert updates == [{"generator": n, "discriminator": n} for n in (2, 3, 19)]


@pytest.mark.slow
def test_a_run_that_diverges_names_the_checkpoint_that_is_healthy(storage, monkeypatch, capsys):
    run = (storage, "name=later", "model.width=8", "train.log_every_steps=2")
    assert trained_here(*run, "train.save_every_steps=1") == DONE
    checkpoints = CheckpointStore(open_store(f"{storage}/runs/later/checkpoints"))
    assert checkpoints.steps() == [1, 2]
    # The newest one is damaged: the run resumes before it, and must not call it healthy.
    checkpoints.store.put("step-00000002/ema.safetensors", b"cut short")
    spoil(monkeypatch, 2, 6)
    assert (
        trained_here(*run, "train.steps=6", "train.save_every_steps=6", "train.max_bad_steps=3")
        == MISTAKE
    )
    message = capsys.readouterr().err.splitlines()[-1]
    assert "steps in a row were not finite (train.max_bad_steps=3)" in message
    assert "the newest healthy checkpoint is that of step 1;" in message
    assert checkpoints.verify(1) == []


def test_a_save_that_fails_as_a_run_ends_does_not_hide_why_it_ends(caplog):
    def wait():
        raise CheckpointError("step 6 could not be saved")

    loop: Any = SimpleNamespace(ranks=Ranks(), checkpoints=SimpleNamespace(wait=wait, safe_step=4))
    assert TrainingLoop._healthy(loop) == "the newest healthy checkpoint is that of step 4"
    assert "the last save failed: step 6 could not be saved" in caplog.text
