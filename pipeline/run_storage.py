"""Where a recipe's dataset and run are on its storage."""

from dataclasses import dataclass
from typing import Self

from cluster.storage import Store, join, open_store
from data_prep.shards import Dataset
from pipeline.config import Config


@dataclass(frozen=True)
class RunStorage:
    """Everything that a run reads and writes; a command opens it once and hands it down.

    Picklable, and without credentials.
    """

    dataset_url: str
    run_url: str
    """As the recipe spells it: MLflow finds a resumed run by it."""
    run: Store
    checkpoints: Store

    @classmethod
    def open(cls, cfg: Config) -> Self:
        """Touches nothing yet. Raises StorageError where ``cfg.storage`` names no storage."""
        open_store(cfg.storage)  # so that a mistake is named as the recipe spells it
        run_url = join(cfg.storage, "runs", cfg.name)
        return cls(
            dataset_url=join(cfg.storage, "datasets", cfg.data.name),
            run_url=run_url,
            run=open_store(run_url),
            checkpoints=open_store(join(run_url, "checkpoints")),
        )

    def open_dataset(self) -> Dataset:
        """The finished dataset. Raises ShardError where it is not prepared yet."""
        return Dataset.open(self.dataset_url)
