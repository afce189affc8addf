"""``python -m pipeline``."""

import os
import sys

# Before torch is imported: it then asks Linux for pages of 2 MiB instead of 4 KiB, without which
# inpainting a large image on a CPU spends half of its time on page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def run() -> int:
    """The exit code of the command; also of one that is interrupted, or fails, while it loads."""
    try:
        from pipeline.cli import main
    except KeyboardInterrupt:
        print("stopped: run the same command to resume", file=sys.stderr)
        return 3
    except ModuleNotFoundError as error:
        from pipeline.errors import describe_missing_package

        print(describe_missing_package(error), file=sys.stderr)
        return 1
    code = main()
    doctor = sys.modules.get("pipeline.doctor.findings")
    if doctor is not None and doctor.abandoned:
        # Threads that wait for a server that hangs would keep the interpreter from its end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(run())
