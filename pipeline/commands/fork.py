"""``python -m pipeline fork``: a new run from a step of another, with changed settings."""

from collections.abc import Sequence
from pathlib import Path

from pipeline import config
from pipeline.checkpoints import BEST, CheckpointChoice
from pipeline.checkpoints.manifest import CheckpointError
from pipeline.checkpoints.urls import choose_checkpoint
from pipeline.evaluation.run_record import find_runs
from pipeline.fork import fork_checkpoint
from pipeline.run_storage import RunStorage
from pipeline.train import train


def fork(
    run: str,
    which: CheckpointChoice,
    overrides: Sequence[str],
    *,
    recipe: Path | None = None,
    storage: str | None = None,
) -> bool:
    """Start the new run, or resume it, and train it; returns whether it reached its last step.

    The settings are those of ``recipe``, or else those that the checkpoint of ``run`` recorded,
    with ``overrides`` on top. Without ``name`` among them the new run is called after the old one
    and the step. Raises ConfigError, CheckpointError and ValueError.
    """
    urls = find_runs([run], storage=storage, tracking_uri=None)
    if len(urls) != 1:
        raise ValueError(f"{run} names {len(urls)} runs: give one to fork")
    (url,) = urls
    checkpoints, step = choose_checkpoint(url, which, BEST)
    recorded = checkpoints.manifest(step).config
    if recipe is None and not recorded:
        raise CheckpointError(f"step {step} of {url} recorded no settings: give --recipe")
    place, _, name = url.rstrip("/").rpartition("/runs/")
    # First, so that what was typed replaces them.
    given = {override.partition("=")[0] for override in overrides}
    named = [f"name={name}-from-{step}"] if "name" not in given else []
    placed = [f"storage={place}"] if place and "storage" not in given and recipe is None else []
    changes = [*named, *placed, *overrides]
    cfg = config.changed(recorded, changes) if recipe is None else config.load(recipe, changes)
    if cfg.train.steps <= step:
        raise ValueError(
            f"train.steps={cfg.train.steps} is reached at step {step}: give train.steps above it"
        )
    new = RunStorage.open(cfg)
    if new.run.url == checkpoints.url.removesuffix("/checkpoints"):
        raise ValueError(f"name={cfg.name} is the run itself: give the fork another name")
    fork_checkpoint(checkpoints, url, step, new)
    return train(cfg, new)
