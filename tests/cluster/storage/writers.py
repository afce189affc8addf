"""Processes that write to a store until they are killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

CHILD = """
import resource, sys
from pathlib import Path
from cluster.storage import open_store, scratch_folder

{body}
"""


def child(body: str, *arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    """A real process, to be killed or kept small, that runs ``body``."""
    command = [sys.executable, "-c", CHILD.format(body=body), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)


WRITES = 'open_store(sys.argv[1]).upload(Path("/dev/stdin"), "a/key")'
