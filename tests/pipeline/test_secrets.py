"""A secret that a person typed, or that the environment holds, is written and printed nowhere."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save as save_tensors

from cluster.storage import open_store
from pipeline import cli
from pipeline.arguments.common import DONE, MISTAKE
from pipeline.checkpoints import CheckpointStore
from pipeline.config import load
from pipeline.doctor.storage import storage_probes
from pipeline.logs import SecretFreeFormatter

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


@pytest.fixture
def only_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doctor looks at the storage alone: the other probes see no URL."""
    monkeypatch.setattr("pipeline.commands.doctor.all_probes", lambda cfg, url: storage_probes(url))


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIA:{SECRET}@bucket/runs/x",
        f"https://user:{SECRET}@host/runs/x",
        f"file://user:{SECRET}@host/runs/x",
    ],
)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_doctor_refuses_a_url_with_a_secret_without_repeating_it(
    url: str,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cli.main(["doctor", url, *options]) == MISTAKE
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err
    assert "storage" in shown.out


@pytest.mark.slow
def test_no_log_of_a_library_shows_a_secret_even_at_debug(
    s3_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    only_storage: None,
) -> None:
    token = f"{SECRET}-token"
    monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{SECRET}-key")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    ours, raw = io.StringIO(), io.StringIO()
    shown = [logging.StreamHandler(ours), logging.StreamHandler(raw)]
    shown[0].setFormatter(SecretFreeFormatter("%(message)s"))
    loggers = [logging.getLogger(name) for name in ("botocore", "boto3", "s3transfer", "urllib3")]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        for handler in shown:
            logger.addHandler(handler)
    try:
        assert cli.main(["checkpoints", "ls", s3_url]) == MISTAKE
        assert cli.main(["doctor", s3_url]) == MISTAKE
    finally:
        for logger in loggers:
            logger.setLevel(logging.NOTSET)
            for handler in shown:
                logger.removeHandler(handler)
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err
    assert "AWS_ACCESS_KEY_ID" in printed.out + printed.err
    assert token in raw.getvalue()  # which is why lines are formatted by us
    assert "***" in ours.getvalue()
    assert SECRET not in ours.getvalue()


def test_a_traceback_of_a_bug_shows_no_secret() -> None:
    program = (
        "from pipeline.logs import configure_logs\n"
        "import logging, os\n"
        "configure_logs()\n"
        "key = os.environ['AWS_SECRET_ACCESS_KEY']\n"
        "try:\n    raise KeyError(f'header {key}')\n"
        "except KeyError:\n    logging.exception('signed with %s', key)\n"
        "raise RuntimeError(f'https://user:{key}@host and {key}')\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "AWS_SECRET_ACCESS_KEY": SECRET},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1
    assert SECRET not in ran.stdout + ran.stderr
    assert "signed with ***" in ran.stderr
    assert "RuntimeError: https://host and ***" in ran.stderr
    assert 'File "<string>", line' in ran.stderr
