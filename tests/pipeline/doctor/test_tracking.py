"""Each fault of a tracker, planted: the line that names it, with its cure."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from cluster.ports import free_ports
from pipeline.config import TrackingSettings
from pipeline.doctor import tracking
from pipeline.doctor.tracking import tracking_probes
from pipeline.tracking.artifacts import ArtifactError
from tests.pipeline.doctor.lines import wrong


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


def look(uri: str) -> list[str]:
    (probe,) = tracking_probes(TrackingSettings(uri=uri))
    return wrong(probe.look())


@contextlib.contextmanager
def answering(status: int, text: str) -> Iterator[tuple[str, list[str]]]:
    """A server that gives one answer to everything; its URL, and the credentials it was sent."""
    sent: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            sent.append(self.headers.get("Authorization", ""))
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", sent
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def no_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without questions to MLflow's own client, which a fake server cannot answer."""
    monkeypatch.setattr(tracking, "refusal", lambda uri, experiment: None)
    monkeypatch.setattr(tracking, "artifact_location", lambda uri, experiment: "")


def test_a_server_that_is_away_is_a_problem() -> None:
    (line,) = look(f"http://127.0.0.1:{free_ports(['mlflow'])['mlflow']}")
    assert "no answer" in line
    assert "-> start the server, or correct tracking.uri" in line


@pytest.mark.parametrize(
    ("status", "text", "said", "cure"),
    [
        (401, "", "problem .*it refuses .HTTP 401", "MLFLOW_TRACKING_USERNAME"),
        (502, "", "problem .*it fails .HTTP 502", "log of the MLflow server"),
        (404, "", "warning .*it has no /version", "check tracking.uri"),
        (200, "<html>welcome</html>", "warning .*not that of MLflow", "check tracking.uri"),
        (200, "2.9.2", "warning .*the server has MLflow 2.9.2, and this client", "upgrade"),
    ],
)
@pytest.mark.usefixtures("no_experiment")
def test_a_server_that_is_not_what_it_should_be_is_named(
    status: int, text: str, said: str, cure: str
) -> None:
    import re

    with answering(status, text) as (uri, _):
        (line,) = look(uri)
    assert re.search(said, line)
    assert cure in line.partition("->")[2]


@pytest.mark.usefixtures("no_experiment")
def test_a_server_in_order_is_asked_with_the_credentials_and_shows_none() -> None:
    with answering(200, metadata.version("mlflow")) as (uri, sent):
        (probe,) = tracking_probes(
            TrackingSettings(uri=uri.replace("http://", "http://user:planted@"))
        )
        findings = list(probe.look())
    assert wrong(findings) == []
    assert sent == ["Basic dXNlcjpwbGFudGVk"]
    assert "planted" not in str(findings)


def test_a_folder_as_address_is_a_problem() -> None:
    (line,) = look("file:///runs/mlruns")
    assert "is a folder, which MLflow no longer records in" in line


def test_a_database_that_is_not_there_yet_is_not_made(tmp_path: Path) -> None:
    assert look(f"sqlite:///{tmp_path}/mlflow.db") == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_deleted_experiment_is_a_problem_with_the_command_that_restores_it(
    tmp_path: Path,
) -> None:
    from mlflow.client import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("deepfill", artifact_location=f"file://{tmp_path}/kept")
    before = sorted(tmp_path.iterdir())
    assert look(uri) == []
    assert sorted(tmp_path.iterdir()) == before
    client.delete_experiment(experiment)
    (line,) = look(uri)
    assert "the experiment deepfill was deleted" in line
    assert "mlflow experiments restore" in line


class Artifacts:
    """A store of artifacts that refuses ``step``."""

    def __init__(self, step: str) -> None:
        self.step = step

    def _do(self, step: str) -> None:
        if step == self.step:
            raise ArtifactError("ConnectionError: planted")

    def put(self, key: str, data: bytes) -> None:
        self._do("put")

    def get(self, key: str) -> bytes:
        self._do("get")
        return b"probe"

    def list_keys(self, folder: str) -> list[str]:
        self._do("list")
        return [folder]

    def delete(self, key: str) -> None:
        self._do("delete")


@pytest.mark.parametrize("step", ["put", "get", "list", "delete"])
@pytest.mark.parametrize(
    ("location", "cure"),
    [
        ("mlflow-artifacts:/1", "start the server with --artifacts-destination"),
        ("s3://bucket/artifacts", "give it the credentials and AWS_ENDPOINT_URL"),
    ],
)
def test_artifacts_that_cannot_be_written_are_a_problem(
    step: str, location: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "artifact_location", lambda uri, experiment: location)
    monkeypatch.setattr(tracking, "ArtifactFolder", lambda url, uri: Artifacts(step))
    (line,) = wrong(tracking._artifact_findings("http://mlflow:5000", "deepfill"))
    assert line.startswith(f"problem MLflow's artifacts {location}: {step} failed")
    assert cure in line
    monkeypatch.setattr(tracking, "ArtifactFolder", lambda url, uri: Artifacts("none"))
    assert wrong(tracking._artifact_findings("http://mlflow:5000", "deepfill")) == []


def test_artifacts_in_a_folder_of_the_server_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tracking, "artifact_location", lambda uri, experiment: str(tmp_path))
    (line,) = wrong(tracking._artifact_findings("http://mlflow:5000", "deepfill"))
    assert "a folder of the server's machine" in line
    assert "--artifacts-destination" in line
    assert wrong(tracking._artifact_findings("sqlite:///mlflow.db", "deepfill")) == []
