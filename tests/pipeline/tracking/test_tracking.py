"""One run, one story: across restarts, outages and kills."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from cluster.storage import open_store
from pipeline import tracking
from pipeline.tracking import JSONL, MlflowTracker, NodeTracker, RunInfo, open_tracker

INFO = RunInfo(
    name="demo",
    url="s3://bucket/runs/demo",
    params={"train.steps": 80, "train.engine": "ddp"},
    config_yaml="name: demo\n",
    dataset_name="bundled",
    dataset_url="s3://bucket/datasets/bundled",
    dataset_digest="0123456789abcdef" * 4,
)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """MLflow takes seconds to lay out a database: done once, copied for every test."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path.read_bytes()


@pytest.fixture
def uri(tmp_path, empty_database) -> str:
    (tmp_path / "mlflow.db").write_bytes(empty_database)
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def tracker(uri: str, tmp_path: Path, info: RunInfo = INFO) -> MlflowTracker:
    return MlflowTracker(info, uri=uri, experiment="tests", spool=tmp_path / "spool")


def the_run(uri: str) -> Run:
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    return run


def history(uri: str, key: str) -> list[tuple[int, float]]:
    run = the_run(uri)
    values = MlflowClient(uri).get_metric_history(run.info.run_id, key)
    return [(value.step, value.value) for value in values]


def test_a_run_is_told_whole(uri, tmp_path):
    with tracker(uri, tmp_path) as told:
        told.log_metrics(5, {"loss/l1_refined": 0.5, "speed/images_per_s": 3.0})
        told.log_metrics(10, {"loss/l1_refined": 0.25})
        told.log_image("samples", 10, np.zeros((4, 6, 3), np.uint8))
    run = the_run(uri)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "demo"
    assert history(uri, "loss/l1_refined") == [(5, 0.5), (10, 0.25)]
    assert run.data.params == {"train.steps": "80", "train.engine": "ddp"}
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "bundled"
    assert INFO.dataset_digest.startswith(dataset.dataset.digest)
    artifacts = tmp_path / "mlartifacts"
    assert next(artifacts.rglob("resolved.yaml")).read_text() == "name: demo\n"
    assert next(artifacts.rglob("samples/step-00000010.png")).exists()


def test_a_restart_joins_the_run_and_repeats_no_step(uri, tmp_path):
    with tracker(uri, tmp_path) as told:
        for step in (5, 10, 15):
            told.log_metrics(step, {"loss": float(step)})
        told.finish("KILLED")
    assert the_run(uri).info.status == "KILLED"
    changed = replace(INFO, params={**INFO.params, "train.engine": "deepspeed"})
    with tracker(uri, tmp_path, changed) as told:  # from the checkpoint of step 10
        for step in (15, 20):
            told.log_metrics(step, {"loss": float(step)})
    assert history(uri, "loss") == [(5, 5.0), (10, 10.0), (15, 15.0), (20, 20.0)]
    run = the_run(uri)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.engine"] == "ddp"
    assert run.data.tags["resume.2.train.engine"] == "deepspeed"


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("lost"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_run_that_breaks_off_says_how(uri, tmp_path, error, status):
    def broken_off() -> None:
        with tracker(uri, tmp_path) as told:
            told.log_metrics(1, {"loss": 1.0})
            raise error

    with pytest.raises(type(error)):
        broken_off()
    assert the_run(uri).info.status == status
    assert history(uri, "loss") == [(1, 1.0)]


def test_values_outlive_an_absent_server_and_are_delivered_later(
    uri, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(tracking, "FLUSH_S", 2.0)
    with tracker("http://127.0.0.1:1", tmp_path) as told:
        told.log_metrics(1, {"loss": 1.0})
        told.log_image("samples", 1, np.zeros((4, 4, 3), np.uint8))
        assert told.run_id is None
    assert "events wait in" in caplog.text
    with tracker(uri, tmp_path) as told:
        told.log_metrics(2, {"loss": 2.0})
    assert history(uri, "loss") == [(1, 1.0), (2, 2.0)]
    assert next((tmp_path / "mlartifacts").rglob("step-00000001.png")).exists()


def test_values_outlive_kill_9(uri, tmp_path):
    program = f"""
import os, signal
from pathlib import Path
from tests.pipeline.tracking.test_tracking import INFO, tracker
told = tracker("http://127.0.0.1:1", Path({str(tmp_path)!r}))
told.log_metrics(1, {{"loss": 1.0}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=Path.cwd())
    assert killed.returncode == -signal.SIGKILL
    with tracker(uri, tmp_path) as told:
        told.log_metrics(2, {"loss": 2.0})
    assert history(uri, "loss") == [(1, 1.0), (2, 2.0)]


def test_a_value_that_mlflow_refuses_does_not_block_the_others(uri, tmp_path, caplog):
    with tracker(uri, tmp_path) as told:
        told.log_metrics(1, {"what?": 1.0})
        told.log_metrics(1, {"loss": 1.0})
    assert history(uri, "loss") == [(1, 1.0)]
    assert "refused" in caplog.text


def test_every_machine_tells_how_it_is_in_the_one_run(uri, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    monkeypatch.setattr(tracking, "RETRY_S", (0.2,))
    further = NodeTracker(INFO, uri=uri, experiment="tests", spool=tmp_path / "spool", node=1)
    further.log_metrics(1, {"loss": 9.0})  # not its to tell
    with tracker(uri, tmp_path) as told, further:
        told.log_metrics(1, {"loss": 1.0})
        deadline = time.monotonic() + 30
        while "system/node-1/cpu_utilization_percentage" not in machine_values(uri):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    run = the_run(uri)
    assert run.info.status == "FINISHED"
    assert history(uri, "loss") == [(1, 1.0)]
    with tracker(uri, tmp_path):
        time.sleep(1)
    for node in (0, 1):
        steps = [
            step for step, _ in history(uri, f"system/node-{node}/system_memory_usage_megabytes")
        ]
        assert steps
        assert steps == sorted(set(steps))


def machine_values(uri: str) -> dict[str, float]:
    if MlflowClient(uri).get_experiment_by_name("tests") is None:
        return {}
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    return runs[0].data.metrics if runs else {}


def test_a_long_absence_is_made_up_for_in_few_calls(uri, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "FLUSH_S", 0.5)
    with tracker("http://127.0.0.1:1", tmp_path) as told:
        for step in range(3000):
            told.log_metrics(step, {"loss": float(step)})
    monkeypatch.setattr(tracking, "FLUSH_S", 30)
    started = time.monotonic()
    with tracker(uri, tmp_path):
        pass
    assert time.monotonic() - started < 20
    assert history(uri, "loss") == [(step, float(step)) for step in range(3000)]


def test_how_a_process_ended_is_no_news_once_the_run_goes_on(uri, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "FLUSH_S", 0.5)
    with tracker("http://127.0.0.1:1", tmp_path) as told:
        told.log_metrics(1, {"loss": 1.0})
    with tracker(uri, tmp_path) as told:
        told.log_metrics(2, {"loss": 2.0})
        deadline = time.monotonic() + 30
        while told.run_id is None or len(history(uri, "loss")) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert the_run(uri).info.status == "RUNNING"


def test_a_process_killed_while_it_noted_what_was_delivered_costs_nothing(uri, tmp_path):
    with tracker(uri, tmp_path) as told:
        told.log_metrics(1, {"loss": 1.0})
    (tmp_path / "spool" / "delivered").write_text("")
    with tracker(uri, tmp_path) as told:
        told.log_metrics(2, {"loss": 2.0})
    assert history(uri, "loss") == [(1, 1.0), (2, 2.0)]


def test_a_password_in_the_address_is_not_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "FLUSH_S", 3.0)
    with tracker("http://user:planted-secret@127.0.0.1:1", tmp_path) as told:
        told.log_metrics(1, {"loss": 1.0})
    assert "tracking is away" in caplog.text
    assert "http://127.0.0.1:1" in caplog.text
    assert "planted-secret" not in caplog.text


def test_the_job_and_the_commit_are_told(uri, tmp_path, monkeypatch):
    job = {"job_submission_id": "raysubmit_1", "git_commit": "c0ffee"}
    monkeypatch.setattr(tracking, "job_metadata", lambda: job)
    with tracker(uri, tmp_path):
        pass
    tags = the_run(uri).data.tags
    assert tags["project.ray.submission_id"] == "raysubmit_1"
    assert tags["mlflow.source.git.commit"] == "c0ffee"


def test_no_secret_of_the_environment_reaches_the_tracker(uri, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret-7261")
    with tracker(uri, tmp_path) as told:
        told.log_metrics(1, {"loss": 1.0})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"planted-secret-7261" in path.read_bytes()]


def test_json_lines_follow_the_checkpoint_that_a_run_goes_on_from(store):
    def told(resume_from_step: int):
        return open_tracker("jsonl", INFO, store=store, resume_from_step=resume_from_step)

    with told(0) as first:
        for step in (5, 10, 15):
            first.log_metrics(step, {"loss": 1.0})
        first.log_image("samples", 10, np.zeros((4, 4, 3), np.uint8))
        first.finish("KILLED")
    with told(10) as second:
        second.log_metrics(15, {"loss": 2.0})
    lines = [json.loads(line) for line in store.get(JSONL).splitlines()]
    assert lines == [
        {"step": 5, "loss": 1.0},
        {"step": 10, "loss": 1.0},
        {"step": 15, "loss": 2.0},
        {"status": "FINISHED"},
    ]
    assert store.exists("tracking/samples-00000010.png")


def test_nothing_is_kept_where_nothing_is_wanted(tmp_path):
    store = open_store(str(tmp_path))
    with open_tracker("none", INFO, store=store, resume_from_step=0) as told:
        told.log_metrics(1, {"loss": 1.0})
        told.log_image("samples", 1, np.zeros((4, 4, 3), np.uint8))
    assert store.list_keys() == []
    assert os.listdir(tmp_path) == []
