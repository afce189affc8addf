"""Run the benchmarks that suit this machine, and print the results beside the goals.

    python -m benchmarks [NAME ...]        all of them, or some: step masks loader ...

Each runs in a separate process and leaves ``results/<name>.json``; one that lacks a GPU or a
package is skipped and says so. The table in benchmarks/README.md is brought up to date.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.goals import table, write_table
from benchmarks.timing import SKIPPED

ON_CPU = (
    "masks",
    "loader",
    "metrics",
    "prep",
    "img2dataset",
    "workers",
    "plan",
    "storage",
    "compare",
    "attention",
    "inference",
    "big_images",
    "saving",
    "step",
    "health",
    "hed",
    "hed_bsds",
    "landmarks",
    "scaling",
    "recovery",
)
ON_GPU = {"attention": [], "inference": [], "step": ["--batch", "32"], "health": [], "hed": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ON_CPU))
    names = parser.parse_args().names
    unknown = sorted({*names} - set(ON_CPU))
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]}: choose from {', '.join(ON_CPU)}")
    if not _has_amx():
        print("note: a CPU without AMX; the goals for bf16 are for one that has it")
    failed = [command for command in commands(names) if not _succeeds(command)]
    write_table()
    print(table())
    if failed:
        sys.exit(f"failed: {', '.join(' '.join(command) for command in failed)}")


def commands(names: list[str]) -> list[list[str]]:
    """Module and arguments of each run that ``names`` ask for; of every one, without names."""
    wanted = [[name] for name in ON_CPU]
    wanted += [[name, "--device", "cuda", *options] for name, options in ON_GPU.items()]
    return [command for command in wanted if not names or command[0] in names]


def _succeeds(command: list[str]) -> bool:
    print(f"{' '.join(command)}: ", end="", flush=True)
    module, *options = command
    ran = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    last = ran.stderr.strip().splitlines()[-1] if ran.stderr.strip() else ""
    if ran.returncode == SKIPPED:
        print(f"skipped, {last}")
    else:
        print(f"failed, {last}" if ran.returncode else "done")
    return ran.returncode in (0, SKIPPED)


def _has_amx() -> bool:
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


if __name__ == "__main__":
    main()
