"""A secret that a person typed, or that the environment holds, is written and printed nowhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save as save_tensors

from cluster.storage import open_store
from pipeline import cli
from pipeline.arguments.common import DONE, MISTAKE
from pipeline.checkpoints import CheckpointStore
from pipeline.config import load

SECRET = "planted-5f3a"
DEMO = Path("pipeline/recipes/demo.yaml")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose recipe has a password in the URI of its tracking server."""
    cfg = load(
        DEMO,
        [f"storage={tmp_path}", f"tracking.uri=https://user:{SECRET}@127.0.0.1:9", "name=secret"],
    )
    checkpoints = CheckpointStore(open_store(str(tmp_path / "runs/secret/checkpoints")))
    files = {"ema.safetensors": save_tensors({"kernel": np.ones(4, np.float32)})}
    manifest = {
        "metrics": {"val/l1_percent": 1.0},
        "config": cfg.recorded(),
        "config_digest": cfg.digest(),
    }
    for step in (10, 20):
        checkpoints.save(step, files, manifest=manifest)
    checkpoints.close()
    return tmp_path / "runs/secret"


def test_the_password_of_the_tracking_server_is_in_no_file_and_no_output(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "pulled")
    for command in (
        ["ls", str(run)],
        ["ls", str(run), "--json"],
        ["show", str(run)],
        ["pull", str(run), "--out", out],
        ["verify", str(run)],
        ["prune", str(run), "--keep", "1"],
    ):
        assert cli.main(["checkpoints", *command]) == DONE
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 4
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("action", ["ls", "show", "pull", "verify", "prune"])
@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIA:{SECRET}@bucket/runs/x",
        f"s3://AKIA:{SECRET}/slash@bucket/runs/x",
        f"s3:/AKIA:{SECRET}@bucket/runs/x",
        f"s3://AKIA:{SECRET}@bucket/runs/x/checkpoints/step-00000010",
        f"https://user:{SECRET}@host/runs/x",
        f"https://user:a/{SECRET}@host/runs/x",
        f"https://user:a@{SECRET}@host/runs/x",
        f"file://user:{SECRET}@host/runs/x",
    ],
)
def test_a_url_with_a_secret_is_refused_without_repeating_it(
    action: str, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"pull": ["--out", str(tmp_path / "out")], "prune": ["--keep", "1"]}
    assert cli.main(["checkpoints", action, url, *options.get(action, [])]) == MISTAKE
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err
    assert len(shown.err.strip().splitlines()) == 1
