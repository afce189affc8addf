"""One run, one story: metrics and pictures to MLflow, to a JSON-lines file, or to nobody."""

import hashlib
import importlib
import io
import json
import logging
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np
from PIL import Image

from cluster.session import job_metadata
from cluster.storage import Store

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
Params = Mapping[str, str | int | float | bool | None]

FLUSH_S = 20.0  # the end of a run waits so long for a tracker that takes nothing
SAMPLE_S = 10.0  # between readings of the machine, unless MLflow's own variable says otherwise
RETRY_S = (1.0, 5.0, 15.0, 60.0)
BATCH_VALUES = 1000  # MLflow takes so many at a time
PARAM_LENGTH = 6000  # MLflow cuts longer ones in silence
DIGEST_LENGTH = 32  # and refuses digests of more than 36
JSONL = "tracking/metrics.jsonl"
DEFAULT_URI = "sqlite:///mlflow.db"


@dataclass(frozen=True)
class RunInfo:
    """What there is to tell about a run apart from its values."""

    name: str
    url: str
    """The run's folder on storage; by it a resumed run is found again."""
    params: Params = field(default_factory=dict)
    config_yaml: str = ""
    dataset_name: str = ""
    dataset_url: str = ""
    dataset_digest: str = ""


class Tracker(Protocol):
    """Takes values and never makes training wait, or fail, for whoever keeps them.

    As a context manager it ends the run: FAILED on an error, KILLED on an interruption, else as
    ``finish`` said, or FINISHED.
    """

    @property
    def run_id(self) -> str | None:
        """MLflow's name of the run, once it is known."""

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Keep one value for each name at ``step``; a step that was told before is not repeated."""

    def log_image(self, key: str, step: int, pixels: np.ndarray) -> None:
        """Keep an (H, W, 3) uint8 picture."""

    def finish(self, status: Status) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def open_tracker(
    backend: Literal["mlflow", "jsonl", "none"],
    info: RunInfo,
    *,
    store: Store,
    resume_from_step: int,
    experiment: str = "deepfill",
    uri: str | None = None,
    spool: Path | None = None,
    node: int = 0,
) -> Tracker:
    """The tracker of the run in ``store``, which goes on after ``resume_from_step``.

    ``uri``: MLflow's server or database; else ``MLFLOW_TRACKING_URI``, else ``sqlite:///mlflow.db``.
    ``spool``: folder on this machine for values that could not be delivered yet.
    ``node``: number of this machine; the tracker of a machine but 0 tells only how that one is.
    """
    if backend == "none" or (backend == "jsonl" and node):
        return NullTracker()
    if backend == "jsonl":
        return JsonLinesTracker(store, resume_from_step)
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    if uri == DEFAULT_URI and "_ray_pkg_" in os.getcwd():
        log.warning("MLFLOW_TRACKING_URI is not set: what MLflow keeps goes with this job's folder")
    spool = spool or _spool(info.url)
    if node:
        return NodeTracker(info, uri=uri, experiment=experiment, spool=spool, node=node)
    return MlflowTracker(info, uri=uri, experiment=experiment, spool=spool)


def _spool(url: str) -> Path:
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"deepfill-tracking-{os.getuid()}" / name


class _Ends:
    """Ends a run as its block ended."""

    _status: Status = "FINISHED"

    def finish(self, status: Status) -> None:
        self._status = status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            self._status = "KILLED"
        elif error is not None:
            self._status = "FAILED"
        self._close()

    def _close(self) -> None:
        """Deliver what is left."""


class NullTracker(_Ends):
    """Keeps nothing."""

    run_id = None

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def log_image(self, key: str, step: int, pixels: np.ndarray) -> None: ...


class JsonLinesTracker(_Ends):
    """``tracking/metrics.jsonl`` in the run's folder: a line for each step, no tracker needed.

    Pictures become ``tracking/<key>-<step>.png``.
    """

    run_id = None

    def __init__(self, store: Store, resume_from_step: int) -> None:
        self._store = store
        self._lines: dict[int, dict[str, float]] = {}
        if store.exists(JSONL):
            for line in store.get(JSONL).splitlines():
                values = json.loads(line)
                # What came after the checkpoint is lived through, and told, once more.
                if "step" in values and values["step"] <= resume_from_step:
                    self._lines[values.pop("step")] = values
        self._written_at = time.monotonic()

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._lines.setdefault(step, {}).update(values)
        if time.monotonic() - self._written_at > 10.0:
            self._write()

    def log_image(self, key: str, step: int, pixels: np.ndarray) -> None:
        self._store.put(f"tracking/{key}-{step:08d}.png", png(pixels))

    def _close(self) -> None:
        self._write({"status": self._status})

    def _write(self, *last: Mapping[str, Any]) -> None:
        lines = [{"step": step, **values} for step, values in sorted(self._lines.items())]
        text = "".join(json.dumps(line) + "\n" for line in [*lines, *last])
        self._store.put(JSONL, text.encode())
        self._written_at = time.monotonic()


class MlflowTracker(_Ends):
    """One MLflow run for all restarts, written by a thread that never keeps training waiting.

    Every event goes to a file in ``spool`` first. Away trackers are tried again; what could not be
    delivered by the end stays in the file, and whoever tracks this run next on this machine
    delivers it. The run is found again by its tag ``project.run``. A name that has a value at a
    step, or at a later one, gets no second one: a resumed run repeats steps, but not its story.
    """

    def __init__(self, info: RunInfo, *, uri: str, experiment: str, spool: Path) -> None:
        self._run = _MlflowRun(info, uri, experiment)
        self._events = _Spool(spool)
        self._courier = _Courier(self._run, self._events)
        self._machine = _Machine(0, uri, self._events)

    @property
    def run_id(self) -> str | None:
        return self._run.id

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._events.add({"kind": "metrics", "step": step, "values": dict(values), "ms": _now_ms()})

    def log_image(self, key: str, step: int, pixels: np.ndarray) -> None:
        path = self._events.folder / f"{key}-{step:08d}.png"
        path.write_bytes(png(pixels))
        self._events.add({"kind": "image", "key": key, "step": step, "path": str(path)})

    def _close(self) -> None:
        self._machine.close()
        self._events.add({"kind": "end", "status": self._status})
        self._courier.close()


class NodeTracker(NullTracker):
    """How a further machine is, told to the run that rank 0 has opened; nothing else."""

    def __init__(self, info: RunInfo, *, uri: str, experiment: str, spool: Path, node: int) -> None:
        events = _Spool(spool.with_name(f"{spool.name}-node-{node}"))
        self._courier = _Courier(_MlflowRun(info, uri, experiment, opens=False), events)
        self._machine = _Machine(node, uri, events)

    def _close(self) -> None:
        self._machine.close()
        self._courier.close()


class _Machine:
    """Processor, memory, disk, network and GPU of this machine, read now and then by a thread."""

    def __init__(self, node: int, uri: str, events: "_Spool") -> None:
        self._node, self._uri, self._events = node, uri, events
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="machine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        # MLflow's own readings and names; by itself it would give up when its server is away.
        module = _mlflow("system_metrics.system_metrics_monitor")
        logging.getLogger(module.__name__).setLevel(logging.WARNING)
        monitor = module.SystemMetricsMonitor(None, tracking_uri=self._uri)
        interval_s = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", SAMPLE_S))
        while not self._done.wait(interval_s):
            try:
                monitor.collect_metrics()
                readings = monitor.aggregate_metrics().items()
            except Exception as error:  # of a driver, say
                log.warning("tracking: this machine cannot be read: %s", _one_line(error))
                return
            for part in monitor.monitors:
                part.clear_metrics()
            values = {f"system/node-{self._node}/{name}": value for name, value in readings}
            self._events.add({"kind": "machine", "values": values, "ms": _now_ms()})


class _Courier:
    """Takes events to the run in order, from a thread of its own; keeps them while it is away."""

    def __init__(self, run: "_MlflowRun", events: "_Spool") -> None:
        self._run, self._events = run, events
        self._closed = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Deliver what is left, for as long as that gets on."""
        self._deadline = time.monotonic() + FLUSH_S
        self._closed.set()
        while self._thread.is_alive() and time.monotonic() < self._deadline:
            self._thread.join(0.1)
        if left := self._events.waiting():
            log.warning(
                "tracking: %d events wait in %s for %s to come back; the next command on this run "
                "delivers them",
                left,
                self._events.folder,
                self._run.place,
            )

    def _deliver(self) -> None:
        failures = 0
        while time.monotonic() < self._deadline:
            try:
                self._run.join()
                while events := self._events.leading():
                    self._tell(events)
                    self._events.drop(len(events))
                    if self._closed.is_set():
                        self._deadline = time.monotonic() + FLUSH_S
                failures = 0
                if self._closed.is_set() and not self._events.waiting():
                    return
                self._events.wait(0.5)
            except Exception as error:  # whatever a tracker does, training goes on
                pause_s = RETRY_S[min(failures, len(RETRY_S) - 1)]
                failures += 1
                if failures == 2:
                    log.warning(
                        "tracking is away, values are kept uri=%s: %s",
                        self._run.place,
                        _one_line(error),
                    )
                if self._closed.is_set():
                    time.sleep(RETRY_S[0])
                else:
                    self._closed.wait(pause_s)

    def _tell(self, events: Sequence[Mapping[str, Any]]) -> None:
        try:
            self._run.tell(events)
        except Exception as error:
            # Refused for what it is, not for the tracker's state: it would block all that follow.
            if getattr(error, "error_code", None) != "INVALID_PARAMETER_VALUE":
                raise
            if len(events) > 1:
                for event in events:
                    self._tell([event])
            else:
                what = _what(events[0])
                log.warning("tracking: %s at step %s refused: %s", *what, _one_line(error))


class _Spool:
    """Events in a file, oldest first, until they are delivered; survives the process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = folder
        self._path, self._delivered_path = folder / "events.jsonl", folder / "delivered"
        self._changed = threading.Condition()
        # Empty where a process was killed while writing it: then events come twice.
        known = self._delivered_path.read_text() if self._delivered_path.exists() else ""
        delivered = int(known or 0)
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        waiting = [event for line in lines[delivered:] if (event := _parsed(line))]
        # How an earlier process ended is no news once the run goes on.
        self._events = [event for event in waiting if event["kind"] != "end"]
        self._rewrite()

    def add(self, event: dict[str, Any]) -> None:
        with self._changed:
            self._events.append(event)
            try:
                with self._path.open("ab") as file:
                    file.write(json.dumps(event).encode() + b"\n")
            except OSError as error:
                log.warning("tracking: values are kept in memory alone: %s", error)
            self._changed.notify_all()

    def leading(self) -> list[dict[str, Any]]:
        """The oldest events that can be delivered together: values of the same kind, or one."""
        with self._changed:
            together: list[dict[str, Any]] = []
            values = 0
            for event in self._events:
                values += len(event.get("values", ()))
                alike = not together or event["kind"] == together[0]["kind"]
                if together and not (alike and "values" in event and values <= BATCH_VALUES):
                    break
                together.append(event)
            return together

    def drop(self, count: int) -> None:
        """Forget the oldest events: they are delivered."""
        with self._changed:
            delivered, self._events = self._events[:count], self._events[count:]
            self._delivered += count
            self._delivered_path.write_text(str(self._delivered))
            if not self._events:
                self._rewrite()
        for event in delivered:
            if event["kind"] == "image":
                Path(event["path"]).unlink(missing_ok=True)

    def waiting(self) -> int:
        with self._changed:
            return len(self._events)

    def wait(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._events, timeout_s)

    def _rewrite(self) -> None:
        """Forget what was delivered. Killed in between, some events come twice; that is noticed."""
        self._delivered = 0
        self._delivered_path.write_text("0")
        new = self._path.with_suffix(".new")
        new.write_text("".join(json.dumps(event) + "\n" for event in self._events))
        new.replace(self._path)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        event: dict[str, Any] = json.loads(line)
    except ValueError:
        return None  # the last line of a killed process
    return event


class _MlflowRun:
    """The run on the server: created or found once, then told events in order."""

    def __init__(self, info: RunInfo, uri: str, experiment: str, *, opens: bool = True) -> None:
        self.id: str | None = None
        self.place = _without_password(uri)
        self._info, self._uri, self._experiment, self._opens = info, uri, experiment, opens
        self._last_steps: dict[str, int] = {}
        self._readings = 0

    def join(self) -> None:
        if self.id is not None:
            return
        entities = _mlflow("entities")
        self._client = client = _mlflow("client").MlflowClient(tracking_uri=self._uri)
        experiment_id = self._experiment_id()
        known = client.search_runs(
            [experiment_id], f"tags.`project.run` = '{self._info.url}'", max_results=1
        )
        if not known and not self._opens:
            raise LookupError(f"rank 0 has not opened the run of {self._info.url} yet")
        if known:
            # The newest step of each metric, without its whole history.
            self._last_steps = {metric.key: metric.step for metric in known[0].data._metric_objs}
            machine = [step for key, step in self._last_steps.items() if key.startswith("system/")]
            self._readings = max(machine, default=-1) + 1
        if not self._opens:
            self.id = known[0].info.run_id
            return
        params = {key: str(value)[:PARAM_LENGTH] for key, value in self._info.params.items()}
        run = (
            known[0]
            if known
            else client.create_run(
                experiment_id,
                run_name=self._info.name,
                tags={"project.run": self._info.url, "project.attempt": "0"},
            )
        )
        attempt = int(run.data.tags.get("project.attempt", "0")) + 1
        tags = _surroundings() | {"project.attempt": str(attempt)}
        if self._info.dataset_digest:
            tags["project.dataset.digest"] = self._info.dataset_digest
        told = run.data.params
        for key, value in params.items():
            if key in told and told[key] != value:
                tags[f"resume.{attempt}.{key}"] = value  # MLflow's own values cannot be changed
        new = [entities.Param(key, value) for key, value in params.items() if key not in told]
        for start in range(0, len(new), 100):  # MLflow takes so many at a time
            client.log_batch(run.info.run_id, params=new[start : start + 100])
        client.log_batch(run.info.run_id, tags=[entities.RunTag(*tag) for tag in tags.items()])
        client.update_run(run.info.run_id, status="RUNNING")
        if self._info.config_yaml:
            client.log_text(run.info.run_id, self._info.config_yaml, "config/resolved.yaml")
        if self._info.dataset_digest and not run.inputs.dataset_inputs:
            self._log_dataset(run.info.run_id)
        self.id = run.info.run_id

    def tell(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Values of the same kind, or one event of another kind."""
        assert self.id is not None
        kind = events[0]["kind"]
        if kind == "metrics":
            self._tell_values([event["step"] for event in events], events)
        elif kind == "machine":
            self._tell_values([self._readings + number for number in range(len(events))], events)
            self._readings += len(events)
        elif kind == "image":
            self._tell_image(events[0])
        else:
            self._client.set_terminated(self.id, events[0]["status"])

    def _tell_values(self, steps: Sequence[int], events: Sequence[Mapping[str, Any]]) -> None:
        metric = _mlflow("entities").Metric
        last, new = dict(self._last_steps), []
        for step, event in zip(steps, events, strict=True):
            for key, value in event["values"].items():
                if step > last.get(key, -1):
                    new.append(metric(key, value, event["ms"], step))
                    last[key] = step
        if new:
            self._client.log_batch(self.id, metrics=new)
        self._last_steps = last

    def _tell_image(self, event: Mapping[str, Any]) -> None:
        name = f"pictures/{event['key']}/step-{event['step']:08d}.png"  # the same again if repeated
        if (path := Path(event["path"])).exists():
            with Image.open(path) as image:
                self._client.log_image(self.id, image.copy(), artifact_file=name)

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        if found is not None:
            return str(found.experiment_id)
        location = None
        if self._uri.startswith("sqlite:///"):
            # MLflow would take ./mlruns of whatever folder a job happens to run in.
            database = Path(self._uri.removeprefix("sqlite:///")).absolute()
            location = (database.parent / "mlartifacts").as_uri()
        return str(self._client.create_experiment(self._experiment, artifact_location=location))

    def _log_dataset(self, run_id: str) -> None:
        entities = _mlflow("entities")
        dataset = entities.Dataset(
            name=self._info.dataset_name,
            digest=self._info.dataset_digest[:DIGEST_LENGTH],
            source_type="uri",
            source=json.dumps({"uri": self._info.dataset_url}),
        )
        context = entities.InputTag("mlflow.data.context", "training")
        self._client.log_inputs(run_id, [entities.DatasetInput(dataset, [context])])


_importing = threading.Lock()


def _mlflow(name: str) -> Any:
    """A module of MLflow's: slow to import, and broken if two threads do so at once."""
    # Short: a server that does not answer is tried again by us.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    with _importing:
        return importlib.import_module(f"mlflow.{name}")


def _surroundings() -> dict[str, str]:
    """Where this attempt runs, as far as it can be told."""
    job = job_metadata()
    tags = {"mlflow.source.name": "python -m pipeline"}
    if commit := job.get("git_commit") or _git_commit():
        tags["mlflow.source.git.commit"] = commit
    if submission := job.get("job_submission_id"):
        tags["project.ray.submission_id"] = submission
    return tags


def _git_commit() -> str | None:
    """Of the folder we run in; None in a job's package, which has no history."""
    try:
        told = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip()


def _without_password(uri: str) -> str:
    """``uri``, or a text with some, as it may be shown."""
    return re.sub(r"//[^/@\s]*@", "//", uri)


def _now_ms() -> int:
    return int(time.time() * 1000)


def png(pixels: np.ndarray) -> bytes:
    """An (H, W, 3) uint8 picture as the bytes of a file."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def _what(event: Mapping[str, Any]) -> tuple[str, str]:
    return event["kind"], str(event.get("step", "the end"))


def _one_line(error: BaseException) -> str:
    text = _without_password(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:200]}"
