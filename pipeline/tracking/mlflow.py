"""Tracking with MLflow: one MLflow run per training run, across restarts and nodes."""

import contextlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cluster.git import git_commit
from cluster.session import job_metadata
from cluster.storage import StorageError, describe_error, one_line, without_password
from data_prep.images import encode_png
from pipeline.tracking.database import database_path, ensure_database
from pipeline.tracking.event_queue import (
    BATCH_VALUES,
    EventQueue,
    EventSender,
    NotCreatedError,
    RefusedError,
)
from pipeline.tracking.protocol import FinishOnExit, NullTracker, RunInfo, Status

log = logging.getLogger(__name__)

SAMPLE_S = 10.0  # between readings of this machine; MLflow's own variable overrides it
PARAM_LENGTH = 6000  # MLflow cuts longer values without a warning
NOTE = "mlflow.note.content"
CHECK_S = 15.0  # the start of training waits this long for a server that may refuse
PARAMS_PER_CALL = 100  # MLflow accepts this many
MOST_RUNS = 200  # in one comparison
REFUSALS = ("PERMISSION_DENIED", "UNAUTHENTICATED", "ENDPOINT_NOT_FOUND")
DIGEST_LENGTH = 32  # MLflow refuses digests of more than 36 characters


class MlflowTracker(FinishOnExit):
    """One MLflow run for all restarts, written by a thread so that training never waits.

    Every event is written to the file of ``queue_folder`` first. Sending is retried while the
    server is down. Events that are left at the end stay in the file, and the next tracker of this
    run on this machine sends them. The tag ``project.run`` identifies the MLflow run. A metric
    that has a value at a step, or at a later one, gets no second value: a resumed run repeats
    steps, but does not record them twice.
    """

    def __init__(self, info: RunInfo, *, uri: str, experiment: str, queue_folder: Path) -> None:
        self._run = MlflowRun(info, uri, experiment)
        self._queue = EventQueue(queue_folder)
        self._sender = EventSender(self._run, self._queue)
        self._monitor = SystemMonitor(0, uri, self._queue)

    @property
    def run_id(self) -> str | None:
        return self._run.id

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._queue.add(_metrics("metrics", step, values))
        self._monitor.begin()

    def log_checkpoint(self, step: int, url: str, values: Mapping[str, float]) -> None:
        self._queue.add(_metrics("checkpoint", step, values) | {"url": url})

    def log_image(self, key: str, step: int, pixels: np.ndarray) -> None:
        path = self._queue.folder / f"{key}-{step:08d}.png"
        try:
            path.write_bytes(encode_png(pixels))
        except OSError as error:
            log.warning("tracking: image %s at step %d lost: %s", key, step, describe_error(error))
            return
        event = {"kind": "image", "key": key, "step": step, "path": str(path), "ms": _now_ms()}
        self._queue.add(event)

    def log_pack(self, name: str, url: str, digest: str) -> None:
        self._queue.add({"kind": "pack", "name": name, "url": url, "digest": digest})

    def log_artifact(self, name: str, data: bytes) -> None:
        path = self._queue.folder / name.replace("/", "~")
        try:
            path.write_bytes(data)
        except OSError as error:
            log.warning("tracking: the file %s was lost: %s", name, describe_error(error))
            return
        self._queue.add({"kind": "artifact", "name": name, "path": str(path)})

    def log_tag(self, name: str, text: str) -> None:
        self._queue.add({"kind": "tag", "name": name, "text": text})

    def _close(self) -> None:
        self._monitor.close()
        self._queue.add({"kind": "end", "status": self._status})
        self._sender.close()


class NodeTracker(NullTracker):
    """The system metrics of a further node, added to the run that rank 0 has created."""

    def __init__(
        self, info: RunInfo, *, uri: str, experiment: str, queue_folder: Path, node: int
    ) -> None:
        queue = EventQueue(queue_folder.with_name(f"{queue_folder.name}-node-{node}"))
        self._sender = EventSender(MlflowRun(info, uri, experiment, creates=False), queue)
        self._monitor = SystemMonitor(node, uri, queue)

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._monitor.begin()

    def _close(self) -> None:
        self._monitor.close()
        self._sender.close()


class SystemMonitor:
    """A thread that samples CPU, memory, disk, network and GPU of this machine.

    It begins with the first metrics of training: MLflow lists metrics in the order of their first
    values, and these come last.
    """

    def __init__(self, node: int, uri: str, queue: EventQueue) -> None:
        self._node, self._uri, self._queue = node, uri, queue
        self._begun, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="system-monitor", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        self._begun.set()

    def close(self) -> None:
        self._closed.set()
        self._begun.set()
        self._thread.join()

    def _watch(self) -> None:
        self._begun.wait()
        if self._closed.is_set():
            return
        # MLflow's own readings and names; its own thread gives up when the server is down.
        with importing_mlflow():
            from mlflow.system_metrics import system_metrics_monitor as mlflow_monitor
        logging.getLogger(mlflow_monitor.__name__).setLevel(logging.WARNING)
        monitor = mlflow_monitor.SystemMetricsMonitor(None, tracking_uri=self._uri)
        interval_s = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", SAMPLE_S))
        while not self._closed.wait(interval_s):
            try:
                monitor.collect_metrics()
                readings = monitor.aggregate_metrics().items()
            except Exception as error:  # of a GPU driver, for example
                log.warning("tracking: system metrics end here: %s", describe_error(error))
                return
            for part in monitor.monitors:
                part.clear_metrics()
            values = {f"system/node-{self._node}/{name}": value for name, value in readings}
            self._queue.add({"kind": "machine", "values": values, "ms": _now_ms()})


class MlflowRun:
    """The run on the server, found or created once; it receives events in order.

    ``creates=False``: wait until rank 0 has created the run.
    """

    def __init__(self, info: RunInfo, uri: str, experiment: str, *, creates: bool = True) -> None:
        self.id: str | None = None
        self.address = without_password(uri)
        self._info, self._uri, self._experiment, self._creates = info, uri, experiment, creates
        self._last_steps: dict[str, int] = {}
        self._readings = 0
        self._attempt: int | None = None

    def connect(self) -> None:
        """Find or create the run, and record this attempt in it.

        Raises RefusedError where waiting is no cure.
        """
        if self.id is not None:
            return
        with _refusals(self._uri):
            self._connect()

    def _connect(self) -> None:
        with importing_mlflow():
            from mlflow.client import MlflowClient

            if (path := database_path(self._uri)) is not None:
                ensure_database(path)
        self._client = client = MlflowClient(tracking_uri=self._uri)
        experiment_id = self._experiment_id()
        found = client.search_runs(
            [experiment_id], f"tags.`project.run` = '{self._info.url}'", max_results=1
        )
        if found:
            # The newest step of each metric, without its whole history.
            self._last_steps = {metric.key: metric.step for metric in found[0].data._metric_objs}
            system = [step for key, step in self._last_steps.items() if key.startswith("system/")]
            self._readings = max(system, default=-1) + 1
        if not self._creates:
            if not found:
                raise NotCreatedError(f"rank 0 has not created the run of {self._info.url} yet")
            self.id = found[0].info.run_id
            return
        run = (
            found[0]
            if found
            else client.create_run(
                experiment_id,
                run_name=self._info.name,
                tags={"project.run": self._info.url, "project.attempt": "0"},
            )
        )
        if self._info.training or not found:
            self._begin_attempt(run)
        self._send_recorded(run.info.run_id)
        self.id = run.info.run_id
        if self._info.training:
            log.info("tracking: %s", _link(self._uri, experiment_id, self.id))

    def probe(self) -> None:
        """Raise RefusedError where ``connect`` would; nothing is created."""
        with _refusals(self._uri):
            path = database_path(self._uri)
            if path is not None and not path.exists():
                return
            with importing_mlflow():
                from mlflow.client import MlflowClient
            if path is not None:
                ensure_database(path)
            self._client = MlflowClient(tracking_uri=self._uri)
            if self._client.get_experiment_by_name(self._experiment) is not None:
                self._experiment_id()

    def end_unless_ended(self, status: Status | None) -> None:
        """Set ``status`` where the run has none that is final."""
        assert self.id is not None
        if status and self._client.get_run(self.id).info.status in ("RUNNING", "SCHEDULED"):
            self._client.set_terminated(self.id, status)

    def receive(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Record metrics of the same kind, or one event of another kind."""
        with _refusals(self._uri):
            self._receive(events)

    def _receive(self, events: Sequence[Mapping[str, Any]]) -> None:
        assert self.id is not None
        kind = events[0]["kind"]
        if kind == "metrics":
            self._log_values([event["step"] for event in events], events)
        elif kind == "machine":
            self._log_values([self._readings + number for number in range(len(events))], events)
            self._readings += len(events)
        elif kind == "checkpoint":
            for event in events:
                self._log_checkpoint(event)
        elif kind == "image":
            self._log_image(events[0])
        elif kind == "pack":
            self._log_input(self.id, "evaluation", events[0])
        elif kind == "artifact":
            self._log_file(events[0])
        elif kind == "tag":
            self._client.set_tag(self.id, events[0]["name"], events[0]["text"])
        else:
            self._client.set_terminated(self.id, events[0]["status"])

    def _begin_attempt(self, run: Any) -> None:
        """Parameters, tags, configuration and dataset; the run has the status RUNNING."""
        from mlflow.entities import Param, RunTag

        client, run_id = self._client, run.info.run_id
        if self._attempt is None:  # else this is a repetition after a failure
            self._attempt = int(run.data.tags.get("project.attempt", "0")) + self._info.training
        attempt = self._attempt
        tags = dict(self._info.tags) | _origin_tags() | {"project.attempt": str(attempt)}
        if self._info.note and NOTE not in run.data.tags:  # people write there as well
            tags[NOTE] = self._info.note
        if self._info.parent:
            tags["mlflow.parentRunId"] = self._parent_id(run.info.experiment_id)
        if self._info.dataset_digest:
            tags["project.dataset.digest"] = self._info.dataset_digest
        params = {key: str(value)[:PARAM_LENGTH] for key, value in self._info.params.items()}
        known = run.data.params
        for key, value in params.items():
            if key in known and known[key] != value:
                tags[f"resume.{attempt}.{key}"] = value  # MLflow's parameters cannot be changed
        new = [Param(key, value) for key, value in params.items() if key not in known]
        for start in range(0, len(new), PARAMS_PER_CALL):
            client.log_batch(run_id, params=new[start : start + PARAMS_PER_CALL])
        client.log_batch(run_id, tags=[RunTag(*tag) for tag in tags.items()])
        client.update_run(run_id, status="RUNNING")
        if self._info.config_yaml:
            client.log_text(run_id, self._info.config_yaml, "config/resolved.yaml")
        if self._info.code_diff:
            client.log_text(run_id, self._info.code_diff, f"code/attempt-{attempt}.diff")
        if self._info.dataset_digest and not run.inputs.dataset_inputs:
            dataset = {"name": self._info.dataset_name, "url": self._info.dataset_url}
            self._log_input(run_id, "training", dataset | {"digest": self._info.dataset_digest})

    def _parent_id(self, experiment_id: str) -> str:
        """The run of the sweep, found or created; children that start together agree on it."""
        client, url = self._client, self._info.parent

        def oldest() -> str | None:
            found = client.search_runs(
                [experiment_id],
                f"tags.`project.sweep` = '{url}'",
                max_results=1,
                order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
            )
            return str(found[0].info.run_id) if found else None

        if (parent := oldest()) is not None:
            return parent
        name = url.rstrip("/").rpartition("/")[2]
        run = client.create_run(experiment_id, run_name=name, tags={"project.sweep": url})
        made = str(run.info.run_id)
        if (parent := oldest() or made) != made:
            client.delete_run(made)
        return parent

    def _send_recorded(self, run_id: str) -> None:
        """What the run keeps on storage and MLflow does not have, metric by metric and in order.

        So nothing is lost with a machine, and nothing comes twice.
        """
        from mlflow.entities import Metric

        try:
            recorded = self._info.recorded()
        except OSError as error:  # storage is away
            log.warning("tracking: metrics on storage were not read: %s", describe_error(error))
            return
        for key, points in recorded.items():
            if not points:
                continue
            known: set[int] = set()
            if key in self._last_steps:
                known = {value.step for value in self._client.get_metric_history(run_id, key)}
            new = [
                Metric(key, _rounded(v), ms, step) for step, ms, v in points if step not in known
            ]
            for start in range(0, len(new), BATCH_VALUES):
                self._client.log_batch(run_id, metrics=new[start : start + BATCH_VALUES])
            self._last_steps[key] = max(self._last_steps.get(key, -1), points[-1][0])

    def _log_values(
        self,
        steps: Sequence[int],
        events: Sequence[Mapping[str, Any]],
        model_id: str | None = None,
    ) -> None:
        """Values at steps that their metric does not have yet."""
        from mlflow.entities import Metric

        bound: dict[str, Any] = {}
        if model_id is not None:
            bound["model_id"] = model_id
            if self._info.dataset_digest:
                bound["dataset_name"] = self._info.dataset_name
                bound["dataset_digest"] = self._info.dataset_digest[:DIGEST_LENGTH]

        last, new = dict(self._last_steps), []
        for step, event in zip(steps, events, strict=True):
            for key, value in event["values"].items():
                if step > last.get(key, -1):
                    new.append(Metric(key, value, event["ms"], step, **bound))
                    last[key] = step
        if new:
            self._client.log_batch(self.id, metrics=new)
        self._last_steps = last

    def _log_checkpoint(self, event: Mapping[str, Any]) -> None:
        """A model of MLflow's for the checkpoint, and its metrics; its weights stay on storage."""
        model_id = None
        try:
            model_id = self._model_of(event)
        except Exception as error:  # an older server has no such models; the metrics still count
            log.warning(
                "tracking: the checkpoint of step %d is no model on MLflow: %s",
                event["step"],
                describe_error(error),
            )
        self._log_values([event["step"]], [event], model_id)

    def _model_of(self, event: Mapping[str, Any]) -> str:
        from mlflow.entities import LoggedModelStatus

        client = self._client
        experiment_id = client.get_run(self.id).info.experiment_id
        name = f"{self._info.name}-step-{event['step']:08d}"
        found = client.search_logged_models(
            [experiment_id], f"name = '{name}' AND source_run_id = '{self.id}'", max_results=1
        )
        model = (
            found[0]
            if found
            else client.create_logged_model(
                experiment_id,
                name=name,
                source_run_id=self.id,
                tags={
                    "mlflow.model.isExternal": "true",
                    "project.url": event["url"],
                    "project.run": self._info.url,
                },
                params={"step": str(event["step"])},
                model_type="inpainting",
            )
        )
        if model.status != LoggedModelStatus.READY:
            client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def _log_image(self, event: Mapping[str, Any]) -> None:
        """As MLflow's ``log_image(key=, step=)``, but a repetition replaces the image.

        MLflow's image grid and its slider of steps read key and step from the name.
        """
        from mlflow.tracking.multimedia import compress_image_size

        path = Path(event["path"])
        if not path.exists():
            return
        key, step, ms = event["key"].replace("/", "~"), event["step"], event.get("ms", 0)
        mark = uuid.uuid5(uuid.NAMESPACE_URL, f"{self._info.url}/{key}/{step}")
        name = f"{key}+step+{step}+timestamp+{ms}+{mark}"
        with tempfile.TemporaryDirectory() as folder, Image.open(path) as image:
            image.save(Path(folder, f"{name}.png"))
            compress_image_size(image).save(Path(folder, f"{name}+compressed.webp"))
            self._client.log_artifacts(self.id, folder, "images")
        self._client.set_tag(self.id, "mlflow.loggedImages", True)

    def _log_file(self, event: Mapping[str, Any]) -> None:
        path = Path(event["path"])
        if not path.exists():
            return
        folder, _, name = event["name"].rpartition("/")
        with tempfile.TemporaryDirectory() as scratch:
            shutil.copyfile(path, Path(scratch, name))
            self._client.log_artifact(self.id, str(Path(scratch, name)), folder or None)

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                raise RefusedError(
                    f"the experiment {self._experiment} was deleted: restore it with `mlflow "
                    f"experiments restore -x {found.experiment_id}`, or set tracking.experiment"
                )
            return str(found.experiment_id)
        location = None
        if (path := database_path(self._uri)) is not None:
            # MLflow would use ./mlruns of the folder that a job happens to run in.
            location = (path.absolute().parent / "mlartifacts").as_uri()
        return str(self._client.create_experiment(self._experiment, artifact_location=location))

    def _log_input(self, run_id: str, use: str, data: Mapping[str, str]) -> None:
        """A dataset or pack; MLflow keeps one that comes twice once."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=data["name"],
            digest=data["digest"][:DIGEST_LENGTH],
            source_type="uri",
            source=json.dumps({"uri": data["url"]}),
        )
        context = InputTag("mlflow.data.context", use)
        self._client.log_inputs(run_id, [DatasetInput(dataset, [context])])


def sync(
    info: RunInfo, *, uri: str, experiment: str, queue_folder: Path, status: Status | None
) -> int:
    """Deliver what waits for the run on storage and in ``queue_folder``; returns what is left.

    ``status``: with which the run ends, unless an event that waits, or MLflow, knows it.
    """
    run = MlflowRun(info, uri, experiment)
    with _refusals(uri):
        run.connect()
    queue = EventQueue(queue_folder, resumes=False)
    EventSender(run, queue).close()
    with _refusals(uri):
        run.end_unless_ended(status)
    return len(queue)


def end_parent(uri: str, *, experiment: str, url: str, status: Status) -> None:
    """Set the status of the run of the sweep at ``url``; a warning where MLflow is away."""
    try:
        with importing_mlflow():
            from mlflow.client import MlflowClient
        client = MlflowClient(tracking_uri=uri)
        if (found := client.get_experiment_by_name(experiment)) is not None:
            runs = client.search_runs([found.experiment_id], f"tags.`project.sweep` = '{url}'")
            for run in runs:
                client.set_terminated(run.info.run_id, status)
    except Exception as error:  # no failure of a tracker may stop a sweep
        log.warning("tracking: the status of the sweep was not set: %s", describe_error(error))


def refusal(uri: str, experiment: str) -> str | None:
    """Why MLflow would refuse a run in ``experiment``, where waiting is no cure.

    None where it would not, and where it does not answer: it may come back.
    """
    answer: list[str] = []

    def ask() -> None:
        probe = MlflowRun(RunInfo("", ""), uri, experiment)
        try:
            probe.probe()
        except RefusedError as error:
            answer.append(one_line(str(error)))
        except Exception as error:
            log.debug("tracking: no answer from %s: %s", probe.address, error)

    thread = threading.Thread(target=ask, name="tracking-check", daemon=True)
    thread.start()
    thread.join(CHECK_S)
    return answer[0] if answer else None


@contextlib.contextmanager
def _refusals(uri: str) -> Iterator[None]:
    """Turn errors that waiting does not cure into RefusedError, with the cure."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise RefusedError(f"{error}: install the driver of the database") from error
    except Exception as error:
        text = describe_error(error)
        code = getattr(error, "error_code", "")
        if "out-of-date database schema" in text:
            database = without_password(uri)
            raise RefusedError(
                "the database is of another release of MLflow: back it up, then type `mlflow db "
                f"upgrade {database}`, or set tracking.uri"
            ) from error
        if "Invalid Host header" in text:
            raise RefusedError(
                f"{without_password(uri)} is not a name by which its MLflow server may be called: "
                "start the server with --allowed-hosts, as in `mlflow server --allowed-hosts "
                "mlflow.example.org:5000`"
            ) from error
        if code in REFUSALS:
            raise RefusedError(
                f"{without_password(uri)} refuses: check tracking.uri, and the credentials in "
                f"MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or _TOKEN ({text})"
            ) from error
        if "must be in the 'active' state" in text:
            raise RefusedError(text) from error
        raise


def _link(uri: str, experiment_id: str, run_id: str) -> str:
    """Where people look at the run."""
    shown = without_password(uri)
    if uri.startswith(("http://", "https://")):
        return f"{shown.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
    return (
        f"run {run_id}: `mlflow server --backend-store-uri {shown}` shows it at "
        f"http://127.0.0.1:5000/#/experiments/{experiment_id}/runs/{run_id}"
    )


def _metrics(kind: str, step: int, values: Mapping[str, float]) -> dict[str, Any]:
    rounded = {name: _rounded(value) for name, value in values.items()}
    return {"kind": kind, "step": step, "values": rounded, "ms": _now_ms()}


def _rounded(value: float) -> float:
    """Six significant digits: MLflow's tables show every decimal."""
    return float(f"{value:.6g}")


def find_run_urls(uri: str, filter_string: str) -> list[str]:
    """Folders on storage of the runs that match MLflow's ``filter_string``, oldest first.

    Raises ValueError where MLflow cannot be asked, or does not understand.
    """
    shown = without_password(uri)
    if (path := database_path(uri)) is not None and not path.exists():
        raise ValueError(f"{shown}: the database was not found: set MLFLOW_TRACKING_URI")
    with importing_mlflow():
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    try:
        client = MlflowClient(tracking_uri=uri)
        experiments = [each.experiment_id for each in client.search_experiments()]
        runs = client.search_runs(
            experiments, filter_string, max_results=MOST_RUNS, order_by=["attributes.start_time"]
        )
    except MlflowException as error:
        raise ValueError(
            f"MLflow at {shown} cannot answer {filter_string!r}: {describe_error(error)}; runs can "
            "also be given by name or folder"
        ) from error
    return [run.data.tags["project.run"] for run in runs if "project.run" in run.data.tags]


def run_status(uri: str, run_id: str) -> str:
    """``FINISHED`` or another of MLflow's words. Raises ValueError where it cannot be asked."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # or MLflow tries for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    if (path := database_path(uri)) is not None and not path.exists():
        raise ValueError(f"{without_password(uri)} was not found")
    with importing_mlflow():
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    try:
        return str(MlflowClient(tracking_uri=uri).get_run(run_id).info.status)
    except MlflowException as error:
        raise ValueError(describe_error(error)) from error


_import_lock = threading.Lock()


@contextlib.contextmanager
def importing_mlflow() -> Iterator[None]:
    """For the first import in a thread: MLflow breaks where two threads import it at once.

    Its artifact client then has the same S3 settings as ours.
    """
    # Short, because EventSender retries as well.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from cluster.storage.s3_settings import S3Settings  # botocore, as MLflow needs it

    with contextlib.suppress(StorageError):  # only who uses S3 minds
        os.environ.update(S3Settings.resolve().mlflow_environment())
    with _import_lock:
        yield


def _origin_tags() -> dict[str, str]:
    """Tags for the commit and the Ray job of this attempt, as far as they are known."""
    job = job_metadata()
    tags = {"mlflow.source.name": "python -m pipeline"}
    if commit := job.get("git_commit") or git_commit():
        tags["mlflow.source.git.commit"] = commit
    if submission := job.get("job_submission_id"):
        tags["project.ray.submission_id"] = submission
    return tags


def _now_ms() -> int:
    return int(time.time() * 1000)
