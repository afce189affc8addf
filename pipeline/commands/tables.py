"""Tables on the terminal."""

import sys

from rich.console import Console
from rich.table import Table


def print_table(table: Table) -> None:
    # Without a terminal rich takes 80 columns, and cuts names and numbers.
    Console(width=None if sys.stdout.isatty() else 240).print(table)
