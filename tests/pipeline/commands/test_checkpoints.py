"""Checkpoints from the command line."""

import json
from pathlib import Path

import pytest

from cluster.storage import open_store
from pipeline import cli
from pipeline.checkpoints import CheckpointStore


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run with three checkpoints, the second the best."""
    checkpoints = CheckpointStore(open_store(str(tmp_path / "run/checkpoints")), keep=3)
    for step, error in ((10, 9.0), (20, 7.5), (30, 8.0)):
        files = {"weights.bin": b"weights %d" % step}
        checkpoints.save(step, files, manifest={"metrics": {"val/l1_percent": error}})
    checkpoints.close()
    return str(tmp_path / "run")


def test_ls_lists_every_step_with_its_metrics(run, capsys):
    assert cli.main(["checkpoints", "ls", run]) == cli.DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["step", "saved", "MB", "val/l1_percent"]
    assert [(line.split()[0], line.split()[-1]) for line in lines[1:]] == [
        ("10", "9"),
        ("20", "7.5"),
        ("30", "8"),
    ]


@pytest.mark.parametrize(("which", "step"), [("newest", 30), ("best", 20), ("10", 10)])
def test_show_and_pull_take_a_step_by_number_or_by_merit(run, tmp_path, capsys, which, step):
    assert cli.main(["checkpoints", "show", run, "--step", which]) == cli.DONE
    assert json.loads(capsys.readouterr().out)["step"] == step
    out = tmp_path / "pulled"
    assert cli.main(["checkpoints", "pull", run, "--step", which, "--out", str(out)]) == cli.DONE
    assert (out / "weights.bin").read_bytes() == b"weights %d" % step


def test_verify_names_the_damaged_file_and_fails(run, capsys):
    assert cli.main(["checkpoints", "verify", run]) == cli.DONE
    damaged = Path(run) / "checkpoints/step-00000020/weights.bin"
    damaged.write_bytes(b"weights 2x")
    assert cli.main(["checkpoints", "verify", run]) == cli.MISTAKE
    assert str(damaged) in capsys.readouterr().out


def test_prune_leaves_the_newest_and_the_best(run, capsys):
    assert cli.main(["checkpoints", "prune", run, "--keep", "1"]) == cli.DONE
    assert capsys.readouterr().out == "deleted step 10\n"
    assert CheckpointStore(open_store(f"{run}/checkpoints")).steps() == [20, 30]
    assert cli.main(["checkpoints", "prune", run, "--keep", "1"]) == cli.DONE
    assert capsys.readouterr().out.startswith("nothing to delete")


@pytest.mark.parametrize(
    "arguments",
    [
        ["checkpoints", "ls", "nowhere"],
        ["checkpoints", "pull", "{run}", "--step", "11", "--out", "x"],
        ["checkpoints", "show", "{run}", "--step", "latest"],
    ],
)
def test_a_mistake_is_one_line(run, capsys, arguments):
    assert cli.main([word.format(run=run) for word in arguments]) == cli.MISTAKE
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
