"""A fork starts where another run was, and trains on as that one would have."""

import os
import tarfile
from pathlib import Path

import pytest

from pipeline import config
from pipeline.arguments.common import DONE, MISTAKE
from pipeline.checkpoints import CheckpointStore
from pipeline.cli import main
from pipeline.fork import fork_origin
from pipeline.run_storage import RunStorage
from pipeline.tracking.history import read_history

pytestmark = pytest.mark.slow  # half a second and more each

FIXTURE = Path(__file__).parents[1] / "fixtures" / "before_1.0" / "storage.tar.xz"
DEMO = "pipeline/recipes/demo.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    """Four steps of a small network, in this process."""
    folder = tmp_path_factory.mktemp("storage")
    with tarfile.open(FIXTURE) as archive:  # for its dataset
        archive.extractall(folder, filter="data")
    storage = folder / "storage"
    overrides = [
        f"storage={storage}",
        "data.name=small",
        "data.stored_px=64",
        "model.width=4",
        "train.steps=4",
        "train.size_px=32",
        "train.global_batch=2",
        "train.launcher=local",
        "train.log_every_steps=1",
        "train.save_every_steps=2",
        "train.keep_checkpoints=9",
        "evaluate.samples_while_training=2",
        "tracking.backend=none",
    ]
    assert main(["train", DEMO, *overrides]) == DONE
    return config.load(Path(DEMO), overrides)


def files(cfg: config.Config, name: str, step: int) -> dict[str, bytes]:
    storage = RunStorage.open(cfg.model_copy(update={"name": name}))
    return CheckpointStore(storage.checkpoints).load(step)


def test_an_unchanged_fork_ends_with_equal_bytes(trained):
    run = os.path.join(trained.storage, "runs", "demo")
    for _ in range(2):  # the second time, all is finished
        assert main(["fork", run, "--step", "2", "name=again"]) == DONE
    again, there = files(trained, "again", 4), files(trained, "demo", 4)
    assert again.keys() == there.keys()
    for name, content in there.items():
        if name != "state.json":
            assert again[name] == content, name


def test_a_changed_fork_names_its_origin(trained, capsys):
    run = os.path.join(trained.storage, "runs", "demo")
    arguments = ["demo", "--storage", trained.storage, "--step", "2", "train.l1_weight=10"]
    assert main(["fork", *arguments]) == DONE
    storage = RunStorage.open(trained.model_copy(update={"name": "demo-from-2"}))
    origin = fork_origin(storage.run)
    assert origin is not None
    assert (origin.url, origin.step) == (run, 2)
    (attempt,) = read_history(storage.run).attempts
    assert attempt.info.forked_from == f"{run} step 2"
    assert attempt.info.resume_from_step == 2
    assert attempt.info.config["train"]["l1_weight"] == 10
    record = CheckpointStore(storage.checkpoints).manifest(2).record()
    assert record["forked_from"]["step"] == 2
    capsys.readouterr()
    words = ["compare", "demo", "demo-from-2", "--storage", trained.storage]
    assert main(words) == MISTAKE  # neither was evaluated
    assert "forked from" in capsys.readouterr().out


def test_mistakes_are_one_line(trained, capsys):
    run = os.path.join(trained.storage, "runs", "demo")
    for arguments, words in [
        (["--step", "3"], "no finished checkpoint of step 3"),
        (["--step", "4"], "give train.steps above"),
        (["--step", "2", "name=demo"], "another name"),
        (["--step", "soon"], "should be a step"),
    ]:
        assert main(["fork", run, *arguments]) == MISTAKE
        error = capsys.readouterr().err.splitlines()
        assert words in error[-1]
