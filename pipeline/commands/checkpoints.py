"""``python -m pipeline checkpoints``: list, show, fetch, verify and delete checkpoints."""

import argparse
import json
from collections.abc import Callable, Mapping

from rich.table import Table

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
from pipeline.commands.tables import print_table


def _ls(arguments: argparse.Namespace) -> bool:
    listed = list_checkpoints(arguments.url)
    names = sorted({name for found in listed for name in found.metrics})
    table = Table("step", "saved", "MB", *names, box=None, pad_edge=False)
    for found in listed:
        values = [f"{found.metrics[n]:.4g}" if n in found.metrics else "" for n in names]
        table.add_row(str(found.step), found.saved, f"{found.bytes / 1e6:.1f}", *values)
    print_table(table)
    return True


def _show(arguments: argparse.Namespace) -> bool:
    store, step = choose_checkpoint(arguments.url, _which(arguments.step), BEST)
    print(json.dumps(store.manifest(step), indent=1))
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


def _which(text: str) -> CheckpointChoice:
    if text in ("newest", "best"):
        return text  # type: ignore[return-value]
    if text.isdecimal():
        return int(text)
    raise CheckpointError(f"--step {text}: give a number, 'newest' or 'best'")


ACTIONS: Mapping[str, Callable[[argparse.Namespace], bool]] = {
    "ls": _ls,
    "show": _show,
    "pull": _pull,
    "verify": _verify,
    "prune": _prune,
}
"""What each action does with its arguments; False where it found faults."""
