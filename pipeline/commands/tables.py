"""Tables on the terminal."""

import sys

from rich.console import Console
from rich.table import Table


def wide_console() -> Console:
    # Without a terminal rich takes 80 columns, and cuts names and numbers.
    # Names and values may have square brackets, which are not markup.
    return Console(width=None if sys.stdout.isatty() else 240, markup=False, emoji=False)


def print_table(table: Table) -> None:
    wide_console().print(table)
