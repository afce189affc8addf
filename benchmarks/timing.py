"""How benchmarks measure and what they write: interleaved variants, CPU time, ratios of one run."""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

RESULTS = Path(__file__).parent / "results"

SKIPPED = 77  # the exit code of a benchmark that does not suit the machine, as automake's tests say


def skip(reason: str) -> NoReturn:
    """Leave with one line that says why."""
    print(reason, file=sys.stderr)
    raise SystemExit(SKIPPED)


def needs(*modules: str) -> None:
    """Leave with one line where a module is not installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        skip(f"needs {', '.join(missing)}, which this Python does not have: `make test` installs")


def parse_on_device(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options with ``--device``, and torch as it is measured: one thread, denormals flushed.

    Leaves with one line where the device is missing.
    """
    import torch

    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        skip("no CUDA device")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    return options


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 5,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """Median seconds of one call of each variant.

    Called in turn, A B C … C B A, so that a machine that others use slows all of them alike. The
    clock counts the process's CPU time by default; every variant runs once before.
    """
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        order = list(variants.items())
        for name, run in order if number % 2 == 0 else reversed(order):
            started = clock()
            run()
            seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def write_result(name: str, result: Mapping[str, Any], *, packages: Sequence[str]) -> Path:
    """Keep ``result`` as ``results/<name>.json`` with the machine and the versions; print it.

    A name that ends with ``_cuda`` has the GPU's beside the CPU's.
    """
    record = {
        "benchmark": name,
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in packages},
        **result,
    }
    if name.endswith("_cuda"):
        import torch

        record["gpu"] = torch.cuda.get_device_name()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return path


def cpu_name() -> str:
    """The CPU's name, as Linux reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
