"""How long training stands still for a checkpoint.

Trains the networks of the demo recipe, in its real loop and to a local folder, on small images: the
bytes of a checkpoint do not depend on the size of images, so neither does the time that the loop
stands still to copy them. The share is that time over 100 steps of the demo recipe, whose step is
timed in the same run at its own size and batch. Validation, which belongs to a checkpoint's
metrics, is not counted.

Run: ``python -m benchmarks.saving``, some five minutes. Written to ``results/saving.json``.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import needs, write_result

INTERVAL = 100
SAVES = 2
SMALL = {"train.size_px": 32, "train.global_batch": 2}
DEMO = Path("pipeline/recipes/demo.yaml")
IMAGES = 16


def main() -> None:
    needs("pydantic", "safetensors", "cv2", "simplejpeg")
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="deepfill-saving-") as name:
        folder = Path(name)
        write_images(folder / "images")
        stalls = saves(folder, SMALL, steps=SAVES * INTERVAL, every=INTERVAL)
        step_s = demo_step_s(folder)
    stall_s = statistics.median(stall for stall, _ in stalls)
    record: dict[str, Any] = {
        "interval_steps": INTERVAL,
        "measured_with": SMALL,
        "stall_s": [round(stall, 4) for stall, _ in stalls],
        "step_s_demo_recipe": round(step_s, 4),
        "share_of_training_percent": round(100 * stall_s / (INTERVAL * step_s), 3),
        "share_at_the_small_size_percent": round(
            100 * statistics.median(stall / seconds for stall, seconds in stalls), 3
        ),
    }
    write_result("saving", record, packages=["torch", "safetensors"])


def write_images(folder: Path) -> None:
    """Smooth images of 144 pixels, which differ."""
    import cv2

    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), cv2.resize(coarse, (144, 144)))


def saves(
    folder: Path, changes: dict[str, Any], *, steps: int, every: int
) -> list[tuple[float, float]]:
    """Of each save: seconds that the loop stood still, and seconds of the steps before it."""
    from pipeline.run_storage import RunStorage
    from pipeline.train import train

    cfg, _ = prepared(folder, {**changes, "train.steps": steps, "train.save_every_steps": every})
    seen = _Checkpoints()
    logger = logging.getLogger("pipeline.loop")
    logger.addHandler(seen)
    logger.setLevel(logging.INFO)
    try:
        train(cfg, RunStorage.open(cfg))
    finally:
        logger.removeHandler(seen)
    return seen.stalls


def demo_step_s(folder: Path) -> float:
    """Median seconds of a step of the demo recipe, the first ones left out."""
    from pipeline import ranks
    from pipeline.data.loaders import train_loader
    from pipeline.pair import build_pair, fresh_networks
    from pipeline.run_storage import RunStorage

    cfg, _ = prepared(folder, {})
    generator, discriminator = fresh_networks(cfg.model, cfg.train, ranks.Ranks(kind="cpu").device)
    here = ranks.Ranks(kind="cpu")
    pair = build_pair(cfg.model, cfg.train, generator, discriminator, here, None)
    loader = train_loader(cfg, RunStorage.open(cfg).open_dataset(), here)
    seconds = []
    for step, (_, _, batch) in enumerate(itertools.islice(loader.batches(0, 0), 8)):
        started = time.perf_counter()
        pair.step(batch.to(here.device), step)
        seconds.append(time.perf_counter() - started)
    loader.close()
    return statistics.median(seconds[2:])


def prepared(folder: Path, changes: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The demo recipe on the images, whose dataset is built once, and the overrides it has."""
    from data_prep.build import SerialScheduler, build_dataset
    from pipeline import config

    settings = {
        "name": "saving",
        "storage": str(folder / "storage"),
        "data.source": "folder",
        "data.root": str(folder / "images"),
        "data.subject": "face",  # none is found, which is quick
        "data.val_fraction": 0.25,
        "evaluate.samples_while_training": 2,
        "train.launcher": "local",
        "train.device": "cpu",
        "tracking.backend": "none",
        **changes,
    }
    overrides = [f"{name}={value}" for name, value in settings.items()]
    cfg = config.load(DEMO, overrides)
    url = f"{folder}/storage/datasets/{cfg.data.name}"
    build_dataset(url, cfg.data, cfg.sketch, seed=cfg.seed, scheduler=SerialScheduler())
    return cfg, overrides


class _Checkpoints(logging.Handler):
    """Reads from the log of the loop how long each save held it up."""

    def __init__(self) -> None:
        super().__init__()
        self.stalls: list[tuple[float, float]] = []
        self._since = time.perf_counter()

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("checkpoint step="):
            assert isinstance(record.args, tuple)
            now = time.perf_counter()
            self.stalls.append((float(str(record.args[-1])), now - self._since))
            self._since = now


if __name__ == "__main__":
    main()
