"""Where training runs, what is refused before it starts, and what counts as finished."""

import gzip
import json
import re
import threading
import time
from pathlib import Path

import pytest

from pipeline import config
from pipeline import ranks as distributed
from pipeline.arguments.common import STOPPED
from pipeline.checkpoints import CheckpointStore
from pipeline.cli import main
from pipeline.config import Config
from pipeline.data.batch import DeviceBatch
from pipeline.errors import TrainingError
from pipeline.goodput import HOURS, PHASES
from pipeline.loop import train_on_rank
from pipeline.pair import NetworkPair
from pipeline.ranks import Ranks
from pipeline.run_storage import RunStorage
from pipeline.step import StepResult
from pipeline.stop_request import SignalStop
from pipeline.tracking import last_logged
from pipeline.train import train
from tests.distributed import on_ranks
from tests.small_dataset import FIXTURE, unpack_dataset

pytestmark = [
    pytest.mark.slow,  # half a second and more each
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Ray, about itself
]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with a small dataset."""
    return unpack_dataset(tmp_path_factory.mktemp("train"))


ALLOWANCE_S = 1.5  # for what a run of two steps does around its phases, on a busy machine


def recipe(storage: Path, *overrides: str) -> tuple[Config, RunStorage]:
    cfg = config.load(
        FIXTURE / "recipe.yaml",
        [f"storage={storage}", "train.steps=2", "model.width=8", *overrides],
    )
    return cfg, RunStorage.open(cfg)


def test_a_rank_without_a_gpu_that_must_have_one_says_so():
    assert Ranks(kind="cpu").device.type == "cpu"
    with pytest.raises(TrainingError, match="torch finds no GPU on"):
        _ = Ranks(kind="cuda").device


@pytest.mark.parametrize("damage", ["truncated", "missing", "manifest"])
def test_a_run_whose_last_checkpoint_is_damaged_is_not_finished(storage, damage):
    cfg, stored = recipe(storage, f"name={damage}", "train.save_every_steps=1")
    assert train(cfg, stored)
    checkpoints = CheckpointStore(stored.checkpoints)
    intact = checkpoints.load(2)
    key = "step-00000002/" + ("manifest.json" if damage == "manifest" else "ema.safetensors")
    if damage == "missing":
        stored.checkpoints.delete(key)
    else:
        stored.checkpoints.put(key, stored.checkpoints.get(key)[:-100])
    assert train(cfg, stored)
    assert checkpoints.load(2)["ema.safetensors"] == intact["ema.safetensors"]


class NodeIsGoing:
    """What a rank hears whose node is about to go."""

    requested, leaving = False, True

    def __init__(self) -> None:
        self.safe: list[int] = []

    def note_safe(self, step: int) -> None:
        self.safe.append(step)


def test_a_rank_whose_node_goes_saves_once_and_trains_on(storage):
    cfg, stored = recipe(
        *(storage, "name=going", "train.steps=6", "train.save_every_steps=6"),
        "train.profile_steps=[1,2]",
    )
    stop, threads = NodeIsGoing(), set(threading.enumerate())
    end = train_on_rank(cfg, stored, stored.open_dataset(), Ranks(), stop, None)
    assert end.step == 6
    checkpoints = CheckpointStore(stored.checkpoints)
    assert checkpoints.steps() == [1, 6]
    assert checkpoints.manifest(1).metrics == {}
    assert stop.safe[-1] == 6
    assert set(threading.enumerate()) <= threads  # none is at work when the interpreter ends
    (profile,) = stored.run.list_keys("profile/")
    assert profile == "profile/steps-00000001-00000002.json.gz"
    assert json.loads(gzip.decompress(stored.run.get(profile)))["traceEvents"]


def test_a_rank_whose_node_goes_validates_nothing(storage):
    cfg, stored = recipe(storage, "name=hurried", "train.save_every_steps=1")
    train_on_rank(cfg, stored, stored.open_dataset(), Ranks(), NodeIsGoing(), None)
    manifests = CheckpointStore(stored.checkpoints).manifests()
    assert {step: manifest.metrics for step, manifest in manifests.items()} == {1: {}, 2: {}}


def test_every_second_since_the_launch_belongs_to_a_phase(storage):
    """Over an attempt that ended on request, and the one after it."""
    waits = 2.0
    cfg, stored = recipe(storage, "name=seconds", "train.steps=1")
    began = time.monotonic()
    assert train(cfg, stored)
    cfg, stored = recipe(storage, "name=seconds", "train.steps=2")
    launched = time.time() - waits
    train_on_rank(
        *(cfg, stored, stored.open_dataset(), Ranks(), NodeIsGoing(), None), launched=launched
    )
    whole_s = time.monotonic() - began + waits
    hours = last_logged(stored.run, HOURS).values
    assert hours.keys() == {f"{HOURS}{phase}" for phase in PHASES}
    # Besides the phases: trackers that end, and what comes between both calls here.
    rest_s = whole_s - 3600 * sum(hours.values())
    assert 0 <= rest_s < 0.01 * whole_s + ALLOWANCE_S


def test_hours_that_are_over_end_a_run_as_a_stop_does(storage):
    settings = ["name=hours", "train.steps=9", "model.width=8", "train.max_hours=1e-9"]
    words = ["train", str(FIXTURE / "recipe.yaml"), f"storage={storage}", *settings]
    assert main(words) == STOPPED
    checkpoints = CheckpointStore(recipe(storage, "name=hours")[1].checkpoints)
    assert checkpoints.steps() == [1]
    assert checkpoints.manifest(1).metrics == {}  # no time for a validation


def drifting(storage: Path) -> str:
    """How a run of these ranks ends of which the second changes one weight after step 3."""
    ranks, real = distributed.current(), NetworkPair.step

    def step(pair: NetworkPair, batch: DeviceBatch, done: int) -> StepResult:
        result = real(pair, batch, done)
        if ranks.rank == 1 and done == 2:
            next(iter(pair.discriminator.module.parameters())).data.view(-1)[0] += 1e-6
        return result

    cfg, stored = recipe(
        *(storage, "name=drifting", "train.steps=9", "train.save_every_steps=2"),
        "train.check_replicas_every_steps=4",
    )
    dataset = stored.open_dataset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NetworkPair, "step", step)
        try:
            train_on_rank(cfg, stored, dataset, ranks, SignalStop(), None)
        except TrainingError as error:
            return str(error)
    return "it trained to the end"


def test_ranks_that_drift_apart_end_the_run_and_name_themselves_and_the_checkpoint(storage):
    first, second = on_ranks(2, drifting, storage)
    assert first == second
    assert "different weights at step 4: the discriminator of rank 0 (" in first
    assert re.search(r"\), 1 \(\S+\) differs", first)
    assert "the newest healthy checkpoint is that of step 2: run the same command" in first
    assert CheckpointStore(recipe(storage, "name=drifting")[1].checkpoints).steps() == [2]
