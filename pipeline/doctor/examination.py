"""Which probes look at a recipe, at a storage, or at nothing but this machine."""

import os

from pipeline.config import Config, TrackingSettings
from pipeline.doctor.detectors import detector_probes
from pipeline.doctor.findings import Probe
from pipeline.doctor.packages import package_probes
from pipeline.doctor.ray_cluster import cluster_probe
from pipeline.doctor.storage import GIGABYTE, storage_probes
from pipeline.doctor.tracking import tracking_probes

CHECKPOINT_BYTES = 136 * 10**6  # with guided networks


def all_probes(cfg: Config | None, url: str | None) -> list[Probe]:
    """``cfg`` is a recipe, or else ``url`` a storage; without both, this machine is looked at."""
    storage = cfg.storage if cfg else url
    needed = GIGABYTE
    if cfg:  # the newest, the best, and the one being written
        needed = (cfg.train.keep_checkpoints + 2) * CHECKPOINT_BYTES
    tracking = cfg.tracking if cfg else TrackingSettings()
    probes = storage_probes(storage, needed_bytes=needed) if storage else []
    if cfg or url is None or os.environ.get("MLFLOW_TRACKING_URI"):
        probes += tracking_probes(tracking)
    return [*probes, *package_probes(), *detector_probes(cfg), cluster_probe(cfg, storage)]
