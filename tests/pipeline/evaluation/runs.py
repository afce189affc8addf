"""Run folders as evaluations leave them, for comparisons to read."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import save

from cluster.storage import Store, join, open_store
from pipeline.checkpoints import CheckpointStore
from pipeline.tracking.history import AttemptInfo, HistoryWriter

DIGEST = "d" * 64
SETTINGS = {"dataset_digest": DIGEST, "seed": 0, "size_px": 64, "masks": {"mixture": {"box": 1}}}
FAMILIES = ("box", "thick", "thin")


def config(**overrides: Any) -> dict[str, Any]:
    """A resolved configuration, cut down to what comparisons distinguish."""
    settings: dict[str, Any] = {
        "seed": 0,
        "model": {"convolution": "gated"},
        "train": {"l1_weight": 1.0, "global_batch": 4},
        "tracking": {"backend": "none"},
    }
    for name, value in overrides.items():
        section, _, key = name.partition("__")
        if key:
            settings[section] = settings[section] | {key: value}
        else:
            settings[section] = value
    return settings


def write_run(
    storage: str,
    name: str,
    *,
    settings: Mapping[str, Any] | None = None,
    steps: Sequence[int] = (10, 20),
    commit: str = "c0ffee",
    curve: Mapping[str, float] | None = None,
) -> Store:
    """A run with a history and a checkpoint; returns its folder."""
    run = open_store(join(storage, "runs", name))
    resolved = {"name": name, **(settings or config())}
    writer = HistoryWriter(
        run,
        AttemptInfo(
            global_batch=4, device="cpu", git_commit=commit, dataset_digest=DIGEST, config=resolved
        ),
    )
    for step in steps:
        writer.add(
            step,
            curve
            or {"loss/l1_refined": 1 / step + len(name) / 100, "speed/images_per_s": 20.0 + step},
        )
    writer.close()
    checkpoints = CheckpointStore(open_store(join(run.url, "checkpoints")))
    checkpoints.save(
        steps[-1],
        {"ema.safetensors": save({"weight": np.zeros(1, np.float32)})},
        manifest={
            "metrics": {"val/l1_percent": 10.0},
            "dataset_digest": DIGEST,
            "mlflow_run": f"{abs(hash(name)):032x}"[:32],
            "config": resolved,
        },
    )
    checkpoints.close()
    return run


def image_table(images: int, seed: int = 0) -> dict[str, Any]:
    """Keys, holes and families of ``images``, and how hard each one is."""
    rng = np.random.default_rng(seed)
    return {
        "key": [f"class/image_{index:04d}" for index in range(images)],
        "hole_percent": rng.uniform(2, 58, images),
        "mask_family": [FAMILIES[index % 3] for index in range(images)],
        "difficulty": rng.lognormal(2.2, 0.5, images),
    }


def write_evaluation(
    run: Store,
    table: Mapping[str, Any],
    values: Mapping[str, np.ndarray],
    *,
    step: int = 20,
    folder: str | None = None,
    settings: Mapping[str, Any] | None = None,
    definitions: Mapping[str, Any] | None = None,
    families: bool = True,
) -> None:
    """An evaluation of those images with those values per image, as CSV."""
    folder = folder or f"evaluation/step-{step:08d}"
    names = ["key", "hole_percent", *(["mask_family"] if families else []), *values]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    columns = {**table, **values}
    writer.writerows(zip(*(columns[name] for name in names), strict=True))
    run.put(f"{folder}/rows.csv", text.getvalue().encode())
    record = {
        "settings": {"step": step, "samples": "all", **SETTINGS, **(settings or {})},
        "pictures": len(table["key"]),
        "metrics": {name: float(np.mean(column)) for name, column in values.items()},
    }
    if definitions:
        record["definitions"] = definitions
    run.put(f"{folder}/metrics.json", json.dumps(record).encode())


def quality(
    table: Mapping[str, Any], rng: np.random.Generator, *, shift: float = 0.0, noise: float = 0.15
) -> dict[str, np.ndarray]:
    """Values of every metric of one run: ``shift`` in percent points of L1, with its own noise."""
    hard = table["difficulty"]
    l1 = hard * rng.lognormal(-(noise**2) / 2, noise, len(hard)) + shift
    return {
        "l1_percent": l1,
        "l2_percent": l1**2 / 40 * rng.lognormal(0, noise, len(hard)),
        "psnr_db": 35 - 5 * np.log(l1) + rng.normal(0, noise * 3, len(hard)),
        "ssim": 1 - l1 / 60 + rng.normal(0, noise / 20, len(hard)),
    }
