"""One MLflow run per training run, across restarts, outages and kills."""

import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from data_prep.images import encode_png
from pipeline.evaluation.run_record import UnknownRunError, find_runs
from pipeline.tracking import RunInfo, event_queue, mlflow
from pipeline.tracking.mlflow import MlflowRun, MlflowTracker, NodeTracker, refusal

pytestmark = pytest.mark.slow  # seconds together

INFO = RunInfo(
    name="demo",
    url="s3://bucket/runs/demo",
    params={"train.steps": 80, "train.engine": "ddp"},
    config_yaml="name: demo\n",
    dataset_name="bundled",
    dataset_url="s3://bucket/datasets/bundled",
    dataset_digest="0123456789abcdef" * 4,
)


@pytest.fixture
def uri(tmp_path, empty_database) -> str:
    (tmp_path / "mlflow.db").write_bytes(empty_database)
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def tracker(uri: str, tmp_path: Path, info: RunInfo = INFO) -> MlflowTracker:
    return MlflowTracker(info, uri=uri, experiment="tests", queue_folder=tmp_path / "queue")


def the_run(uri: str) -> Run:
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    return run


def history(uri: str, key: str) -> list[tuple[int, float]]:
    run = the_run(uri)
    values = MlflowClient(uri).get_metric_history(run.info.run_id, key)
    return [(value.step, value.value) for value in values]


def test_a_run_is_recorded_completely(uri, tmp_path):
    with tracker(uri, tmp_path) as tracked:
        tracked.log_metrics(5, {"loss/l1_refined": 0.5, "speed/images_per_s": 3.0})
        tracked.log_metrics(10, {"loss/l1_refined": 0.25})
        tracked.log_image("samples", 10, np.zeros((4, 6, 3), np.uint8))
        tracked.log_artifact("profile/steps.json.gz", b"trace")
        tracked.log_tag("project.alarm.gray_coarse", "step 10: the coarse output is gray")
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
    assert next(artifacts.rglob("images/samples+step+10+*.png")).exists()
    assert next(artifacts.rglob("images/samples+step+10+*+compressed.webp")).exists()
    assert run.data.tags["mlflow.loggedImages"] == "True"
    assert next(artifacts.rglob("profile/steps.json.gz")).read_bytes() == b"trace"
    assert run.data.tags["project.alarm.gray_coarse"] == "step 10: the coarse output is gray"
    assert not [*(tmp_path / "queue").glob("*steps*")]  # delivered, so not kept here


def test_a_restart_resumes_the_run_and_repeats_no_step(uri, tmp_path):
    with tracker(uri, tmp_path) as tracked:
        for step in (5, 10, 15):
            tracked.log_metrics(step, {"loss": float(step)})
        tracked.finish("KILLED")
    assert the_run(uri).info.status == "KILLED"
    changed = replace(INFO, params={**INFO.params, "train.engine": "deepspeed"})
    with tracker(uri, tmp_path, changed) as tracked:  # from the checkpoint of step 10
        for step in (15, 20):
            tracked.log_metrics(step, {"loss": float(step)})
    assert history(uri, "loss") == [(5, 5.0), (10, 10.0), (15, 15.0), (20, 20.0)]
    run = the_run(uri)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.engine"] == "ddp"
    assert run.data.tags["resume.2.train.engine"] == "deepspeed"


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("lost"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_run_that_ends_early_has_the_status_that_says_why(uri, tmp_path, error, status):
    def ends_early() -> None:
        with tracker(uri, tmp_path) as tracked:
            tracked.log_metrics(1, {"loss": 1.0})
            raise error

    with pytest.raises(type(error)):
        ends_early()
    assert the_run(uri).info.status == status
    assert history(uri, "loss") == [(1, 1.0)]


def test_events_survive_an_outage_of_the_server_and_are_sent_later(
    uri, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(event_queue, "FLUSH_S", 2.0)
    with tracker("http://127.0.0.1:1", tmp_path) as tracked:
        tracked.log_metrics(1, {"loss": 1.0})
        tracked.log_image("samples", 1, np.zeros((4, 4, 3), np.uint8))
        assert tracked.run_id is None
    assert re.search(r"events for \S+ wait in", caplog.text)
    with tracker(uri, tmp_path) as tracked:
        tracked.log_metrics(2, {"loss": 2.0})
    assert history(uri, "loss") == [(1, 1.0), (2, 2.0)]
    assert next((tmp_path / "mlartifacts").rglob("samples+step+1+*.png")).exists()


def test_events_survive_kill_9(uri, tmp_path):
    program = f"""
import os, signal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tests.pipeline.tracking.test_mlflow import INFO, tracker
tracked = tracker("http://127.0.0.1:1", Path({str(tmp_path)!r}))
tracked.log_metrics(1, {{"loss": 1.0}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=Path.cwd())
    assert killed.returncode == -signal.SIGKILL
    with tracker(uri, tmp_path) as tracked:
        tracked.log_metrics(2, {"loss": 2.0})
    assert history(uri, "loss") == [(1, 1.0), (2, 2.0)]


def test_a_metric_that_mlflow_refuses_does_not_block_the_others(uri, tmp_path, caplog):
    with tracker(uri, tmp_path) as tracked:
        tracked.log_metrics(1, {"what?": 1.0})
        tracked.log_metrics(1, {"loss": 1.0})
    assert history(uri, "loss") == [(1, 1.0)]
    assert "refused" in caplog.text


def test_every_node_adds_its_system_metrics_to_the_one_run(uri, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    monkeypatch.setattr(event_queue, "RETRY_S", (0.2,))
    node = NodeTracker(INFO, uri=uri, experiment="tests", queue_folder=tmp_path / "queue", node=1)
    node.log_metrics(1, {"loss": 9.0})  # rank 0 records this
    with tracker(uri, tmp_path) as tracked, node:
        tracked.log_metrics(1, {"loss": 1.0})
        deadline = time.monotonic() + 30
        while "system/node-1/cpu_utilization_percentage" not in latest_values(uri):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    run = the_run(uri)
    assert run.info.status == "FINISHED"
    assert history(uri, "loss") == [(1, 1.0)]
    with tracker(uri, tmp_path):
        time.sleep(1)
    for number in (0, 1):
        steps = [
            step for step, _ in history(uri, f"system/node-{number}/system_memory_usage_megabytes")
        ]
        assert steps
        assert steps == sorted(set(steps))


@pytest.mark.slow
def test_a_node_that_waits_for_rank_0_does_not_call_the_server_away(
    uri, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(event_queue, "RETRY_S", (0.05,))
    monkeypatch.setattr(event_queue, "FLUSH_S", 1.0)
    node = NodeTracker(INFO, uri=uri, experiment="tests", queue_folder=tmp_path / "queue", node=1)
    with node:
        time.sleep(1)
    assert "no answer" not in caplog.text


def latest_values(uri: str) -> dict[str, float]:
    if MlflowClient(uri).get_experiment_by_name("tests") is None:
        return {}
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    return runs[0].data.metrics if runs else {}


def test_after_a_long_outage_events_are_sent_in_few_calls(uri, tmp_path, monkeypatch):
    monkeypatch.setattr(event_queue, "FLUSH_S", 0.5)
    with tracker("http://127.0.0.1:1", tmp_path) as tracked:
        for step in range(3000):
            tracked.log_metrics(step, {"loss": float(step)})
    monkeypatch.setattr(event_queue, "FLUSH_S", 30)
    started = time.monotonic()
    with tracker(uri, tmp_path):
        pass
    assert time.monotonic() - started < 20
    assert history(uri, "loss") == [(step, float(step)) for step in range(3000)]


def test_the_status_of_an_earlier_process_is_not_sent_once_the_run_resumes(
    uri, tmp_path, monkeypatch
):
    monkeypatch.setattr(event_queue, "FLUSH_S", 0.5)
    with tracker("http://127.0.0.1:1", tmp_path) as tracked:
        tracked.log_metrics(1, {"loss": 1.0})
    with tracker(uri, tmp_path) as tracked:
        tracked.log_metrics(2, {"loss": 2.0})
        deadline = time.monotonic() + 30
        while tracked.run_id is None or len(history(uri, "loss")) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert the_run(uri).info.status == "RUNNING"


def test_a_process_killed_while_it_wrote_the_number_of_delivered_events_loses_nothing(
    uri, tmp_path
):
    with tracker(uri, tmp_path) as tracked:
        tracked.log_metrics(1, {"loss": 1.0})
    (tmp_path / "queue" / "delivered").write_text("")
    with tracker(uri, tmp_path) as tracked:
        tracked.log_metrics(2, {"loss": 2.0})
    assert history(uri, "loss") == [(1, 1.0), (2, 2.0)]


def test_a_password_in_the_address_is_not_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(event_queue, "FLUSH_S", 3.0)
    with tracker("http://user:planted-secret@127.0.0.1:1", tmp_path) as tracked:
        tracked.log_metrics(1, {"loss": 1.0})
    assert "no answer, events are kept" in caplog.text
    assert "http://127.0.0.1:1" in caplog.text
    assert "planted-secret" not in caplog.text


def test_the_job_and_the_commit_are_tags(uri, tmp_path, monkeypatch):
    job = {"job_submission_id": "raysubmit_1", "git_commit": "c0ffee"}
    monkeypatch.setattr(mlflow, "job_metadata", lambda: job)
    with tracker(uri, tmp_path):
        pass
    tags = the_run(uri).data.tags
    assert tags["project.ray.submission_id"] == "raysubmit_1"
    assert tags["mlflow.source.git.commit"] == "c0ffee"


def test_no_secret_of_the_environment_reaches_the_tracker(uri, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret-7261")
    with tracker(uri, tmp_path) as tracked:
        tracked.log_metrics(1, {"loss": 1.0})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"planted-secret-7261" in path.read_bytes()]


def test_an_image_that_does_not_fit_on_the_disk_does_not_stop_training(uri, tmp_path, caplog):
    with tracker(uri, tmp_path) as tracked:
        (tmp_path / "queue" / "samples-00000001.png").mkdir()  # writing there fails, as if full
        tracked.log_image("samples", 1, np.zeros((4, 4, 3), np.uint8))
        tracked.log_metrics(1, {"loss": 1.0})
    assert "image samples at step 1 lost" in caplog.text
    assert history(uri, "loss") == [(1, 1.0)]


def test_runs_are_found_by_a_filter_and_by_their_id(uri, tmp_path):
    client = MlflowClient(uri)
    experiment = client.create_experiment("search")
    for name, convolution in (("a", "gated"), ("b", "vanilla"), ("c", "gated")):
        run = client.create_run(experiment, tags={"project.run": f"/runs/{name}"})
        client.log_param(run.info.run_id, "model.convolution", convolution)

    def find(word: str) -> list[str]:
        return find_runs([word], storage=None, tracking_uri=uri)

    assert find("params.`model.convolution` = 'gated'") == ["/runs/a", "/runs/c"]
    assert find(run.info.run_id) == ["/runs/c"]
    with pytest.raises(UnknownRunError, match="no MLflow run"):
        find("params.`model.convolution` = 'partial'")
    with pytest.raises(ValueError, match="cannot answer"):
        find("nonsense = 1")
    with pytest.raises(ValueError, match="database was not found"):
        find_runs(["a = 1"], storage=None, tracking_uri=f"sqlite:///{tmp_path}/x.db")


def test_an_image_that_is_sent_twice_is_there_once(uri, tmp_path):
    for _ in range(2):
        run = MlflowRun(INFO, uri, "tests")
        run.connect()
        path = tmp_path / "image.png"
        path.write_bytes(encode_png(np.zeros((4, 6, 3), np.uint8)))
        run.receive([{"kind": "image", "key": "samples", "step": 1, "path": str(path), "ms": 5}])
    images = sorted(path.suffix for path in (tmp_path / "mlartifacts").rglob("samples+step*"))
    assert images == [".png", ".webp"]


def test_a_checkpoint_is_a_model_with_metrics_bound_to_it_and_to_the_dataset(uri, tmp_path):
    for _ in range(2):
        with tracker(uri, tmp_path) as tracked:
            tracked.log_checkpoint(10, "s3://bucket/runs/demo/checkpoints/10", {"val/psnr_db": 20})
            tracked.log_checkpoint(20, "s3://bucket/runs/demo/checkpoints/20", {"val/psnr_db": 25})
    client = MlflowClient(uri)
    best, other = client.search_logged_models(
        [client.get_experiment_by_name("tests").experiment_id],
        order_by=[{"field_name": "metrics.val/psnr_db", "ascending": False}],
    )
    assert best.tags["project.url"] == "s3://bucket/runs/demo/checkpoints/20"
    (metric,) = best.metrics
    assert (metric.value, metric.step, metric.dataset_name) == (25, 20, "bundled")
    assert other.name == "demo-step-00000010"
    assert history(uri, "val/psnr_db") == [(10, 20.0), (20, 25.0)]


def test_a_pack_is_an_input_beside_the_dataset_and_is_there_once(uri, tmp_path):
    for _ in range(2):
        with tracker(uri, tmp_path) as tracked:
            tracked.log_pack("small", "s3://bucket/packs/small", "fedcba9876543210" * 4)
    inputs = {
        tag.value: (each.dataset.name, each.dataset.digest)
        for each in the_run(uri).inputs.dataset_inputs
        for tag in each.tags
    }
    assert inputs == {
        "training": ("bundled", "0123456789abcdef" * 2),
        "evaluation": ("small", "fedcba9876543210" * 2),
    }


def test_an_evaluation_is_no_attempt(uri, tmp_path):
    for training in (True, False, True):
        with tracker(uri, tmp_path, replace(INFO, training=training)) as tracked:
            tracked.log_metrics(1, {"loss": 1.0})
    assert the_run(uri).data.tags["project.attempt"] == "2"


def test_the_link_to_the_run_is_logged_at_the_start(uri, tmp_path, caplog):
    caplog.set_level("INFO")
    with tracker(uri, tmp_path) as tracked:
        deadline = time.monotonic() + 30
        while tracked.run_id is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.1)
        assert f"/runs/{tracked.run_id}" in caplog.text


def test_values_have_six_digits(uri, tmp_path):
    with tracker(uri, tmp_path) as tracked:
        tracked.log_metrics(1, {"loss": 0.123456789})
    assert history(uri, "loss") == [(1, 0.123457)]


def test_a_deleted_experiment_is_a_mistake_and_loses_nothing(uri, tmp_path, monkeypatch, caplog):
    client = MlflowClient(uri)
    experiment = client.create_experiment("tests")
    client.delete_experiment(experiment)
    assert "experiments restore" in (refusal(uri, "tests") or "")
    monkeypatch.setattr(event_queue, "FLUSH_S", 2.0)
    with tracker(uri, tmp_path) as tracked:
        tracked.log_metrics(1, {"loss": 1.0})
    assert "refused, events are kept" in caplog.text
    client.restore_experiment(experiment)
    assert refusal(uri, "tests") is None
    with tracker(uri, tmp_path) as tracked:
        tracked.log_metrics(2, {"loss": 2.0})
    assert history(uri, "loss") == [(1, 1.0), (2, 2.0)]


def test_a_server_that_is_away_is_no_mistake():
    assert refusal("http://127.0.0.1:1", "tests") is None


@pytest.mark.parametrize(
    "line",
    [b"5", b"{}", b'{"kind": "metrics"}', b'["kind"]', b'{"kind": []}', b"\xff", b"[" * 9999],
)
def test_a_foreign_line_in_the_queue_is_passed_over(uri, tmp_path, caplog, line):
    (tmp_path / "queue").mkdir()
    mine = b'{"kind": "metrics", "step": 1, "values": {"loss": 1.0}, "ms": 1}'
    (tmp_path / "queue" / "events.jsonl").write_bytes(line + b"\n" + mine + b"\n")
    (tmp_path / "queue" / "delivered").write_bytes(b"\xff")
    assert [event["step"] for event in event_queue.EventQueue(tmp_path / "queue").next_batch()] == [
        1
    ]
    assert "1 damaged lines" in caplog.text


def test_a_queue_that_cannot_be_written_is_in_memory(uri, tmp_path, caplog):
    (tmp_path / "queue").write_text("a file, where the folder would be")
    with tracker(uri, tmp_path) as tracked:
        tracked.log_metrics(1, {"loss": 1.0})
        tracked.log_image("samples", 1, np.zeros((4, 4, 3), np.uint8))
    assert history(uri, "loss") == [(1, 1.0)]
    assert caplog.text.count("in memory only") == 1


@pytest.mark.parametrize(("code", "refused"), [(401, True), (403, True), (404, True), (503, False)])
def test_only_what_a_server_will_not_change_by_itself_is_a_refusal(code, refused):
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reason = refusal(f"http://127.0.0.1:{server.server_port}", "tests")
        server.shutdown()
    assert (reason is not None) == refused
    assert not refused or "credentials" in str(reason)
