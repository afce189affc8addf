"""A real MLflow server that answers 503, is killed and starts again while a run logs."""

import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from cluster.ports import free_ports
from pipeline.tracking import RunInfo, event_queue
from pipeline.tracking.mlflow import MlflowTracker, refusal
from tests.data_prep.processes import kill_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

START_S = 120
LOOPBACK = "127.0.0.1"  # MLflow refuses to be called by other names


class Server:
    """``mlflow server`` on one port, started and killed at will."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.port = folder, free_ports(["mlflow"], host=LOOPBACK)["mlflow"]
        self.uri = f"http://{LOOPBACK}:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK),
            *("--port", str(self.port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}"),
            *("--artifacts-destination", str(self._folder / "artifacts")),
        ]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.2)

    def kill(self) -> None:
        if self._process is not None:
            kill_tree(self._process)
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return True
        except OSError:
            return False


class Busy(BaseHTTPRequestHandler):
    """Passes requests on to ``port``, or answers 503 while ``busy``."""

    port = 0
    busy = False
    refused = 0
    called = ""
    """By this name, instead of its address."""

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if type(self).busy:
            type(self).refused += 1
            self.send_error(503)
            return
        headers = {name: value for name, value in self.headers.items() if name != "Host"}
        if self.called:
            headers["Host"] = self.called
        request = urllib.request.Request(
            f"http://{LOOPBACK}:{self.port}{self.path}", body or None, headers, method=self.command
        )
        try:
            answer = urllib.request.urlopen(request, timeout=30)
        except urllib.error.HTTPError as error:
            answer = error
        except OSError:
            self.send_error(502)
            return
        content = answer.read()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def front(server: Server) -> Iterator[type[Busy]]:
    """What the run talks to: the server behind something that can be busy."""
    handler = type("Front", (Busy,), {"port": server.port, "busy": False, "refused": 0})
    listener = ThreadingHTTPServer((LOOPBACK, 0), handler)
    handler.address = f"http://{LOOPBACK}:{listener.server_port}"  # type: ignore[attr-defined]
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    yield handler
    listener.shutdown()
    listener.server_close()
    thread.join()


def test_a_run_loses_and_repeats_nothing_while_its_server_is_busy_dies_and_comes_back(
    server: Server, front: type[Busy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_queue, "RETRY_S", (0.2,))
    monkeypatch.setattr(event_queue, "FLUSH_S", 60.0)
    info = RunInfo(name="demo", url="s3://bucket/runs/demo", params={"train.steps": 8})
    uri: str = front.address  # type: ignore[attr-defined]
    with MlflowTracker(info, uri=uri, experiment="tests", queue_folder=tmp_path / "q") as tracked:
        tracked.log_metrics(1, {"loss": 1.0})
        wait_for(lambda: tracked.run_id is not None and not len(tracked._queue))
        front.busy = True
        tracked.log_metrics(2, {"loss": 2.0})
        tracked.log_image("samples", 2, np.zeros((4, 4, 3), np.uint8))
        wait_for(lambda: front.refused > 4)
        front.busy = False
        wait_for(lambda: not len(tracked._queue))
        front.called = "mlflow.example.org"
        assert "--allowed-hosts" in (refusal(uri, "tests") or "")
        front.called = ""
        server.kill()
        tracked.log_metrics(3, {"loss": 3.0})
        tracked.log_checkpoint(4, "s3://bucket/runs/demo/checkpoints/4", {"val/psnr_db": 20.0})
        time.sleep(1)  # some attempts meet a closed port
        assert len(tracked._queue) == 2
        server.start()
        tracked.log_metrics(5, {"loss": 5.0})

    client = MlflowClient(server.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert run.info.status == "FINISHED"
    values = client.get_metric_history(run.info.run_id, "loss")
    assert [(value.step, value.value) for value in values] == [(1, 1), (2, 2), (3, 3), (5, 5)]
    assert [value.step for value in client.get_metric_history(run.info.run_id, "val/psnr_db")] == [
        4
    ]
    images = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    assert len([path for path in images if path.endswith(".png")]) == 1


def wait_for(holds, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
