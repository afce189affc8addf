"""Takes seconds to import; each process that begins to adds a mark."""

import os
import tempfile
import time
from pathlib import Path

MARKS = Path(tempfile.gettempdir(), f"slow-import-{os.getppid()}")  # Ray's workers have one parent

with MARKS.open("a") as file:
    file.write("x")
time.sleep(3)
