"""Open the tracker of a run."""

import hashlib
import logging
import os
import platform
import re
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from cluster.git import code_tree, git_commit, git_diff
from cluster.session import job_metadata, package_url
from cluster.storage import Store, join, without_password
from data_prep.shards import Dataset
from pipeline.config import Config
from pipeline.fork import fork_origin
from pipeline.ranks import Ranks
from pipeline.run_storage import RunStorage
from pipeline.tracking.history import (
    AttemptInfo,
    HistoryTracker,
    HistoryWriter,
    read_history,
    recorded_points,
)
from pipeline.tracking.image_tracker import ImageFileTracker
from pipeline.tracking.mlflow import MlflowTracker, NodeTracker, end_parent, refusal, sync
from pipeline.tracking.protocol import NullTracker, RunInfo, Status, Tracker

log = logging.getLogger(__name__)

DEFAULT_URI = "sqlite:///mlflow.db"
URI_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "uc")
PACKAGES = ("torch", "ray", "deepspeed", "mlflow", "numpy", "pillow")


def refuse_early(cfg: Config) -> None:
    """Raise ValueError for a tracker that would refuse the run, not for one that is away."""
    if cfg.tracking.backend != "mlflow":
        return
    if (reason := refusal(resolve_uri(cfg.tracking.uri), cfg.tracking.experiment)) is not None:
        raise ValueError(f"MLflow refuses: {reason}; tracking.backend=none trains without it")


def open_training_tracker(
    cfg: Config, storage: RunStorage, dataset: Dataset, resume_from_step: int, ranks: Ranks
) -> Tracker:
    """The tracker of one attempt at training, whose metrics are also kept with the run."""
    tracker = open_run_tracker(cfg, storage, dataset, resume_from_step, ranks, training=True)
    if not ranks.first:
        return tracker
    cuda = ranks.device.type == "cuda"
    attempt = AttemptInfo(
        resume_from_step=resume_from_step,
        world_size=ranks.world_size,
        global_batch=cfg.train.global_batch,
        device=torch.cuda.get_device_name(ranks.device) if cuda else "cpu",
        git_commit=job_metadata().get("git_commit") or git_commit() or "",
        dataset_digest=dataset.digest,
        config=cfg.recorded(),
        forked_from=str(fork_origin(storage.run) or ""),
    )
    return HistoryTracker(tracker, HistoryWriter(storage.run, attempt))


def open_run_tracker(
    cfg: Config,
    storage: RunStorage,
    dataset: Dataset,
    resume_from_step: int,
    ranks: Ranks,
    *,
    training: bool = False,
) -> Tracker:
    """The tracker of the run, as its recipe configures it.

    Rank 0 records everything, one rank of each other node its system metrics, the rest nothing.
    ``training``: this start counts as an attempt.
    """
    info = RunInfo(
        name=cfg.name,
        url=storage.run_url,
        params=cfg.flat(),
        config_yaml=yaml.safe_dump(cfg.recorded(), sort_keys=False),
        dataset_name=dataset.name,
        dataset_url=dataset.url,
        dataset_digest=dataset.digest,
        tags=_tags(cfg, storage, dataset, ranks) if ranks.first and training else {},
        parent=cfg.tracking.parent or "",
        note=_note(cfg, storage.run_url, dataset),
        code_diff=git_diff() if ranks.first and training else "",
        recorded=lambda: recorded_points(read_history(storage.run), resume_from_step),
        training=training,
    )
    return open_tracker(
        cfg.tracking.backend if ranks.local_rank == 0 else "none",
        info,
        store=storage.run,
        resume_from_step=resume_from_step,
        experiment=cfg.tracking.experiment,
        uri=cfg.tracking.uri,
        node=ranks.machine,
    )


def open_tracker(
    backend: Literal["mlflow", "jsonl", "none"],
    info: RunInfo,
    *,
    store: Store,
    resume_from_step: int,
    experiment: str = "deepfill",
    uri: str | None = None,
    node: int = 0,
) -> Tracker:
    """The tracker of the run in ``store``, which resumes after ``resume_from_step``.

    ``uri``: MLflow's server or database; by default ``MLFLOW_TRACKING_URI``, or else
    ``sqlite:///mlflow.db``. ``node``: number of this machine; except for 0, its tracker records
    system metrics alone.
    """
    if backend == "none" or (backend == "jsonl" and node):
        return NullTracker()
    if backend == "jsonl":
        return ImageFileTracker(store)
    uri = resolve_uri(uri)
    if uri == DEFAULT_URI and "_ray_pkg_" in os.getcwd():
        log.warning(
            "MLFLOW_TRACKING_URI is not set: MLflow's database is deleted with this job's folder"
        )
    queue_folder = _queue_folder(info.url)
    if node:
        return NodeTracker(
            info, uri=uri, experiment=experiment, queue_folder=queue_folder, node=node
        )
    return MlflowTracker(info, uri=uri, experiment=experiment, queue_folder=queue_folder)


def finish_sweep(cfg: Config, status: Status) -> None:
    """Give the parent run of the sweep in ``cfg.tracking.parent`` its status, as far as MLflow is
    there."""
    if cfg.tracking.backend == "mlflow" and cfg.tracking.parent:
        uri = resolve_uri(cfg.tracking.uri)
        end_parent(uri, experiment=cfg.tracking.experiment, url=cfg.tracking.parent, status=status)


def sync_run(
    store: Store,
    config: Mapping[str, Any],
    *,
    finished: bool,
    dataset_digest: str = "",
    uri: str | None = None,
) -> int:
    """Deliver to MLflow what waits for the run in ``store``; returns the events that still wait.

    ``config``: its settings under their dotted names. Raises RefusedError and MLflow's own errors
    where it cannot be reached.
    """
    url = join(str(config["storage"]), "runs", str(config["name"]))
    history = read_history(store)
    last_step = max((attempt.last_step for attempt in history.attempts), default=0)
    last = history.attempts[-1].info if history.attempts else AttemptInfo()
    info = RunInfo(
        name=str(config["name"]),
        url=url,
        params=config,
        config_yaml=yaml.safe_dump(dict(last.config), sort_keys=False),
        dataset_name=str(config["data.name"]),
        dataset_url=join(str(config["storage"]), "datasets", str(config["data.name"])),
        dataset_digest=dataset_digest,
        recorded=lambda: recorded_points(history, last_step),
        training=False,
    )
    return sync(
        info,
        uri=resolve_uri(uri or config.get("tracking.uri")),
        experiment=str(config.get("tracking.experiment", "deepfill")),
        queue_folder=_queue_folder(url),
        status="FINISHED" if finished else "KILLED",
    )


def _tags(cfg: Config, storage: RunStorage, dataset: Dataset, ranks: Ranks) -> dict[str, str]:
    """What to filter runs by, and what this attempt ran on."""
    tags = {
        "project.dataset": dataset.name,
        "project.preset": cfg.preset or "",
        "project.convolution": cfg.model.convolution,
        "project.guided": str(cfg.model.guided).lower(),
        "project.seed": str(cfg.train_seed),
        "project.world_size": str(ranks.world_size),
        "project.hardware": _hardware(ranks),
        "project.forked_from": str(fork_origin(storage.run) or ""),
        "project.package": package_url() or "",
        "project.code_tree": code_tree(Path.cwd()) or "",
        "project.dirty": str(bool(git_diff())).lower() if git_commit() else "",
    }
    tags |= {f"project.version.{name}": _version(name) for name in PACKAGES}
    return {name: value for name, value in tags.items() if value}


def _hardware(ranks: Ranks) -> str:
    if ranks.device.type == "cuda":
        return f"{ranks.world_size} x {torch.cuda.get_device_name(ranks.device)}"
    return f"{os.cpu_count()} CPUs {platform.machine()}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _note(cfg: Config, run_url: str, dataset: Dataset) -> str:
    """What people read first on the page of the run."""
    kind = "guided" if cfg.model.guided else "unguided"
    url = without_password(run_url)
    return (
        f"Trains a {kind} DeepFill v2 generator with {cfg.model.convolution} convolutions on "
        f"{dataset.name} at {cfg.train.size_px} px, {cfg.train.steps} steps of "
        f"{cfg.train.global_batch} images.\n\n"
        "Get its best weights:\n\n"
        f"    python -m pipeline checkpoints pull {url} --step best --out checkpoint\n\n"
        "Resume it: type the command again that started it. Its settings are the artifact "
        "`config/resolved.yaml`:\n\n"
        "    python -m pipeline train resolved.yaml\n\n"
        "Hold it against another run:\n\n"
        f"    python -m pipeline compare {url} OTHER --out report.html\n"
    )


def resolve_uri(uri: str | None) -> str:
    """MLflow's server or database: ``uri``, else ``MLFLOW_TRACKING_URI``, else a database here.

    Raises ValueError for what MLflow will never take: a folder, or an unknown scheme.
    """
    source = "tracking.uri" if uri else "MLFLOW_TRACKING_URI"
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    scheme = re.match(r"(?:([A-Za-z][\w.+-]*):)?", uri)
    found = (scheme[1] or "").lower() if scheme else ""
    if uri in ("databricks", "uc"):
        return uri
    if found in ("", "file"):
        if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() != "true":
            raise ValueError(
                f"{source}={uri} is a folder, which MLflow no longer records in: use a database as "
                "sqlite:///mlflow.db (`mlflow migrate-filestore` moves old runs), or a server"
            )
    elif found.partition("+")[0] not in URI_SCHEMES:
        raise ValueError(
            f"{source}={without_password(uri)} has a scheme that MLflow does not know: it should "
            f"be one of {', '.join(URI_SCHEMES)}"
        )
    return uri


def _queue_folder(url: str) -> Path:
    """The folder on this machine for the undelivered events of the run at ``url``."""
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"deepfill-tracking-{os.getuid()}" / name
