"""Values that wait for MLflow arrive in order and once, also from another machine."""

import tempfile
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cluster.storage import open_store
from pipeline.cli import main
from pipeline.tracking import event_queue, opening
from pipeline.tracking.database import ensure_database
from pipeline.tracking.history import AttemptInfo, HistoryTracker, HistoryWriter
from pipeline.tracking.mlflow import MlflowTracker
from pipeline.tracking.opening import sync_run
from pipeline.tracking.protocol import RunInfo

AWAY = "http://127.0.0.1:1"


@pytest.fixture
def uri(tmp_path: Path) -> str:
    ensure_database(tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture(autouse=True)
def _queues_here(tmp_path, monkeypatch):
    monkeypatch.setattr(event_queue, "FLUSH_S", 1.0)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))


def config(tmp_path: Path) -> dict[str, object]:
    return {
        "name": "demo",
        "storage": str(tmp_path),
        "data.name": "bundled",
        "train.steps": 20,
        "tracking.experiment": "tests",
    }


def trained(tmp_path: Path, steps: range, uri: str, status="FINISHED", start: int = 0) -> None:
    store = open_store(str(tmp_path / "runs" / "demo"))
    url = store.url
    tree = {"name": "demo", "storage": str(tmp_path), "data": {"name": "bundled"}}
    tree |= {"train": {"steps": 20}, "tracking": {"experiment": "tests"}}
    attempt = AttemptInfo(resume_from_step=start, config=tree)
    info = RunInfo(name="demo", url=url)
    queue = opening._queue_folder(url)
    tracker = MlflowTracker(info, uri=uri, experiment="tests", queue_folder=queue)
    with HistoryTracker(tracker, HistoryWriter(store, attempt)) as tracked:
        for step in steps:
            tracked.log_metrics(step, {"loss/l1": step / 7})
        tracked.finish(status)


def recorded(uri: str) -> tuple[list[int], str]:
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    values = client.get_metric_history(run.info.run_id, "loss/l1")
    assert all(value.value == float(f"{value.step / 7:.6g}") for value in values)
    return [value.step for value in values], run.info.status


def test_what_waits_on_this_machine_is_delivered_once_with_its_status(tmp_path, uri, capsys):
    trained(tmp_path, range(1, 6), AWAY, "FAILED")
    run = str(tmp_path / "runs" / "demo")
    for _ in range(2):
        assert main(["tracking", "sync", run, "--tracking-uri", uri]) == 0
        assert recorded(uri) == ([1, 2, 3, 4, 5], "FAILED")
    assert "MLflow has everything" in capsys.readouterr().out


def test_what_waits_is_delivered_after_the_machine_is_lost(tmp_path, uri):
    trained(tmp_path, range(1, 6), AWAY)
    for path in (tmp_path / "temporary").rglob("*"):
        if path.is_file():
            path.unlink()
    store = open_store(str(tmp_path / "runs" / "demo"))
    assert sync_run(store, config(tmp_path), finished=False, uri=uri) == 0
    assert recorded(uri) == ([1, 2, 3, 4, 5], "KILLED")


def test_a_gap_is_filled_and_nothing_comes_twice(tmp_path, uri):
    trained(tmp_path, range(1, 4), uri, "KILLED")
    trained(tmp_path, range(4, 7), AWAY, "KILLED", start=3)
    for path in (tmp_path / "temporary").rglob("*.jsonl"):
        path.unlink()
    trained(tmp_path, range(7, 9), uri, start=6)
    assert recorded(uri) == ([1, 2, 3, 7, 8], "FINISHED")
    store = open_store(str(tmp_path / "runs" / "demo"))
    assert sync_run(store, config(tmp_path), finished=True, uri=uri) == 0
    steps, status = recorded(uri)
    assert sorted(steps) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert status == "FINISHED"


def test_a_server_that_is_away_is_one_line(tmp_path, capsys):
    trained(tmp_path, range(1, 3), AWAY)
    run = str(tmp_path / "runs" / "demo")
    assert main(["tracking", "sync", run, "--tracking-uri", AWAY]) == 1
    assert capsys.readouterr().err.count("\n") == 1
