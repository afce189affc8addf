"""The whole job on one machine: Ray, S3 and MLflow embedded, the job itself submitted for real."""

import logging
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from cluster.services import start_s3
from cluster.session import local_ray
from cluster.storage.s3 import s3_bucket
from cluster.submit import submit
from data_prep.masks import MaskSampler
from data_prep.shards import read_samples
from pipeline import config
from pipeline.run_storage import RunStorage

log = logging.getLogger(__name__)

RUNTIME_ENV = Path("ray_job.yaml")


def demo(recipe: Path, overrides: Sequence[str], folder: Path) -> int:
    """Start the services, submit the job, fetch the best checkpoint, fill a hole with it.

    Returns an exit code. Datasets, checkpoints and MLflow's database stay in ``folder``, so a
    second call skips the finished stages. All services end with it.
    """
    cfg = config.load(recipe, overrides)
    bucket = s3_bucket(cfg.storage)
    if bucket is None:
        raise ValueError(
            f"storage={cfg.storage}: the demo starts its own S3 server, so give s3://bucket/prefix"
        )
    if not RUNTIME_ENV.exists():
        raise FileNotFoundError(f"{RUNTIME_ENV} was not found: start from the top of the checkout")
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    database = f"sqlite:///{folder / 'mlflow.db'}"
    with start_s3(folder / "s3") as s3:
        s3.make_bucket(bucket)
        environment = {
            **s3.environment,
            "MLFLOW_TRACKING_URI": database,
            "GLOO_SOCKET_IFNAME": "lo",
        }
        with local_ray(folder / "ray", environment=environment) as ray_head:
            code = submit(
                ["python", "-m", "pipeline", "run", str(recipe), *overrides],
                runtime_env=RUNTIME_ENV,
                dashboard_url=ray_head.dashboard_url,
                environment=ray_head.environment,
            )
        if code:
            return code
        os.environ.update(environment)  # the storage is ours to read now
        storage = RunStorage.open(cfg)
        checkpoint = folder / "checkpoint"
        _type("checkpoints", "pull", storage.run_url, "--step", "best", "--out", str(checkpoint))
        image, mask, sketch = _held_out(cfg, storage, folder / "inpaint")
        filled = folder / "inpaint" / "filled.png"
        _type(
            *("inpaint", str(checkpoint), str(image), str(mask)),
            *(["--sketch", str(sketch)] if cfg.model.guided else []),
            *("--out", str(filled)),
        )
        sheet = _evaluation_sheet(storage, folder)
    _summary(folder, database, checkpoint, filled, sheet, time.monotonic() - started)
    return 0


def _type(*arguments: str) -> None:
    """Run one of our commands as a user would, and show it; it reports its own mistakes."""
    print(f"$ python -m pipeline {shlex.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "pipeline", *arguments]).returncode
    if code:
        raise SystemExit(code)


def _held_out(cfg: config.Config, storage: RunStorage, folder: Path) -> tuple[Path, Path, Path]:
    """An image that training never saw, a mask, and the image's sketch, as files."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset = storage.open_dataset()
    first = dataset.shards("val")[0]
    sample = next(iter(read_samples(dataset.store.get(first.name))))
    image, mask, sketch = (folder / f"{name}.png" for name in ("image", "mask", "sketch"))
    pixels = Image.open(BytesIO(sample.jpg))
    pixels.save(image)
    Image.open(BytesIO(sample.sketch)).save(sketch)
    hole = MaskSampler(cfg.masks)(pixels.height, pixels.width, random.Random(cfg.seed))
    Image.fromarray(hole * np.uint8(255)).save(mask)
    return image, mask, sketch


def _evaluation_sheet(storage: RunStorage, folder: Path) -> Path:
    """The newest sheet of samples of the evaluation, copied out of the storage."""
    newest = [key for key in storage.run.list_keys("evaluation/") if key.endswith("samples.png")][
        -1
    ]
    sheet = folder / "samples.png"
    storage.run.download(newest, sheet)
    return sheet


def _summary(
    folder: Path, database: str, checkpoint: Path, filled: Path, sheet: Path, elapsed_s: float
) -> None:
    def shown(path: Path) -> str:
        return os.path.relpath(path)

    mlflow = Path(sys.executable).with_name("mlflow")
    relative = shown(Path(database.removeprefix("sqlite:///")))
    print(
        f"""
The whole job ran in {elapsed_s / 60:.1f} minutes.
  sheet of samples   {shown(sheet)}
  a hole filled      {shown(filled)}   (image.png, mask.png, sketch.png beside it)
  best checkpoint    {shown(checkpoint)}
  look at the run    {shown(mlflow)} server --port 5000 --backend-store-uri sqlite:///{relative}
Everything is kept in {shown(folder)}: `make demo` again finds it finished."""
    )
