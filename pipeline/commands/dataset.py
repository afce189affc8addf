"""``python -m pipeline dataset``: show and verify a dataset, fetch and check its archives."""

import argparse
from collections.abc import Callable, Mapping

from rich.table import Table

from data_prep.download import OFFICIAL, check_archives, fetch
from data_prep.manifest import describe
from data_prep.shards import Dataset
from data_prep.shards import verify as verify_dataset
from pipeline.commands.tables import print_table
from pipeline.progress import progress


def _show(arguments: argparse.Namespace) -> bool:
    table = Table(box=None, pad_edge=False, show_header=False)
    for label, value in describe(Dataset.open(arguments.url)).items():
        table.add_row(label, value)
    print_table(table)
    return True


def _verify(arguments: argparse.Namespace) -> bool:
    dataset = Dataset.open(arguments.url)
    with progress("verify", "bytes") as advance:
        faults = verify_dataset(dataset, progress=advance)
    for fault in faults:
        print(fault)
    print("every byte is as written" if not faults else f"{len(faults)} faults")
    return not faults


def _fetch(arguments: argparse.Namespace) -> bool:
    with progress("fetch", "bytes") as advance:
        path = fetch(
            arguments.archive,
            arguments.out,
            accept_license=arguments.accept_license,
            base_url=arguments.base_url or OFFICIAL,
            progress=advance,
        )
    print(path)
    return True


def _check_archives(arguments: argparse.Namespace) -> bool:
    right = True
    with progress("check", "bytes") as advance:
        checked = check_archives(arguments.root, progress=advance)
        for name, fault in checked:
            print(f"wrong {name} {fault}" if fault else f"ok {name}", flush=True)
            right = right and not fault
    return right


ACTIONS: Mapping[str, Callable[[argparse.Namespace], bool]] = {
    "show": _show,
    "verify": _verify,
    "fetch": _fetch,
    "check-archives": _check_archives,
}
"""What each action does with its arguments; False where it found faults."""
