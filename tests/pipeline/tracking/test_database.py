"""The embedded database of MLflow, and kills while it is made."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.tracking import RunInfo, database
from pipeline.tracking.database import database_path, ensure_database
from pipeline.tracking.mlflow import MlflowTracker

MIGRATE_IN_PLACE = """
import sys
from mlflow import MlflowClient
MlflowClient(sys.argv[1]).search_experiments()
"""


def test_a_kill_leaves_no_database_or_a_whole_one(tmp_path):
    path = tmp_path / "mlflow.db"
    program = "import sys; from pathlib import Path; from pipeline.tracking.database import *\n"
    program += "ensure_database(Path(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", program, str(path)])
    while not (tmp_path / ".mlflow.db.unfinished").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not path.exists()
    ensure_database(path)
    assert database._whole(path)
    assert {each.name for each in tmp_path.iterdir()} == {"mlflow.db", ".mlflow.db.lock"}


def test_a_half_migrated_database_is_moved_aside_and_nothing_is_lost(tmp_path, monkeypatch, caplog):
    path = tmp_path / "mlflow.db"
    process = subprocess.Popen([sys.executable, "-c", MIGRATE_IN_PLACE, f"sqlite:///{path}"])
    while not path.exists() or not path.stat().st_size:
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    monkeypatch.setattr(database, "IDLE_S", 0.1)
    info = RunInfo(name="demo", url="s3://bucket/runs/demo")
    with MlflowTracker(
        info, uri=f"sqlite:///{path}", experiment="tests", queue_folder=tmp_path / "queue"
    ) as tracker:
        tracker.log_metrics(1, {"loss": 1.0})
    assert "was half made" in caplog.text
    assert (tmp_path / "mlflow.db.half-made-1").exists()
    client = MlflowClient(f"sqlite:///{path}")
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert run.data.metrics["loss"] == 1.0


def test_a_database_with_runs_is_never_moved(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "IDLE_S", 0.0)
    path = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.execute("INSERT INTO alembic_version VALUES ('of another release')")
        connection.execute("CREATE TABLE runs (run_uuid TEXT)")
        connection.execute("INSERT INTO runs VALUES ('precious')")
    before = path.read_bytes()
    ensure_database(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite:////tmp/mlflow.db", Path("/tmp/mlflow.db")),
        ("sqlite:///mlflow.db", Path("mlflow.db")),
        ("sqlite:///:memory:", None),
        ("http://127.0.0.1:5000", None),
    ],
)
def test_only_the_address_of_a_file_has_a_path(uri, path):
    assert database_path(uri) == path
