"""Probes of the tracker: server or database, its experiment, where it keeps artifacts."""

import base64
import contextlib
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from cluster.storage import describe_error, scheme_of, without_password
from pipeline.config import TrackingSettings
from pipeline.doctor.findings import Diagnosis, Probe, ok, problem, warning
from pipeline.doctor.storage import cause_and_cure
from pipeline.tracking.artifacts import ArtifactFolder, artifact_location
from pipeline.tracking.database import database_path
from pipeline.tracking.mlflow import refusal
from pipeline.tracking.opening import resolve_uri

SUBJECT = "tracking"
ANSWER_S = 5.0
CHECK_CREDENTIALS = (
    "check tracking.uri, and MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or _TOKEN"
)


def tracking_probes(settings: TrackingSettings) -> list[Probe]:
    """Whether this machine can write to the tracker."""
    if settings.backend != "mlflow":
        message = f"tracking.backend is {settings.backend}: MLflow is not used"
        return [Probe(SUBJECT, lambda: [ok(SUBJECT, message)])]
    return [Probe(SUBJECT, lambda: _findings(settings), patience_s=40)]


def _findings(settings: TrackingSettings) -> Iterator[Diagnosis]:
    try:
        uri = resolve_uri(settings.uri)
    except ValueError as error:
        yield problem(SUBJECT, *cause_and_cure(error))
        return
    subject = f"{SUBJECT} {without_password(uri)}"
    if uri.startswith(("http://", "https://")):
        server = list(_server_findings(subject, uri))
        yield from server
        if any(finding.verdict == "problem" for finding in server):
            return
    elif (path := database_path(uri)) is not None:
        database = list(_database_findings(subject, path))
        yield from database
        if not path.exists():
            return
    if (reason := refusal(uri, settings.experiment)) is not None:
        cause, cure = cause_and_cure(ValueError(reason), CHECK_CREDENTIALS)
        yield problem(subject, cause, cure)
        return
    yield ok(subject, f"experiment {settings.experiment} can be written")
    yield from _artifact_findings(uri, settings.experiment)


def _server_findings(subject: str, uri: str) -> Iterator[Diagnosis]:
    try:
        version = _fetched(f"{uri.rstrip('/')}/version")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            yield problem(subject, f"it refuses (HTTP {error.code})", CHECK_CREDENTIALS)
        elif error.code >= 500:
            yield problem(
                subject, f"it fails (HTTP {error.code})", "read the log of the MLflow server"
            )
        else:
            yield warning(
                subject,
                f"it has no /version (HTTP {error.code}), so it may not be MLflow",
                "check tracking.uri or MLFLOW_TRACKING_URI, with the path of a proxy in it",
            )
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        yield problem(
            subject,
            f"no answer ({describe_error(reason) if isinstance(reason, Exception) else reason})",
            "start the server, or correct tracking.uri or MLFLOW_TRACKING_URI; training does "
            "without it, and `tracking sync` delivers later",
        )
        return
    here = metadata.version("mlflow")
    if not version[:1].isdigit() or len(version) > 30:
        yield warning(
            subject,
            "its /version is not that of MLflow",
            "check tracking.uri or MLFLOW_TRACKING_URI",
        )
    elif _series(version) < _series(here):
        yield warning(
            subject,
            f"the server has MLflow {version}, and this client {here}",
            "upgrade the server: an older one has no models for checkpoints",
        )
    else:
        yield ok(subject, f"MLflow {version} answers")


def _series(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _fetched(url: str) -> str:
    """The text at ``url``, with the credentials that MLflow's own client would send."""
    parts, headers = urlsplit(url), {}
    name = parts.username or os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = parts.password or os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if name and password:
        pair = base64.b64encode(f"{name}:{password}".encode()).decode()
        headers["Authorization"] = f"Basic {pair}"
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    request = urllib.request.Request(bare, headers=headers)
    with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
        return str(answer.read(10_000).decode(errors="replace").strip())


def sharing_findings(settings: TrackingSettings, nodes: int) -> Iterator[Diagnosis]:
    """Whether all ``nodes`` reach the tracker: the rank that tracks may run on any of them."""
    with contextlib.suppress(ValueError):  # of a URI that the probes of tracking report
        if settings.backend == "mlflow" and nodes > 1 and database_path(resolve_uri(settings.uri)):
            yield warning(
                SUBJECT,
                f"its database is a file of this machine, and any of {nodes} nodes may write to it",
                "start an MLflow server, and set MLFLOW_TRACKING_URI on every node",
            )


def _database_findings(subject: str, path: Path) -> Iterator[Diagnosis]:
    folder = path.absolute().parent
    there = next(above for above in (folder, *folder.parents) if above.exists())
    target = path if path.exists() else there
    if not os.access(target, os.W_OK):
        yield problem(
            subject, f"{target} cannot be written", "give this user the right, or set tracking.uri"
        )
    elif path.exists():
        yield ok(subject, f"{path} can be written")
    else:
        yield ok(subject, "the first run makes this database")


def _artifact_findings(uri: str, experiment: str) -> Iterator[Diagnosis]:
    try:
        location = artifact_location(uri, experiment)
    except OSError as error:
        yield problem("MLflow's artifacts", describe_error(error), CHECK_CREDENTIALS)
        return
    if not location:
        return
    subject = f"MLflow's artifacts {without_password(location)}"
    if scheme_of(location) in ("", "file"):
        yield from _local_artifacts(subject, location, uri)
        return
    name = f"doctor-{secrets.token_hex(6)}"
    step = "put"
    try:
        folder = ArtifactFolder(location, uri)
        folder.put(f"{name}/probe.txt", b"probe")
        step = "get"
        if folder.get(f"{name}/probe.txt") != b"probe":
            raise OSError("other bytes came back")
        step = "list"
        if not folder.list_keys(name):
            raise OSError("what was put is not listed")
        step = "delete"
        folder.delete(f"{name}/probe.txt")
    except OSError as error:
        cure = (
            "start the server with --artifacts-destination s3://..., and with its credentials"
            if location.startswith("mlflow-artifacts:")
            else "this machine writes there itself: give it the credentials and AWS_ENDPOINT_URL, "
            "or let the server do it (`mlflow server --artifacts-destination`)"
        )
        yield problem(subject, f"{step} failed: {describe_error(error)}", cure)
        return
    yield ok(subject, "put, get, list and delete")


def _local_artifacts(subject: str, location: str, uri: str) -> Iterator[Diagnosis]:
    path = Path(location.removeprefix("file://"))
    there = next(above for above in (path, *path.parents) if above.exists())
    if uri.startswith(("http://", "https://")):
        yield problem(
            subject,
            "a folder of the server's machine, and each client would write to its own disk",
            "start the server with --artifacts-destination, then use another experiment: the "
            "location of one never changes",
        )
    elif not os.access(there, os.W_OK):
        yield problem(subject, f"{there} cannot be written", "give this user the right")
    else:
        yield ok(subject, f"{there} can be written")
