"""One run, one story: metrics and pictures to MLflow, to a JSON-lines file, or to nobody."""

import contextlib
import hashlib
import io
import json
import logging
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np
from PIL import Image

from cluster.storage import Store

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
Params = Mapping[str, str | int | float | bool | None]

FLUSH_S = 60.0  # the end of a run waits so long for a tracker that is away
RETRY_S = (1.0, 5.0, 15.0, 60.0)
PARAM_LENGTH = 6000  # MLflow cuts longer ones in silence
DIGEST_LENGTH = 32  # and refuses digests of more than 36
JSONL = "tracking/metrics.jsonl"
DEFAULT_URI = "sqlite:///mlflow.db"


@dataclass(frozen=True)
class Story:
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
    ``end`` said, or FINISHED.
    """

    @property
    def run_id(self) -> str | None:
        """MLflow's name of the run, once it is known."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Keep one value for each name at ``step``; a step that was told before is not repeated."""

    def image(self, key: str, step: int, pixels: np.ndarray) -> None:
        """Keep an (H, W, 3) uint8 picture."""

    def end(self, status: Status) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def open_tracker(
    backend: Literal["mlflow", "jsonl", "none"],
    story: Story,
    *,
    store: Store,
    resume_from_step: int,
    experiment: str = "deepfill",
    uri: str | None = None,
    spool: Path | None = None,
) -> Tracker:
    """The tracker of the run in ``store``, which goes on after ``resume_from_step``.

    ``uri``: MLflow's server or database; else ``MLFLOW_TRACKING_URI``, else ``sqlite:///mlflow.db``.
    ``spool``: folder on this machine for values that could not be delivered yet.
    """
    if backend == "none":
        return NullTracker()
    if backend == "jsonl":
        return JsonLinesTracker(store, resume_from_step)
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    return MlflowTracker(story, uri=uri, experiment=experiment, spool=spool or _spool(story.url))


def _spool(url: str) -> Path:
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"deepfill-tracking-{os.getuid()}" / name


class _Ends:
    """Ends a run as its block ended."""

    _status: Status = "FINISHED"

    def end(self, status: Status) -> None:
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

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, key: str, step: int, pixels: np.ndarray) -> None: ...


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

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._lines.setdefault(step, {}).update(values)
        if time.monotonic() - self._written_at > 10.0:
            self._write()

    def image(self, key: str, step: int, pixels: np.ndarray) -> None:
        self._store.put(f"tracking/{key}-{step:08d}.png", _png(pixels))

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

    def __init__(self, story: Story, *, uri: str, experiment: str, spool: Path) -> None:
        spool.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._story, self._uri, self._experiment = story, uri, experiment
        self._events = _Spool(spool)
        self._run = _MlflowRun(story, uri, experiment)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        return self._run.id

    def wait_for_run(self, timeout_s: float) -> str | None:
        """The run's name, waiting a moment for a tracker that is just slow."""
        deadline = time.monotonic() + timeout_s
        while self._run.id is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self._run.id

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        self._events.add({"kind": "metrics", "step": step, "values": dict(values), "ms": now_ms})

    def image(self, key: str, step: int, pixels: np.ndarray) -> None:
        path = self._events.folder / f"{key}-{step:08d}.png"
        path.write_bytes(_png(pixels))
        self._events.add({"kind": "image", "key": key, "step": step, "path": str(path)})

    def _close(self) -> None:
        self._events.add({"kind": "end", "status": self._status})
        self._done.set()
        self._thread.join(FLUSH_S)
        if left := self._events.waiting():
            log.warning(
                "tracking: %d events wait in %s for %s to come back; the next command on this run "
                "delivers them",
                *(left, self._events.folder, self._uri),
            )

    def _deliver(self) -> None:
        attempt = 0
        while True:
            try:
                self._run.join()
                while (event := self._events.first()) is not None:
                    self._tell(event)
                    self._events.drop_first()
                attempt = 0
                if self._done.is_set() and not self._events.waiting():
                    return
                self._events.wait(0.5)
            except Exception as error:  # whatever a tracker does, training goes on
                pause_s = RETRY_S[min(attempt, len(RETRY_S) - 1)]
                attempt += 1
                if attempt in (1, 4):
                    log.warning(
                        "tracking is away, values are kept uri=%s: %s", self._uri, _one_line(error)
                    )
                if self._done.wait(pause_s) and attempt > len(RETRY_S):
                    return


    def _tell(self, event: Mapping[str, Any]) -> None:
        try:
            self._run.tell(event)
        except Exception as error:
            # Refused for what it is, not for the tracker's state: it would block all that follow.
            if getattr(error, "error_code", None) != "INVALID_PARAMETER_VALUE":
                raise
            log.warning("tracking: %s at step %s refused: %s", *_what(event), _one_line(error))


class _Spool:
    """Events in a file, oldest first, until they are delivered; survives the process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path, self._delivered_path = folder / "events.jsonl", folder / "delivered"
        self._changed = threading.Condition()
        delivered = int(self._delivered_path.read_text()) if self._delivered_path.exists() else 0
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        self._events = [event for line in lines[delivered:] if (event := _parsed(line))]
        self._rewrite()

    def add(self, event: dict[str, Any]) -> None:
        with self._changed:
            self._events.append(event)
            with self._path.open("ab") as file:
                file.write(json.dumps(event).encode() + b"\n")
            self._changed.notify_all()

    def first(self) -> dict[str, Any] | None:
        with self._changed:
            return self._events[0] if self._events else None

    def drop_first(self) -> None:
        with self._changed:
            event = self._events.pop(0)
            self._delivered += 1
            self._delivered_path.write_text(str(self._delivered))
            if not self._events:
                self._rewrite()
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
        self._path.write_text("".join(json.dumps(event) + "\n" for event in self._events))


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        event: dict[str, Any] = json.loads(line)
    except ValueError:
        return None  # the last line of a killed process
    return event


class _MlflowRun:
    """The run on the server: created or found once, then told events in order."""

    def __init__(self, story: Story, uri: str, experiment: str) -> None:
        self.id: str | None = None
        self._story, self._uri, self._experiment = story, uri, experiment
        self._last_steps: dict[str, int] = {}

    def join(self) -> None:
        if self.id is not None:
            return
        # Short: a server that does not answer is tried again by us.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        self._client = client = MlflowClient(tracking_uri=self._uri)
        experiment_id = self._experiment_id()
        known = client.search_runs(
            [experiment_id], f"tags.`project.run` = '{self._story.url}'", max_results=1
        )
        params = {key: str(value)[:PARAM_LENGTH] for key, value in self._story.params.items()}
        if known:
            run = known[0]
            self._last_steps = {
                key: max(value.step for value in client.get_metric_history(run.info.run_id, key))
                for key in run.data.metrics
                if not key.startswith("system/")
            }
        else:
            run = client.create_run(
                experiment_id,
                run_name=self._story.name,
                tags={"project.run": self._story.url, "project.attempt": "0"},
            )
        attempt = int(run.data.tags.get("project.attempt", "0")) + 1
        tags = _surroundings() | {"project.attempt": str(attempt)}
        if self._story.dataset_digest:
            tags["project.dataset.digest"] = self._story.dataset_digest
        told = run.data.params
        for key, value in params.items():
            if key in told and told[key] != value:
                tags[f"resume.{attempt}.{key}"] = value  # MLflow's own values cannot be changed
        new = [Param(key, value) for key, value in params.items() if key not in told]
        for start in range(0, len(new), 100):  # MLflow takes so many at a time
            client.log_batch(run.info.run_id, params=new[start : start + 100])
        client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        client.update_run(run.info.run_id, status="RUNNING")
        if self._story.config_yaml:
            client.log_text(run.info.run_id, self._story.config_yaml, "config/resolved.yaml")
        if self._story.dataset_digest and not run.inputs.dataset_inputs:
            self._log_dataset(run.info.run_id)
        self.id = run.info.run_id

    def tell(self, event: Mapping[str, Any]) -> None:
        assert self.id is not None
        if event["kind"] == "metrics":
            self._tell_metrics(event)
        elif event["kind"] == "image":
            self._tell_image(event)
        else:
            self._client.set_terminated(self.id, event["status"])

    def _tell_metrics(self, event: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        step = event["step"]
        new = {k: v for k, v in event["values"].items() if step > self._last_steps.get(k, -1)}
        if new:
            self._client.log_batch(
                self.id,
                metrics=[Metric(key, value, event["ms"], step) for key, value in new.items()],
            )
            self._last_steps |= dict.fromkeys(new, step)

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
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=self._story.dataset_name,
            digest=self._story.dataset_digest[:DIGEST_LENGTH],
            source_type="uri",
            source=json.dumps({"uri": self._story.dataset_url}),
        )
        context = InputTag("mlflow.data.context", "training")
        self._client.log_inputs(run_id, [DatasetInput(dataset, [context])])


@contextlib.contextmanager
def system_metrics(run_id: str | None, node: int, uri: str | None = None) -> Iterator[None]:
    """Processor, memory, disk, network and GPU of this machine as ``system/node-<k>/…``.

    One process of each machine does this, with the run that rank 0 opened.
    """
    if run_id is None:
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(
        run_id,
        resume_logging=True,
        node_id=f"node-{node}",
        tracking_uri=uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI,
    )
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def _surroundings() -> dict[str, str]:
    """Where this attempt runs, as far as it can be told."""
    tags = {"mlflow.source.name": "python -m pipeline"}
    if commit := os.environ.get("DEEPFILL_GIT_COMMIT") or _git_commit():
        tags["mlflow.source.git.commit"] = commit
    if submission := os.environ.get("DEEPFILL_SUBMISSION_ID"):
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


def _png(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def _what(event: Mapping[str, Any]) -> tuple[str, str]:
    return event["kind"], str(event.get("step", "the end"))


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
