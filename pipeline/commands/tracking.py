"""``python -m pipeline tracking``: deliver what waits for MLflow, find the commit of a run."""

import argparse
from collections.abc import Callable, Mapping

from cluster.git import commit_of_tree
from cluster.storage import describe_error, open_store
from pipeline.evaluation.run_record import RunRecord, find_runs, read_runs
from pipeline.lease import held
from pipeline.tracking.opening import sync_run


def _sync(arguments: argparse.Namespace) -> bool:
    urls = find_runs(arguments.runs, storage=arguments.storage, tracking_uri=arguments.tracking_uri)
    delivered = [_sync_one(run, arguments.tracking_uri) for run in read_runs(urls)]
    return all(delivered)


def _sync_one(run: RunRecord, uri: str | None) -> bool:
    """Whether everything arrived. Raises RunTakenError where the run is being trained."""
    if not {"name", "storage", "data.name"} <= run.config.keys():
        raise ValueError(f"{run.url} has no settings on storage yet: train it first")
    store = open_store(run.url)
    with held(store, job="", job_has_ended=lambda _: False):
        try:
            left = sync_run(
                store,
                run.config,
                finished=(run.newest_step or 0) >= int(run.config.get("train.steps", 1)),
                dataset_digest=run.dataset_digest,
                uri=uri,
            )
        except Exception as error:  # whichever of MLflow's own
            raise ValueError(f"{run.label} was not delivered: {describe_error(error)}") from error
    values = sum(len(curve.steps) for curve in run.history.curves.values())
    state = f"{left} events still wait" if left else "MLflow has everything"
    print(f"{run.label}: {len(run.history.curves)} metrics, {values} values on storage; {state}")
    return not left


def _commit(arguments: argparse.Namespace) -> bool:
    commit = commit_of_tree(arguments.tree)
    if commit is None:
        raise ValueError(
            f"no commit of this checkout has the code {arguments.tree}: fetch all branches, or "
            "the job was sent from a checkout with changes"
        )
    print(commit)
    return True


ACTIONS: Mapping[str, Callable[[argparse.Namespace], bool]] = {"sync": _sync, "commit": _commit}
