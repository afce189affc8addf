"""What a comparison of long runs takes: the command, from its start to the written page.

Twenty runs of five recipes, each with a history of 100,000 steps of eleven metrics, validation at
every fortieth, and an evaluation of 500 images with mask families, written by the product's own
writers. Then ``python -m pipeline compare`` runs in a fresh process: imports, reading, statistics,
the table and the page count. Files are in the page cache, as right after training.

Run: ``python -m benchmarks.compare [--runs 20] [--steps 100000]``, a minute or two. Written to
``results/compare.json``. The goal is for the CPU time, the least of three runs; the clock
on the wall is beside it, which says less on a machine that others use.
"""

import argparse
import csv
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import needs, write_result

METRICS = (
    "loss/discriminator",
    "loss/adversarial",
    "loss/l1_coarse",
    "loss/l1_refined",
    "score/margin",
    "speed/steps_per_s",
    "speed/images_per_s",
    "speed/data_wait_ms",
    "lr/generator",
    "lr/discriminator",
    "health/gradient_norm",
)
IMAGES, SEEDS, ROUNDS = 500, 4, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100_000)
    options = parser.parse_args()
    needs("pyarrow", "rich", "boto3", "pydantic")
    with tempfile.TemporaryDirectory(prefix="deepfill-compare-") as folder:
        names = [f"recipe{number // SEEDS}-s{number % SEEDS}" for number in range(options.runs)]
        for number, name in enumerate(names):
            write_run(folder, name, number, options.steps)
        page = Path(folder, "report.html")
        command = [sys.executable, "-m", "pipeline", "compare", *names, "--storage", folder]
        taken = min(
            (measured([*command, "--out", str(page)]) for _ in range(ROUNDS)),
            key=lambda each: each["cpu_seconds"],
        )
        megabytes = page.stat().st_size / 1e6
        history = sum(path.stat().st_size for path in Path(folder).rglob("metrics/*")) / 1e6
    result = {
        "runs": options.runs,
        "points_per_curve": options.steps,
        "curves": options.runs * (len(METRICS) + 2),
        "images": IMAGES,
        "megabytes_of_history": round(history, 1),
        "megabytes_of_page": round(megabytes, 2),
        **taken,
    }
    write_result("compare", result, packages=["numpy", "pyarrow"])


def measured(command: list[str]) -> dict[str, float]:
    """Wall time and CPU time in seconds, and the peak memory so far."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "cpu_seconds": round(cpu, 2),
        "seconds": round(seconds, 2),
        "peak_memory_gb": round(after.ru_maxrss / 1e6, 2),
    }


def write_run(storage: str, name: str, number: int, steps: int) -> None:
    """A run's history and evaluation."""
    from cluster.storage import join, open_store
    from pipeline.tracking.history import AttemptInfo, HistoryWriter

    store, rng = open_store(join(storage, "runs", name)), np.random.default_rng(number)
    recipe, seed = divmod(number, SEEDS)
    config: dict[str, Any] = {"name": name, "seed": seed, "train": {"l1_weight": 1.0 + recipe}}
    writer = HistoryWriter(
        store, AttemptInfo(global_batch=16, device="cpu", dataset_digest="d" * 64, config=config)
    )
    curves = np.exp(-np.arange(steps) / (steps / 4))[:, None] + rng.normal(
        0, 0.05, (steps, len(METRICS))
    )
    for step, values in enumerate(curves.tolist(), 1):
        writer.add(step, dict(zip(METRICS, values, strict=True)))
        if step % 40 == 0:
            writer.add(step, {"val/l1_percent": 10 * values[3], "val/psnr_db": 30 - values[3]})
    writer.close()

    of_images = np.random.default_rng(0)  # the same images for all runs
    hard, holes = of_images.lognormal(2.2, 0.5, IMAGES), of_images.uniform(2, 58, IMAGES)
    l1 = hard * rng.lognormal(0, 0.15, IMAGES) + 0.2 * recipe
    text = io.StringIO()
    rows = csv.writer(text)
    names = ("l1_percent", "l2_percent", "psnr_db", "ssim")
    rows.writerow(["key", "hole_percent", "mask_family", *names])
    for index, (hole, value) in enumerate(zip(holes, l1, strict=True)):
        family = ("box", "medium", "thick", "thin")[index % 4]
        values = (value, value**2 / 40, 35 - 5 * np.log(value), 1 - value / 60)
        rows.writerow([f"image_{index:04d}", hole, family, *values])
    settings = {"step": steps, "dataset_digest": "d" * 64, "seed": 0, "size_px": 256}
    store.put("evaluation/step-00100000/rows.csv", text.getvalue().encode())
    record = {"settings": settings, "images": IMAGES, "metrics": {}}
    store.put("evaluation/step-00100000/metrics.json", json.dumps(record).encode())


if __name__ == "__main__":
    main()
