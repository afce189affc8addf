"""Checkpoints from the command line."""

import json
import threading
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save as save_tensors

from cluster.storage import open_store
from pipeline import cli, lease
from pipeline.arguments.common import DONE, MISTAKE
from pipeline.checkpoints import CheckpointStore

pytestmark = pytest.mark.slow  # seconds together

WEIGHTS = save_tensors({"kernel": np.ones(4, np.float32)})


def save(run: Path, errors: list[tuple[int, float]]) -> None:
    checkpoints = CheckpointStore(open_store(str(run / "checkpoints")), keep=len(errors))
    for step, error in errors:
        files = {"weights.bin": b"weights %d" % step, "ema.safetensors": WEIGHTS}
        metrics = {"val/l1_percent": error, "val/psnr_db": step + 0.5}
        checkpoints.save(step, files, manifest={"metrics": metrics})
    checkpoints.close()


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run with three checkpoints, the second the best."""
    save(tmp_path / "run", [(10, 9.0), (20, 7.5), (30, 8.0)])
    return str(tmp_path / "run")


def test_ls_lists_every_step_with_its_metrics_and_marks_best_and_newest(run, capsys):
    assert cli.main(["checkpoints", "ls", run]) == DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "step",
        "age",
        "MB",
        "val/l1_percent",
        "val/psnr_db",
        "dataset",
        "commit",
    ]
    assert [line.split() for line in lines[1:]] == [
        ["10", "0", "min", "0.0", "9", "10.5"],
        ["20", "0", "min", "0.0", "7.5", "20.5", "best"],
        ["30", "0", "min", "0.0", "8", "30.5", "newest"],
    ]
    assert cli.main(["checkpoints", "ls", run, "--json"]) == DONE
    listed = json.loads(capsys.readouterr().out)
    assert [(found["step"], found["best"], found["newest"]) for found in listed] == [
        (10, False, False),
        (20, True, False),
        (30, False, True),
    ]


def test_ls_of_a_storage_lists_its_runs(tmp_path, capsys):
    for name, error in (("first", 3.0), ("second", 2.0)):
        save(tmp_path / "runs" / name, [(10, error)])
    (tmp_path / "datasets").mkdir()
    assert cli.main(["checkpoints", "ls", str(tmp_path)]) == DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["run", "checkpoints"],
        ["first", "1"],
        ["second", "1"],
    ]
    assert cli.main(["checkpoints", "ls", str(tmp_path), "--json"]) == DONE
    rows = json.loads(capsys.readouterr().out)
    assert [(row["run"], row["best"], row["val/l1_percent"]) for row in rows] == [
        ("first", 10, 3.0),
        ("second", 10, 2.0),
    ]


@pytest.mark.parametrize(("which", "step"), [("newest", 30), ("best", 20), ("10", 10)])
def test_show_and_pull_take_a_step_by_number_or_by_merit(run, tmp_path, capsys, which, step):
    assert cli.main(["checkpoints", "show", run, "--step", which]) == DONE
    assert json.loads(capsys.readouterr().out)["step"] == step
    out = tmp_path / "pulled"
    assert cli.main(["checkpoints", "pull", run, "--step", which, "--out", str(out)]) == DONE
    assert (out / "weights.bin").read_bytes() == b"weights %d" % step


def test_verify_names_the_damaged_file_and_fails(run, capsys):
    assert cli.main(["checkpoints", "verify", run]) == DONE
    damaged = Path(run) / "checkpoints/step-00000020/weights.bin"
    damaged.write_bytes(b"weights 2x")
    assert cli.main(["checkpoints", "verify", run]) == MISTAKE
    assert str(damaged) in capsys.readouterr().out


def test_pull_says_step_and_metric_and_takes_another_metric_for_best(run, tmp_path, capsys):
    out = str(tmp_path / "out")
    wanted = ["checkpoints", "pull", run, "--out", out]
    assert cli.main([*wanted, "--step", "best:val/psnr_db:max"]) == DONE
    assert capsys.readouterr().out.startswith("step 30, val/psnr_db 30.5, ")
    assert cli.main([*wanted, "--step", "best:val/psnr_db"]) == MISTAKE
    assert "say also whether low or high is best" in capsys.readouterr().err


def test_pull_over_another_step_is_refused_without_overwrite(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["checkpoints", "pull", run, "--out", str(out)]) == DONE
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    wanted = ["checkpoints", "pull", run, "--step", "10", "--out", str(out)]
    capsys.readouterr()
    assert cli.main(wanted) == MISTAKE
    assert f"{out} holds step 30, and step 10 was asked for" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert cli.main([*wanted, "--overwrite"]) == DONE
    assert (out / "weights.bin").read_bytes() == b"weights 10"
    assert json.loads((out / "manifest.json").read_bytes())["step"] == 10


def test_a_pull_into_a_folder_of_something_else_is_refused(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    assert cli.main(["checkpoints", "pull", run, "--out", str(tmp_path / "out")]) == MISTAKE
    assert "holds other files" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("options", [[], ["--weights-only"]])
def test_a_pulled_folder_is_a_checkpoint_for_every_command(run, tmp_path, capsys, options):
    out = str(tmp_path / "pulled")
    assert cli.main(["checkpoints", "pull", run, "--step", "20", "--out", out, *options]) == 0
    names = {path.name for path in Path(out).iterdir()}
    assert names == (
        {"ema.safetensors", "manifest.json", "pulled.json"}
        if options
        else {"ema.safetensors", "weights.bin", "manifest.json"}
    )
    capsys.readouterr()
    assert cli.main(["checkpoints", "ls", out, "--json"]) == DONE
    assert [found["step"] for found in json.loads(capsys.readouterr().out)] == [20]
    assert cli.main(["checkpoints", "show", out]) == DONE
    assert json.loads(capsys.readouterr().out)["step"] == 20
    assert cli.main(["checkpoints", "verify", out]) == DONE
    assert cli.main(["checkpoints", "pull", out, "--out", f"{out}2", *options]) == DONE
    (Path(out) / "ema.safetensors").write_bytes(WEIGHTS[:-1] + b"X")
    assert cli.main(["checkpoints", "verify", out]) == MISTAKE
    assert "ema.safetensors is damaged" in capsys.readouterr().out
    assert cli.main(["checkpoints", "prune", out, "--keep", "1"]) == MISTAKE


def test_a_full_pull_completes_a_folder_of_weights(run, tmp_path):
    out = tmp_path / "pulled"
    pull = ["checkpoints", "pull", run, "--out", str(out)]
    assert cli.main([*pull, "--weights-only"]) == DONE
    assert cli.main(pull) == DONE
    assert {path.name for path in out.iterdir()} == {
        "ema.safetensors",
        "weights.bin",
        "manifest.json",
    }


def test_prune_shows_what_it_would_do_and_deletes_with_yes(run, capsys):
    checkpoints = CheckpointStore(open_store(f"{run}/checkpoints"))
    (Path(run) / "checkpoints/step-00000015").mkdir()
    (Path(run) / "checkpoints/step-00000015/weights.bin").write_bytes(b"cut short")
    prune = ["checkpoints", "prune", run, "--keep", "1"]
    assert cli.main(prune) == DONE
    assert capsys.readouterr().out.splitlines() == [
        "keep step 20: best val/l1_percent",
        "keep step 30: newest, newest healthy",
        "would delete step 10, 0.0 MB: not of the newest 1, best 1 val/l1_percent",
        "would delete step 15: never finished",
        "nothing was deleted: repeat with --yes to delete checkpoints=1 MB=0.0 orphans=1",
    ]
    assert checkpoints.steps() == [10, 20, 30]
    assert cli.main([*prune, "--every", "10", "--json"]) == DONE
    planned = json.loads(capsys.readouterr().out)
    assert (planned["deleted"], planned["orphans"], planned["done"]) == ([], [15], False)
    assert cli.main([*prune, "--yes"]) == DONE
    assert capsys.readouterr().out.endswith("deleted checkpoints=1 MB=0.0 orphans=1\n")
    assert checkpoints.steps() == [20, 30]
    assert not (Path(run) / "checkpoints/step-00000015").exists()
    assert cli.main([*prune, "--yes"]) == DONE
    assert capsys.readouterr().out.endswith("nothing to delete\n")


def test_prune_keeps_the_best_by_any_metric(tmp_path, capsys):
    save(tmp_path, [(step, 1.0) for step in (10, 20, 30, 40)])  # with val/psnr_db step + 0.5
    prune = ["checkpoints", "prune", str(tmp_path), "--keep", "1", "--keep-best", "2"]
    assert cli.main([*prune, "--best", "val/psnr_db:min"]) == DONE
    assert capsys.readouterr().out.splitlines()[:4] == [
        "keep step 10: best 2 val/psnr_db",
        "keep step 20: best 2 val/psnr_db",
        "keep step 40: newest, newest healthy",
        "would delete step 30, 0.0 MB: not of the newest 1, best 2 val/psnr_db",
    ]
    assert cli.main([*prune, "--best", "val/pnsr_db:max"]) == MISTAKE
    assert "they have val/l1_percent, val/psnr_db" in capsys.readouterr().err
    assert cli.main([*prune[:-1], "0"]) == MISTAKE
    assert "keep_best=0 should be at least 1" in capsys.readouterr().err


def test_prune_takes_away_the_only_save_of_a_run_that_crashed_in_it(tmp_path, capsys):
    orphan = tmp_path / "checkpoints/step-00000040/weights.bin"
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"cut short")
    with lease.held(open_store(str(tmp_path)), job="", job_has_ended=lambda job: False):
        pass
    assert cli.main(["checkpoints", "prune", str(tmp_path), "--keep", "3", "--yes"]) == DONE
    assert not orphan.exists()
    assert capsys.readouterr().out.endswith("deleted checkpoints=0 MB=0.0 orphans=1\n")
    assert cli.main(["checkpoints", "prune", str(tmp_path), "--keep", "3", "--yes"]) == MISTAKE
    assert "has no finished checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(("released", "stays"), [(True, False), (False, True), (None, True)])
def test_prune_takes_a_crashed_save_away_once_nobody_trains(run, capsys, released, stays):
    """``released`` of the run's lease; None: it has none."""
    orphan = Path(run) / "checkpoints/step-00000040/weights.bin"
    orphan.parent.mkdir()
    orphan.write_bytes(b"cut short")
    if released is not None:
        with lease.held(open_store(run), job="", job_has_ended=lambda job: False) as held:
            if not released:
                alive = replace(held.lease, host="elsewhere", process="another machine")
        if not released:
            record = json.dumps(asdict(alive)).encode()
            open_store(run).put(lease.LEASE, record)
    renewing = threading.Event()

    def renew():
        for renewals in range(1, 100):
            if renewing.wait(0.05) or released is not False:
                return
            record = json.dumps(asdict(replace(alive, renewals=renewals))).encode()
            open_store(run).put(lease.LEASE, record)

    renewer = threading.Thread(target=renew)
    renewer.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "TIME_TO_LIVE_S", 1.0)
        assert cli.main(["checkpoints", "prune", run, "--keep", "3", "--yes"]) == DONE
    renewing.set()
    renewer.join()
    assert orphan.exists() == stays
    assert ("keep step 40: a save may be writing it" in capsys.readouterr().out) == stays


@pytest.mark.parametrize(
    "arguments",
    [
        ["checkpoints", "ls", "nowhere"],
        ["checkpoints", "pull", "{run}", "--step", "11", "--out", "x"],
        ["checkpoints", "show", "{run}", "--step", "latest"],
    ],
)
def test_a_mistake_is_one_line(run, capsys, arguments):
    assert cli.main([word.format(run=run) for word in arguments]) == MISTAKE
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
