"""Open the tracker of a run from its recipe."""

import yaml

from data_prep.shards import Dataset
from pipeline.config import Config
from pipeline.ranks import Ranks
from pipeline.run_storage import RunStorage
from pipeline.tracking import RunInfo, Tracker, open_tracker


def open_run_tracker(
    cfg: Config, storage: RunStorage, dataset: Dataset, resume_from_step: int, ranks: Ranks
) -> Tracker:
    """The run's tracker on rank 0, system metrics only on one rank of each other node."""
    info = RunInfo(
        name=cfg.name,
        url=storage.run_url,
        params=cfg.flat(),
        config_yaml=yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False),
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
