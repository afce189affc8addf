"""``python -m pipeline checkpoints``: list, show, fetch, verify and delete checkpoints."""

import argparse
import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.table import Table

from cluster.storage import open_store
from pipeline import lease
from pipeline.checkpoints import (
    BEST,
    CheckpointChoice,
    CheckpointError,
    CheckpointStore,
    MetricMode,
    parse_best,
)
from pipeline.checkpoints.manifest import CheckpointManifest
from pipeline.checkpoints.pull import pull
from pipeline.checkpoints.urls import (
    describe_checkpoints,
    find_checkpoints,
    find_runs,
    is_mlflow_url,
    list_checkpoints,
    open_checkpoint,
)
from pipeline.commands.tables import print_table
from pipeline.progress import progress

log = logging.getLogger(__name__)

MB = 1e6


def _ls(arguments: argparse.Namespace) -> bool:
    try:
        listed = list_checkpoints(arguments.url)
    except CheckpointError:
        runs = find_runs(arguments.url)
        if not runs:
            raise
        _ls_runs(runs, arguments.json)
        return True
    if arguments.json:
        _print_json([asdict(found) for found in listed])
        return True
    names = sorted({name for found in listed for name in found.metrics})
    table = Table(*("step", "age", "MB", *names, "", "dataset", "commit"), box=None, pad_edge=False)
    for found in listed:
        values = [f"{found.metrics[n]:.4g}" if n in found.metrics else "" for n in names]
        marks = ["best"] * found.best + ["newest"] * found.newest
        table.add_row(
            *(str(found.step), _age(found.saved), f"{found.bytes / MB:.1f}", *values),
            *(" ".join(marks), found.dataset_digest[:12], found.git_commit[:12]),
        )
    print_table(table)
    return True


def _ls_runs(runs: Mapping[str, CheckpointStore], as_json: bool) -> None:
    rows = []
    for name, checkpoints in runs.items():
        infos = describe_checkpoints(checkpoints, checkpoints.manifests())
        if not infos:
            continue
        best = next((info for info in infos if info.best), None)
        row: dict[str, Any] = {
            "run": name,
            "checkpoints": len(infos),
            "newest": infos[-1].step,
            "saved": infos[-1].saved,
            "best": best.step if best else None,
            BEST[0]: best.metrics[BEST[0]] if best else None,
            "bytes": sum(info.bytes for info in infos),
        }
        rows.append(row)
    if as_json:
        _print_json(rows)
        return
    table = Table(
        *("run", "checkpoints", "newest", "age", "best", BEST[0], "MB"), box=None, pad_edge=False
    )
    for row in rows:
        value = row[BEST[0]]
        table.add_row(
            *(row["run"], str(row["checkpoints"]), str(row["newest"]), _age(row["saved"])),
            "" if row["best"] is None else str(row["best"]),
            "" if value is None else f"{value:.4g}",
            f"{row['bytes'] / MB:.1f}",
        )
    print_table(table)


def _show(arguments: argparse.Namespace) -> bool:
    which, best = _choice(arguments.step)
    checkpoints, manifest = open_checkpoint(arguments.url, which, best)
    if not arguments.trace:
        _print_json(manifest.record())
        return True
    from pipeline.commands.trace import trace

    links = trace(checkpoints, manifest)
    if arguments.json:
        _print_json([asdict(link) for link in links])
    else:
        table = Table("link", "is", "found", box=None, pad_edge=False)
        for link in links:
            table.add_row(link.name, link.value, link.fault or link.found)
        print_table(table)
    return not any(link.fault for link in links)


def _pull(arguments: argparse.Namespace) -> bool:
    which, best = _choice(arguments.step)
    checkpoints, manifest = open_checkpoint(arguments.url, which, best)
    print(_described(manifest, best))
    with progress("pull", "MB") as advance:
        paths = pull(
            checkpoints,
            manifest.step,
            arguments.out,
            manifest=manifest,
            weights_only=arguments.weights_only,
            overwrite=arguments.overwrite,
            advance=lambda done, total: advance(round(done / MB), round(total / MB)),
        )
    for path in paths:
        print(path)
    return True


def _verify(arguments: argparse.Namespace) -> bool:
    checkpoints, only = find_checkpoints(arguments.url)
    steps = checkpoints.steps() if only is None else [only]
    total = sum(manifest.total_bytes for manifest in checkpoints.manifests().values())
    done, counting = 0, threading.Lock()
    with progress("verify", "MB") as advance:

        def read(size: int) -> None:
            nonlocal done
            with counting:
                done += size
                advance(round(done / MB), round(max(total, done) / MB))

        faults = {step: checkpoints.verify(step, read) for step in steps}
    if arguments.json:
        _print_json([{"step": step, "faults": found} for step, found in faults.items()])
        return not any(faults.values())
    for step, found in faults.items():
        print(f"step {step}: {'as written' if not found else ''}")
        for fault in found:
            print(f"  {fault}")
    return not any(faults.values())


def _prune(arguments: argparse.Namespace) -> bool:
    found, only = find_checkpoints(arguments.url, unfinished=True)
    if only is not None:
        raise CheckpointError(f"{arguments.url} is a single checkpoint: prune a run's folder")
    best = BEST if arguments.best is None else parse_best(arguments.best)
    manifests = found.manifests()
    if arguments.best is not None and not any(best[0] in m.metrics for m in manifests.values()):
        known = ", ".join(sorted({name for m in manifests.values() for name in m.metrics}))
        raise CheckpointError(
            f"no checkpoint has the metric {best[0]}: they have {known or 'none'}"
        )
    checkpoints = CheckpointStore(
        found.store,
        keep=arguments.keep,
        best=best,
        keep_best=arguments.keep_best,
        every=arguments.every,
    )
    pruning = checkpoints.plan_pruning(being_written=_may_be_written(checkpoints))
    unfinished = 0
    if arguments.yes:
        checkpoints.apply(pruning)
        unfinished = checkpoints.store.clear_unfinished()
    if arguments.json:
        _print_json(
            {
                "kept": [{"step": step, "reason": why} for step, why in pruning.kept.items()],
                "deleted": list(pruning.deleted),
                "orphans": list(pruning.orphans),
                "unfinished_files": unfinished,
                "done": arguments.yes,
            }
        )
        return True
    verb = "deleted" if arguments.yes else "would delete"
    for step, why in pruning.kept.items():
        print(f"keep step {step}: {why}")
    for step, why in pruning.deleted.items():
        print(f"{verb} step {step}, {pruning.bytes.get(step, 0) / MB:.1f} MB: {why}")
    for step, why in pruning.orphans.items():
        print(f"{verb} step {step}: {why}")
    if unfinished:
        print(f"{verb} {unfinished} unfinished uploads of killed processes")
    freed = sum(pruning.bytes.get(step, 0) for step in pruning.deleted) / MB
    count = f"checkpoints={len(pruning.deleted)} MB={freed:.1f} orphans={len(pruning.orphans)}"
    if not pruning.deleted and not pruning.orphans:
        print("nothing to delete")
    elif arguments.yes:
        print(f"deleted {count}")
    else:
        print(f"nothing was deleted: repeat with --yes to delete {count}")
    return True


def _may_be_written(checkpoints: CheckpointStore) -> bool:
    """Whether something newer than every finished checkpoint may still be written."""
    if not checkpoints.unfinished_newer():
        return False
    run = open_store(checkpoints.url.removesuffix("/checkpoints"))
    return lease.may_be_trained(run, job_has_ended=lambda job: False)


def act(arguments: argparse.Namespace) -> bool:
    """Do what ``arguments.action`` says with ``arguments.url``; False where it found faults."""
    if is_mlflow_url(arguments.url):
        from pipeline.tracking.model_urls import storage_url  # MLflow takes seconds to import

        arguments.url = storage_url(arguments.url)
        log.info("on storage: %s", arguments.url)
    return ACTIONS[arguments.action](arguments)


def _choice(text: str) -> tuple[CheckpointChoice, tuple[str, MetricMode]]:
    """What ``--step`` means: a step, ``newest``, ``best`` or ``best:METRIC:min``."""
    if text in ("newest", "best"):
        return text, BEST  # type: ignore[return-value]
    if text.isdecimal() and text.isascii():
        return int(text), BEST
    if text.startswith("best:"):
        return "best", parse_best(text.removeprefix("best:"))
    raise CheckpointError(
        f"--step {text}: give a number, 'newest', 'best', or for instance best:val/psnr_db:max"
    )


def _described(manifest: CheckpointManifest, best: tuple[str, MetricMode]) -> str:
    value = manifest.metrics.get(best[0])
    metric = "" if value is None else f", {best[0]} {value:.4g}"
    return f"step {manifest.step}{metric}, {manifest.total_bytes / MB:.1f} MB in all"


def _age(saved: str) -> str:
    """Since ``saved``, in one unit: ``12 min``, ``5 h``, ``3 d``."""
    try:
        then = datetime.strptime(saved, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        return ""
    minutes = max(0, int((datetime.now(UTC) - then).total_seconds() // 60))
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 2 * 24 * 60 else f"{minutes // (24 * 60)} d"


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


ACTIONS: Mapping[str, Callable[[argparse.Namespace], bool]] = {
    "ls": _ls,
    "show": _show,
    "pull": _pull,
    "verify": _verify,
    "prune": _prune,
}
