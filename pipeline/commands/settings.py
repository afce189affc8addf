"""``python -m pipeline show --describe``: every setting of a recipe in a table."""

import sys
from collections.abc import Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.config import Setting

WIDTH = 100  # columns that name, value and origin take at most in a pipe, before the meaning


def print_settings(settings: Sequence[Setting]) -> None:
    """Print name, value, origin and documentation of each setting.

    A terminal gets a table of its width, with long documentation wrapped; a file or a pipe gets
    exactly one line per setting, whatever its length, for ``grep``.
    """
    rows = [
        (setting.name, as_typed(setting.value), setting.origin, plain(setting.documentation))
        for setting in settings
    ]
    if sys.stdout.isatty():
        table = Table(
            "setting", "value", "from", "meaning", box=None, pad_edge=False, header_style=""
        )
        table.columns[0].no_wrap = table.columns[2].no_wrap = True
        for row in rows:
            table.add_row(*map(Text, row))  # as text: brackets are no markup here
        Console().print(table)
        return
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    widths[1] = min(widths[1], WIDTH - widths[0] - widths[2])
    for *cells, documentation in rows:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print("  ".join([*padded, documentation]).rstrip())


def as_typed(value: Any) -> str:
    """``value`` as one types it after ``section.key=``."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
    return text.removesuffix("...\n").strip()


def plain(documentation: str) -> str:
    """``documentation`` without the marks around names."""
    return documentation.replace("``", "")
