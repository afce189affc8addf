"""A folder of MLflow's artifacts, read and written by MLflow's client."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.storage import describe_error
from pipeline.tracking.mlflow import importing_mlflow


class ArtifactError(OSError):
    """MLflow's artifact client failed; the message is one line."""


class ArtifactFolder:
    """The artifacts at ``url``: ``s3://``, a path, or ``mlflow-artifacts:/`` of a server.

    ``tracking_uri`` is the server, for the last of them. Every method may raise ArtifactError.
    """

    def __init__(self, url: str, tracking_uri: str | None = None) -> None:
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        with importing_mlflow():
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
        with _artifact_errors():
            self._repository: Any = get_artifact_repository(url, tracking_uri=tracking_uri)

    def put(self, key: str, data: bytes) -> None:
        folder, _, name = key.rpartition("/")
        with _artifact_errors(), tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, name)
            path.write_bytes(data)
            self._repository.log_artifact(str(path), folder or None)

    def get(self, key: str) -> bytes:
        with _artifact_errors(), tempfile.TemporaryDirectory() as scratch:
            return Path(self._repository.download_artifacts(key, scratch)).read_bytes()

    def list_keys(self, folder: str) -> list[str]:
        with _artifact_errors():
            return sorted(str(info.path) for info in self._repository.list_artifacts(folder))

    def delete(self, key: str) -> None:
        with _artifact_errors():
            self._repository.delete_artifacts(key)


@contextlib.contextmanager
def _artifact_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # boto3's, MLflow's and the file system's
        raise ArtifactError(describe_error(error)) from error


def artifact_location(uri: str, experiment: str) -> str:
    """Where MLflow at ``uri`` keeps the artifacts of ``experiment``, or of its default one.

    Empty where it has neither. Raises ArtifactError where it cannot be asked.
    """
    with importing_mlflow():
        from mlflow.client import MlflowClient
    with _artifact_errors():
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment) or client.get_experiment("0")
        return str(found.artifact_location) if found else ""
