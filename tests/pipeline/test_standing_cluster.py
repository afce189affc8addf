"""Training on a Ray cluster that stands: its GPUs are pretended, its driver is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]

from cluster.session import RayHead, local_ray
from pipeline import config
from pipeline.checkpoints import CheckpointStore
from pipeline.config import Config
from pipeline.errors import TrainingError
from pipeline.run_storage import RunStorage
from pipeline.train import train
from tests.small_dataset import FIXTURE, unpack_dataset

STEPS = 40
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Ray, about itself
]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    """A cluster with one CPU, and three GPUs that do not exist."""
    pretended = {"RAY_OVERRIDE_RESOURCES": '{"CPU": 1, "GPU": 3}'}
    with local_ray(tmp_path_factory.mktemp("ray"), environment=pretended) as head:
        yield head


@pytest.fixture
def joined(head: RayHead, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What starts here joins that cluster."""
    token = AuthenticationTokenLoader.instance()  # keeps the first token that this process used
    before = os.environ.get("RAY_AUTH_MODE", "disabled")
    for name, value in {**head.environment, "RAY_ADDRESS": head.address}.items():
        monkeypatch.setenv(name, value)
    token.reset_cache()
    RayConfig.initialize('{"AUTH_MODE": "token"}')  # read from the environment at the first import
    yield
    RayConfig.initialize(f'{{"AUTH_MODE": "{before}"}}')
    token.reset_cache()


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with a small dataset."""
    return unpack_dataset(tmp_path_factory.mktemp("storage"))


def overrides(storage: Path, *more: str) -> list[str]:
    small = [f"train.steps={STEPS}", "train.size_px=32", "model.width=8", "train.launcher=ray"]
    return [f"storage={storage}", "tracking.backend=none", *small, *more]


def recipe(storage: Path, *more: str) -> tuple[Config, RunStorage]:
    cfg = config.load(FIXTURE / "recipe.yaml", overrides(storage, *more))
    return cfg, RunStorage.open(cfg)


def test_gpus_that_ray_counts_and_torch_does_not_find_are_refused_once(storage, joined, capfd):
    with pytest.raises(TrainingError, match=r"^torch finds no GPU on .+ set train\.device=cpu$"):
        train(*recipe(storage, "name=refused"))
    assert "starting run=" not in capfd.readouterr().err


def test_more_ranks_than_gpus_are_refused_with_the_setting_to_change(storage, joined):
    more = ("name=many", "train.workers=4", "train.streams=4", "train.global_batch=4")
    with pytest.raises(
        TrainingError,
        match=r"4 ranks need one GPU each, and the cluster has 3.*train\.workers=auto",
    ):
        train(*recipe(storage, *more))


def test_a_driver_that_is_killed_is_replaced_at_once_by_the_same_command(storage, joined, caplog):
    more = ("train.device=cpu", "train.workers=auto", "train.save_every_steps=5")
    words = overrides(storage, "name=killed", *more)
    driver = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "train", str(FIXTURE / "recipe.yaml"), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    cfg, killed = recipe(storage, "name=killed", *more)
    checkpoints = CheckpointStore(killed.checkpoints)
    try:
        deadline = time.monotonic() + 240
        while not checkpoints.steps():
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    reached = checkpoints.newest() or 0
    assert 0 < reached < STEPS
    caplog.set_level("INFO")
    assert train(cfg, killed)
    assert "its process is gone" in caplog.text
    assert "waiting up to" not in caplog.text
    alone, undisturbed = recipe(storage, "name=alone", *more, "train.launcher=local")
    assert train(alone, undisturbed)
    assert weights(checkpoints) == weights(CheckpointStore(undisturbed.checkpoints))


def weights(checkpoints: CheckpointStore) -> dict[str, bytes]:
    files = checkpoints.load(STEPS)
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}
