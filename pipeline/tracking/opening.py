"""Open the tracker of a run."""

import hashlib
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Literal

import torch
import yaml

from cluster.git import git_commit
from cluster.session import job_metadata
from cluster.storage import Store, without_password
from data_prep.shards import Dataset
from pipeline.config import Config
from pipeline.ranks import Ranks
from pipeline.run_storage import RunStorage
from pipeline.tracking.history import AttemptInfo, HistoryTracker, HistoryWriter
from pipeline.tracking.image_tracker import ImageFileTracker
from pipeline.tracking.mlflow import MlflowTracker, NodeTracker
from pipeline.tracking.protocol import NullTracker, RunInfo, Tracker

log = logging.getLogger(__name__)

DEFAULT_URI = "sqlite:///mlflow.db"
URI_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "uc")


def open_training_tracker(
    cfg: Config, storage: RunStorage, dataset: Dataset, resume_from_step: int, ranks: Ranks
) -> Tracker:
    """The tracker of one attempt at training, whose metrics are also kept with the run."""
    tracker = open_run_tracker(cfg, storage, dataset, resume_from_step, ranks)
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
    )
    return HistoryTracker(tracker, HistoryWriter(storage.run, attempt))


def open_run_tracker(
    cfg: Config, storage: RunStorage, dataset: Dataset, resume_from_step: int, ranks: Ranks
) -> Tracker:
    """The tracker of the run, as its recipe configures it.

    Rank 0 records everything, one rank of each other node its system metrics, the rest nothing.
    """
    info = RunInfo(
        name=cfg.name,
        url=storage.run_url,
        params=cfg.flat(),
        config_yaml=yaml.safe_dump(cfg.recorded(), sort_keys=False),
        dataset_name=dataset.name,
        dataset_url=dataset.url,
        dataset_digest=dataset.digest,
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
