"""Where training runs, what is refused before it starts, and what counts as finished."""

import threading
import time
from pathlib import Path

import pytest

from pipeline import config
from pipeline.checkpoints import CheckpointStore
from pipeline.config import Config
from pipeline.errors import TrainingError
from pipeline.goodput import HOURS, PHASES
from pipeline.loop import train_on_rank
from pipeline.ranks import Ranks
from pipeline.run_storage import RunStorage
from pipeline.tracking import last_logged
from pipeline.train import train
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
    cfg, stored = recipe(storage, "name=going", "train.steps=6", "train.save_every_steps=6")
    stop, threads = NodeIsGoing(), set(threading.enumerate())
    end = train_on_rank(cfg, stored, stored.open_dataset(), Ranks(), stop, None)
    assert end.step == 6
    checkpoints = CheckpointStore(stored.checkpoints)
    assert checkpoints.steps() == [1, 6]
    assert checkpoints.manifest(1).metrics == {}
    assert stop.safe[-1] == 6
    assert set(threading.enumerate()) <= threads  # none is at work when the interpreter ends


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
