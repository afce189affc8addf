"""A new run that starts from a checkpoint of another one."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.storage import MissingKeyError, Store
from pipeline.checkpoints import CheckpointStore
from pipeline.checkpoints.manifest import MANIFEST, CheckpointError, manifest_bytes
from pipeline.run_storage import RunStorage

log = logging.getLogger(__name__)

ORIGIN = "forked_from.json"


@dataclass(frozen=True)
class ForkOrigin:
    """Where a run started."""

    url: str
    """The folder of the other run."""
    step: int
    manifest_sha256: str
    """``record_sha256`` of the checkpoint's manifest; empty in old ones."""

    def __str__(self) -> str:
        return f"{self.url} step {self.step}"


def fork_checkpoint(
    source: CheckpointStore, run_url: str, step: int, storage: RunStorage
) -> ForkOrigin:
    """Copy the checkpoint of ``step`` of the run at ``run_url`` into the new run in ``storage``.

    Every byte is checked. The new manifest names its origin. A second call with equal arguments
    changes nothing. Raises CheckpointError where the new run has checkpoints of another origin.
    """
    contents = source.load(step)
    manifest = source.manifest(step).record()
    origin = ForkOrigin(run_url, step, str(manifest.get("record_sha256", "")))
    run, target = storage.run, CheckpointStore(storage.checkpoints)
    found = fork_origin(run)
    if found == origin and target.newest() is not None:
        log.info("run was forked already url=%s from=%s", run.url, origin)
        return origin
    if target.newest() is not None:
        raise CheckpointError(
            f"{run.url} has checkpoints of {found or 'a separate run'}: give another name="
        )
    run.put(ORIGIN, json.dumps(vars(origin), indent=1).encode())
    for name, data in contents.items():
        target.store.put(target.key(step, name), data)
    # The MLflow run of the other one is not this run's.
    record = manifest | {"mlflow_run": "", "forked_from": vars(origin)}
    for added in ("record_sha256", "format_version"):
        record.pop(added, None)
    target.store.put(target.key(step, MANIFEST), manifest_bytes(record))  # last: finished
    log.info("run forked url=%s from=%s", run.url, origin)
    return origin


def fork_origin(run: Store) -> ForkOrigin | None:
    """Where the run in ``run`` was forked from; None where it was not."""
    try:
        record: Mapping[str, object] = json.loads(run.get(ORIGIN))
        return ForkOrigin(
            str(record["url"]), int(str(record["step"])), str(record["manifest_sha256"])
        )
    except MissingKeyError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged url=%s: %r", ORIGIN, run.url, error)
        return None
