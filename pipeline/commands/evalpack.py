"""``python -m pipeline evalpack``: make and show frozen evaluation packs."""

import argparse
from collections.abc import Callable, Mapping

from rich.table import Table

from data_prep.shards import Dataset
from pipeline.commands.tables import print_table
from pipeline.evaluation.packs import MASK_FAMILIES, Pack, bin_names, make_pack
from pipeline.progress import progress


def _make(arguments: argparse.Namespace) -> bool:
    with progress("evalpack", "images") as advance:
        pack = make_pack(
            arguments.out,
            Dataset.open(arguments.dataset),
            split=arguments.split,
            images=arguments.images,
            size_px=arguments.size_px,
            seed=arguments.seed,
            families=arguments.families or tuple(MASK_FAMILIES),
            progress=advance,
        )
    _print(pack)
    return True


def _show(arguments: argparse.Namespace) -> bool:
    pack = Pack.open(arguments.url)
    _print(pack)
    if arguments.verify:
        with progress("verify", "images") as advance:
            for done, _ in enumerate(pack.contents(pack.items), 1):
                advance(done, len(pack.items))
        print("verified: all pixels are as written")
    return True


def _print(pack: Pack) -> None:
    settings = pack.settings
    print(f"pack {pack.name}  {len(pack.items)} images of {pack.size_px} px  {pack.url}")
    print(f"digest {pack.digest}")
    print(
        f"from {settings['dataset']} {settings['split']}, seed {settings['seed']}, "
        f"dataset digest {settings['dataset_digest']}"
    )
    table = Table("holes, % of the image", *bin_names(), "all", box=None, pad_edge=False)
    counts = pack.counts()
    for family, by_bin in counts.items():
        table.add_row(family, *map(str, by_bin.values()), str(sum(by_bin.values())))
    sums = [sum(by_bin[name] for by_bin in counts.values()) for name in bin_names()]
    table.add_row("all", *map(str, sums), str(sum(sums)))
    print_table(table)


ACTIONS: Mapping[str, Callable[[argparse.Namespace], bool]] = {"make": _make, "show": _show}
"""What each action does with its arguments."""
