"""What version 0.1 wrote opens, verifies and resumes (see tests/fixtures/before_1.0/README.md)."""

import contextlib
import os
import subprocess
import sys
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_prep.shards import ShardError, verify
from pipeline import config
from pipeline.arguments.common import DONE, MISTAKE
from pipeline.checkpoints import BEST, CheckpointStore
from pipeline.checkpoints.urls import list_checkpoints
from pipeline.run import prepare
from pipeline.run_storage import RunStorage
from pipeline.state import Position, TrainingState
from pipeline.tracking.history import read_history
from pipeline.train import with_its_masks

FIXTURE = Path(__file__).parent / "fixtures" / "before_1.0"
DIGEST = "2de1f326185b81bb37e9e0d434a63ec6b2de5c108839eb00b47efc7158a081f6"


@pytest.fixture
def cfg(tmp_path: Path) -> config.Config:
    with tarfile.open(FIXTURE / "storage.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return config.load(FIXTURE / "recipe.yaml", [f"storage={tmp_path / 'storage'}"])


def test_a_resumed_run_draws_its_masks_as_it_began(cfg):
    checkpoints = CheckpointStore(RunStorage.open(cfg).checkpoints)
    assert cfg.masks.drawing == 2
    assert with_its_masks(cfg, checkpoints).masks.drawing == 1


def expected(part: str, name: str, shape: torch.Size) -> Tensor:
    """The value that every element of a tensor in the checkpoint has."""
    return torch.full(shape, (zlib.crc32(f"{part}/{name}".encode()) % 997 + 1) * 1e-6)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_dataset_opens_with_its_digest_and_every_byte_verifies(cfg):
    dataset = RunStorage.open(cfg).open_dataset()
    assert dataset.digest == DIGEST
    assert verify(dataset) == []


def test_prepare_with_the_old_recipe_finds_the_dataset_finished(cfg, monkeypatch):
    monkeypatch.setattr("pipeline.run.connect", contextlib.nullcontext)  # Ray has nothing to do
    storage = RunStorage.open(cfg)
    before = contents(Path(storage.dataset_url))
    assert prepare(cfg, storage).digest == DIGEST
    assert contents(Path(storage.dataset_url)) == before


def test_the_checkpoint_is_listed_and_every_tensor_loads_as_it_was_saved(cfg):
    storage = RunStorage.open(cfg)
    (info,) = list_checkpoints(storage.run_url)
    assert (info.step, round(info.metrics["val/psnr_db"], 2)) == (2, 17.66)
    checkpoints = CheckpointStore(storage.checkpoints)
    assert checkpoints.verify(2) == []
    assert checkpoints.best(*BEST) == 2
    state = TrainingState.read(checkpoints.load(2))
    assert state.position == Position(step=2, epoch=0, epoch_step=2)
    tensors = {"ema": state.ema}
    for part in ("generator", "discriminator"):
        engine = getattr(state, part)
        assert engine.steps == 2
        assert engine.moments.keys() == {
            f"{moment}.{name}"
            for moment in ("exp_avg", "exp_avg_sq")
            for name in engine.weights
            if not name.endswith(("_u", "_v"))
        }
        tensors[part] = engine.weights | engine.moments
    for part, named in tensors.items():
        for name, value in named.items():
            assert torch.equal(value, expected(part, name, value.shape)), f"{part} {name}"


def resumed(cfg: config.Config, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "pipeline", "train", str(FIXTURE / "recipe.yaml")),
            *(f"storage={cfg.storage}", *overrides),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_the_run_resumes_from_the_checkpoint(cfg):
    ran = resumed(cfg, "train.steps=3")
    assert ran.returncode == DONE, ran.stderr[-4000:]
    assert "resuming run=before step=2" in ran.stderr
    storage = RunStorage.open(cfg)
    checkpoints = CheckpointStore(storage.checkpoints)
    assert checkpoints.steps() == [2, 3]
    state = TrainingState.read(checkpoints.load(3))
    assert state.generator.steps == state.discriminator.steps == 3
    assert read_history(storage.run).curves["loss/l1_refined"].steps.tolist() == [1, 2, 3]


def test_an_empty_newest_manifest_does_not_block_training(cfg):
    checkpoints = RunStorage.open(cfg).checkpoints
    checkpoints.put("step-00000003/manifest.json", b"")
    ran = resumed(cfg, "train.steps=3")
    assert ran.returncode == DONE, ran.stderr[-4000:]
    assert "resuming run=before step=2" in ran.stderr
    assert CheckpointStore(checkpoints).verify(3) == []


def test_a_run_that_cannot_save_ends_with_one_line_and_the_step_that_is_safe(cfg, tmp_path):
    """The folder of the next checkpoint is a file: that is refused, and not repeated."""
    (Path(RunStorage.open(cfg).checkpoints.url) / "step-00000003").write_text("in the way")
    ran = resumed(cfg, "train.steps=3")
    assert ran.returncode == MISTAKE
    assert "step 3 could not be saved" in ran.stderr.splitlines()[-1]
    assert "step 2 is safe" in ran.stderr.splitlines()[-1]


def test_a_run_whose_last_checkpoint_is_damaged_is_not_finished(cfg):
    RunStorage.open(cfg).checkpoints.delete("step-00000002/optimizer.safetensors")
    ran = resumed(cfg)
    assert ran.returncode == MISTAKE
    assert "every checkpoint" in ran.stderr.splitlines()[-1]


def test_another_seed_of_training_leaves_the_dataset_finished(cfg, monkeypatch):
    monkeypatch.setattr("pipeline.run.connect", contextlib.nullcontext)
    storage = RunStorage.open(cfg)
    train = cfg.train.model_copy(update={"seed": 7})
    assert prepare(cfg.model_copy(update={"train": train}), storage).digest == DIGEST
    other = replace(cfg.data, seed=7)
    with pytest.raises(ShardError, match="seed 3 there, 7 requested"):
        prepare(cfg.model_copy(update={"data": other}), storage)
