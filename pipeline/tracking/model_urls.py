"""Where on storage the weights lie that MLflow calls ``runs:/ID`` or ``models:/NAME@ALIAS``."""

from __future__ import annotations

import os
import re
from typing import Any

from cluster.storage import describe_error, join, scheme_of, without_password
from cluster.storage.schemes import SCHEMES
from pipeline.tracking.database import database_path
from pipeline.tracking.mlflow import importing_mlflow
from pipeline.tracking.opening import resolve_uri

WEIGHTS_URL = "project.weights_url"
"""Tag of a registered model's version: the checkpoint, or the weights file, on storage."""
RUN_URL = "project.run"
CHECKPOINT_URL = "project.url"
FORMS = "runs:/ID, models:/NAME@ALIAS, models:/NAME/VERSION or models:/m-ID"
REQUEST_S = 10  # MLflow itself waits for minutes


def storage_url(url: str, tracking_uri: str | None = None) -> str:
    """The URL on storage behind ``url``, one of ``FORMS``; a run's folder, or a checkpoint.

    Further parts of a path stay: ``runs:/ID/checkpoints/step-00000200``. MLflow is asked at
    ``tracking_uri``, or else at ``MLFLOW_TRACKING_URI``. Raises ValueError, in one line, where it
    is away, does not know the model, or does not know where its weights are.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_S))
    uri = resolve_uri(tracking_uri)
    shown = without_password(uri)
    if (path := database_path(uri)) is not None and not path.exists():
        raise ValueError(
            f"{url} is known to MLflow alone, and {shown} was not found: set MLFLOW_TRACKING_URI, "
            "or give the URL on storage"
        )
    with importing_mlflow():
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    try:
        found, rest = _find(MlflowClient(tracking_uri=uri), url)
    except MlflowException as error:
        raise ValueError(
            f"{url} is known to MLflow alone, and {shown} says: {describe_error(error)}; check "
            "MLFLOW_TRACKING_URI, or give the URL on storage"
        ) from error
    if not found:
        raise ValueError(f"{url} at {shown} does not say where its weights are: give their URL")
    return join(found, rest) if rest else found


def _find(client: Any, url: str) -> tuple[str, str]:
    """The URL on storage that MLflow has, or an empty one; and the rest of the path."""
    if match := re.fullmatch(r"runs:/+([^/]+)/?(.*)", url):
        return client.get_run(match[1]).data.tags.get(RUN_URL, ""), match[2]
    if match := re.fullmatch(r"models:/+(m-[^/@]+)/?(.*)", url):
        return _of_logged_model(client, match[1]), match[2]
    if match := re.fullmatch(r"models:/+([^/@]+)@([^/@]+)", url):
        return _of_version(client, client.get_model_version_by_alias(match[1], match[2])), ""
    if match := re.fullmatch(r"models:/+([^/@]+)/(\d+)/?(.*)", url):
        return _of_version(client, client.get_model_version(match[1], match[2])), match[3]
    raise ValueError(f"{without_password(url)}: MLflow's addresses are {FORMS}")


def _of_version(client: Any, version: Any) -> str:
    if url := version.tags.get(WEIGHTS_URL, ""):
        return str(url)
    if model_id := getattr(version, "model_id", None):
        return _of_logged_model(client, model_id)
    source = str(version.source or "")
    return source if scheme_of(source) in SCHEMES and scheme_of(source) else ""


def _of_logged_model(client: Any, model_id: str) -> str:
    tags = client.get_logged_model(model_id).tags
    return str(tags.get(WEIGHTS_URL) or tags.get(CHECKPOINT_URL, ""))
