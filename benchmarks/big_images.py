"""Filling large images: only what reaches the hole against the whole image.

Each measurement is a fresh process of one thread: its CPU time for one call, and its peak memory.
The whole computation is that of ``Generator`` without regions, pasted; the other is
``models.inference.fill``. Both run one after the other; for several holes the whole computation is
that of one hole at the same size, since it is alike for any.

The whole computation of 4096×2160 takes most of an hour of one core and 16 GiB, so it is computed
from that of an eighth of the rows: attention grows with the square of the rows, in queries and in
keys, everything else with the rows. The same is done at 1920×1080, where the whole is measured too:
``share_method_error`` says how far the computed time is from it.

Run: ``python -m benchmarks.big_images``, some ten minutes of one core. Written to
``results/big_images.json`` after every case; ``--keep`` keeps the cases that it has.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import RESULTS, write_result

SHARE = 8
LIMIT_BYTES = 10 * 2**30
# width, height, share of the area, number of holes
CASES = {
    "1920x1080, 5 %": (1920, 1080, 0.05, 1),
    "960x544, 60 %": (960, 544, 0.60, 1),
    "960x544, 5 % in 20 holes": (960, 544, 0.05, 20),
    "960x544, 1 % in 20 holes": (960, 544, 0.01, 20),
    "960x544, 1 % in 2 holes": (960, 544, 0.01, 2),
    "4096x2160, 5 %": (4096, 2160, 0.05, 1),
}
TOO_LARGE = "4096x2160, 5 %"
Taken = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="measure only what is missing")
    parser.add_argument("--measure", nargs=5, metavar="VALUE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        variant, width, height, share, holes = options.measure
        print(json.dumps(measure(variant, (int(width), int(height)), float(share), int(holes))))
        return

    path = RESULTS / "big_images.json"
    kept = json.loads(path.read_text())["measured"] if options.keep and path.is_file() else {}
    measured: dict[str, dict[str, Taken]] = {}
    for name, case in CASES.items():
        measured[name] = kept.get(name) or _compared(case, measured, too_large=name == TOO_LARGE)
        _write(measured)


def _compared(
    case: tuple[int, int, float, int], measured: dict[str, dict[str, Taken]], *, too_large: bool
) -> dict[str, Taken]:
    width, height, share, holes = case
    if too_large:
        whole = _computed(width, height)
    elif holes > 1:
        alike = [name for name, other in CASES.items() if other[:2] == case[:2]]
        whole = measured[alike[0]]["whole"]
    else:
        whole = _fresh("whole", width, height, share, holes)
    taken = {"whole": whole, "regions": _fresh("regions", width, height, share, holes)}
    if (width, height) == (1920, 1080):
        taken["whole computed from a share"] = _computed(width, height)
    return taken


def _write(measured: dict[str, dict[str, Taken]]) -> None:
    def ratio(key: str, above: str, below: str) -> Taken:
        return {name: taken[above][key] / taken[below][key] for name, taken in measured.items()}

    errors = [
        taken["whole computed from a share"]["cpu_seconds"] / taken["whole"]["cpu_seconds"] - 1
        for taken in measured.values()
        if "whole computed from a share" in taken
    ]
    write_result(
        "big_images",
        {
            "load_average": os.getloadavg()[1],
            "measured": measured,
            "share_method_error": errors[0] if errors else None,
            "times_faster": ratio("cpu_seconds", "whole", "regions"),
            "memory_of_whole": ratio("peak_gib", "regions", "whole"),
        },
        packages=["torch"],
    )


def _fresh(variant: str, width: int, height: int, share: float, holes: int) -> Taken:
    values = map(str, (width, height, share, holes))
    command = [sys.executable, "-m", "benchmarks.big_images", "--measure", variant, *values]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    taken: Taken = json.loads(ran.stdout.splitlines()[-1])
    return taken


def _computed(width: int, height: int) -> Taken:
    """Seconds and GiB of the whole computation, from those of a share of the rows."""
    from models.attention import CACHED_ROWS, attention_bytes
    from models.inference import kept_bytes
    from models.options import ModelOptions

    rows = height // 8 // SHARE + 1
    times = height / (8 * rows)
    taken = _fresh("whole", width, 8 * rows, 0.05, 1)
    rest = taken["cpu_seconds"] - taken["attention_seconds"]
    kept = kept_bytes(ModelOptions(guided=False)) * width * height
    return {
        "cpu_seconds": times * rest + times**2 * taken["attention_seconds"],
        "peak_gib": (kept + attention_bytes(height // 8, width // 8, CACHED_ROWS)) / 2**30,
        "from_height": 8 * rows,
    }


def measure(variant: str, size: tuple[int, int], share: float, holes: int) -> Taken:
    """CPU seconds of one call, of attention alone, and the peak memory that it adds in GiB."""
    import models.generator
    from models import Generator
    from models.inference import fill, kept_bytes
    from models.masking import erase, paste

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    width, height = size
    network = Generator().to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    image = torch.rand(1, 3, height, width) * 2 - 1
    image = image.contiguous(memory_format=torch.channels_last)
    mask = mask_of(width, height, share, holes)
    seconds: list[float] = []
    for name in ("attend", "attend_within"):
        setattr(models.generator, name, _timed(getattr(models.generator, name), seconds))
    small = image[..., :64, :64], mask[..., :64, :64]
    fill(network, *small, max_memory_bytes=LIMIT_BYTES)  # what the first call sets up
    seconds.clear()
    before, started = _peak_bytes(), time.process_time()
    with torch.no_grad():
        if variant == "regions":
            fill(network, image, mask, max_memory_bytes=LIMIT_BYTES)
        else:
            left = LIMIT_BYTES - kept_bytes(network.options) * width * height
            incomplete = erase(image, mask)
            refined = network(incomplete, mask, max_attention_bytes=left)[1]
            paste(refined, into=image, mask=mask)
    return {
        "cpu_seconds": time.process_time() - started,
        "attention_seconds": sum(seconds),
        "peak_gib": (_peak_bytes() - before) / 2**30,
    }


def mask_of(width: int, height: int, share: float, holes: int) -> torch.Tensor:
    """Squares that together cover ``share``, on a grid; one alone in the middle."""
    mask = torch.zeros(1, 1, height, width)
    columns = max(round((holes * width / height) ** 0.5), 1)
    rows = -(-holes // columns)
    side = (share * width * height / holes) ** 0.5
    tall, wide = min(round(side), height), round(side * side / min(round(side), height))
    for number in range(holes):
        middle_y = round((number // columns + 0.5) * height / rows)
        middle_x = round((number % columns + 0.5) * width / columns)
        top, left = max(middle_y - tall // 2, 0), max(middle_x - wide // 2, 0)
        mask[..., top : top + tall, left : left + wide] = 1
    return mask


def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*given: Any, **named: Any) -> Any:
        started = time.process_time()
        result = function(*given, **named)
        seconds.append(time.process_time() - started)
        return result

    return timed


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
