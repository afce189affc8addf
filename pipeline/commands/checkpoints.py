"""Checkpoints and data sets as the command line shows, fetches and verifies them."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.table import Table

from data_prep.download import OFFICIAL, check_archives, fetch
from data_prep.manifest import describe
from data_prep.shards import Dataset
from data_prep.shards import verify as verify_dataset
from pipeline.checkpoints import (
    BEST,
    CheckpointChoice,
    CheckpointError,
    choose_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    pull_checkpoint,
    verify_checkpoints,
)
from pipeline.progress import progress

Action = Callable[[argparse.Namespace], bool]
"""Does what was typed; False where faults were found."""


def _which(text: str) -> CheckpointChoice:
    if text in ("newest", "best"):
        return text  # type: ignore[return-value]
    if text.isdecimal():
        return int(text)
    raise CheckpointError(f"--step {text}: give a number, 'newest' or 'best'")


def _ls(arguments: argparse.Namespace) -> bool:
    listed = list_checkpoints(arguments.url)
    names = sorted({name for found in listed for name in found.metrics})
    table = Table("step", "saved", "MB", *names, box=None, pad_edge=False)
    for found in listed:
        figures = [f"{found.metrics[n]:.4g}" if n in found.metrics else "" for n in names]
        table.add_row(str(found.step), found.saved, f"{found.bytes / 1e6:.1f}", *figures)
    _print(table)
    return True


def _print(table: Table) -> None:
    # Without a terminal rich takes 80 columns, and cuts names and figures.
    Console(width=None if sys.stdout.isatty() else 240).print(table)


def _show(arguments: argparse.Namespace) -> bool:
    checkpoints, step = choose_checkpoint(arguments.url, _which(arguments.step), BEST)
    print(json.dumps(checkpoints.manifest(step), indent=1))
    return True


def _pull(arguments: argparse.Namespace) -> bool:
    for path in pull_checkpoint(arguments.url, arguments.out, _which(arguments.step), BEST):
        print(path)
    return True


def _verify(arguments: argparse.Namespace) -> bool:
    faults = verify_checkpoints(arguments.url)
    for step, found in faults.items():
        print(f"step {step}: {'as written' if not found else ''}")
        for fault in found:
            print(f"  {fault}")
    return not any(faults.values())


def _prune(arguments: argparse.Namespace) -> bool:
    deleted = prune_checkpoints(arguments.url, keep=arguments.keep, best=BEST)
    for step in deleted:
        print(f"deleted step {step}")
    if not deleted:
        print("nothing to delete: all are among the newest, or the best")
    return True


CHECKPOINTS: Mapping[str, Action] = {
    "ls": _ls,
    "show": _show,
    "pull": _pull,
    "verify": _verify,
    "prune": _prune,
}


def _dataset_show(arguments: argparse.Namespace) -> bool:
    table = Table(box=None, pad_edge=False, show_header=False)
    for label, value in describe(Dataset.open(arguments.url)).items():
        table.add_row(label, value)
    _print(table)
    return True


def _dataset_verify(arguments: argparse.Namespace) -> bool:
    dataset = Dataset.open(arguments.url)
    with progress("verify", "bytes") as advance:
        faults = verify_dataset(dataset, progress=advance)
    for fault in faults:
        print(fault)
    print("every byte is as written" if not faults else f"{len(faults)} faults")
    return not faults


def _dataset_fetch(arguments: argparse.Namespace) -> bool:
    with progress("fetch", "bytes") as advance:
        path = fetch(
            arguments.archive,
            arguments.out,
            accept_licence=arguments.accept_licence,
            base_url=arguments.base_url or OFFICIAL,
            progress=advance,
        )
    print(path)
    return True


def _dataset_check_archives(arguments: argparse.Namespace) -> bool:
    right = True
    with progress("check", "bytes") as advance:
        checked = check_archives(arguments.root, progress=advance)
        for name, fault in checked:
            print(f"wrong {name} {fault}" if fault else f"ok {name}", flush=True)
            right = right and not fault
    return right


DATASETS: Mapping[str, Action] = {
    "show": _dataset_show,
    "verify": _dataset_verify,
    "fetch": _dataset_fetch,
    "check-archives": _dataset_check_archives,
}
