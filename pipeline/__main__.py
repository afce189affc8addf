"""``python -m pipeline``."""

import os
import sys

# Before torch is imported: it then asks Linux for pages of 2 MiB instead of 4 KiB, without which
# inpainting a large image on a CPU spends half of its time on page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main())
