"""Registered models: loaded by a program that has no pipeline, and promoted by a verdict alone."""

import base64
import hashlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from models.options import ModelOptions
from pipeline.checkpoints import CheckpointStore
from pipeline.commands.compare import compare_runs
from pipeline.commands.inpaint import inpaint
from pipeline.config import load
from pipeline.evaluation.job import register_generator
from pipeline.filling import inpaint_image
from pipeline.networks import load_generator
from pipeline.run_storage import RunStorage
from pipeline.tracking import RunInfo
from pipeline.tracking.mlflow import MlflowRun
from pipeline.tracking.model_urls import RUN_URL, storage_url
from pipeline.tracking.registry import STEP, ModelVersion, Registry, RegistryError
from tests.pipeline.evaluation.runs import config, image_table, quality, write_evaluation, write_run
from tests.weights import write_weights

pytestmark = pytest.mark.slow  # MLflow's import and its database
STRANGER = '''
"""A program without this repository, beside another package called models."""
import sys

ALLOWED_NOT = ("pipeline", "data_prep", "cluster", "jaxtyping", "cv2", "simplejpeg")

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ALLOWED_NOT:
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path[:] = [each for each in sys.meta_path if "editable" not in repr(each)]
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
import models
assert models.DECOY

import mlflow
import numpy as np
import pandas as pd

mlflow.set_tracking_uri(sys.argv[2])
model = mlflow.pyfunc.load_model("models:/inpainting@candidate")
given = np.load("given.npz")
files = {name: open(f"{name}.txt").read() for name in ("image", "mask", "sketch")}
arrays = {name: given[name] for name in files}
by_array = model.predict(pd.DataFrame([arrays]))["image"][0]
by_list = model.predict([{name: plane.tolist() for name, plane in arrays.items()}])["image"][0]
by_file = model.predict([files])["image"][0]
without = model.predict([{name: given[name] for name in ("image", "mask")}])["image"][0]
np.savez("filled.npz", by_array=by_array, by_list=np.array(by_list), without=without)
open("filled.txt", "w").write(by_file)
faults = []
for wrong in ({**files, "image": "no base64"}, {**arrays, "mask": arrays["mask"][1:]}):
    try:
        model.predict([wrong])
    except Exception as error:
        faults.append(str(error))
print("\\n".join(faults))
assert models.DECOY
'''


class World:
    """MLflow on SQLite with a run, and what to register."""

    def __init__(self, folder: Path, database: bytes) -> None:
        self.folder = folder
        self.uri = f"sqlite:///{folder}/mlflow.db"
        (folder / "mlflow.db").write_bytes(database)
        self.registry = Registry(self.uri, "inpainting")
        self.client = MlflowClient(self.uri)

    def add_run(self, name: str) -> str:
        url = f"{self.folder}/runs/{name}"
        MlflowRun(RunInfo(name, url), self.uri, "tests").connect()
        return url

    def register(self, url: str, weights: bytes, options: ModelOptions) -> ModelVersion:
        return self.registry.register(
            experiment="tests",
            run_url=url,
            weights_url=f"{url}/checkpoints/step-00000020",
            step=20,
            weights=weights,
            options=options,
            trained_px=64,
            metrics={"l1_percent": 9.87654321},
        )


@pytest.fixture
def world(tmp_path: Path, empty_database: bytes) -> World:
    return World(tmp_path, empty_database)


def png(pixels: np.ndarray) -> str:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def test_a_program_without_this_repository_fills_as_inpaint_does_to_the_last_bit(
    world: World, tmp_path: Path
) -> None:
    options = ModelOptions(guided=True, width=16)
    write_weights(tmp_path / "ema.safetensors", options, gain=4)
    weights = (tmp_path / "ema.safetensors").read_bytes()
    world.register(world.add_run("one"), weights, options)

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (45, 70, 3), np.uint8)
    mask, sketch = np.zeros((2, 45, 70), np.uint8)
    mask[10:45, 20:60] = 255  # down to the border
    sketch[20:22, 25:50] = 255
    away = tmp_path / "away"
    decoy = away / "decoy"
    decoy.mkdir(parents=True)
    (decoy / "models.py").write_text("DECOY = True\n")
    (away / "stranger.py").write_text(STRANGER)
    np.savez(away / "given.npz", image=image, mask=mask, sketch=sketch)
    for name, pixels in (("image", image), ("mask", mask), ("sketch", sketch)):
        (away / f"{name}.txt").write_text(png(pixels))
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    ran = subprocess.run(
        [sys.executable, "-I", "stranger.py", str(decoy), world.uri],
        cwd=away,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]

    generator = load_generator(str(tmp_path / "ema.safetensors"))
    expected = inpaint_image(generator, image, mask, sketch)
    (out,) = inpaint(
        str(tmp_path / "ema.safetensors"),
        tmp_path / "image.png",
        tmp_path / "mask.png",
        tmp_path / "out.png",
        sketch=tmp_path / "sketch.png",
    )
    filled = np.load(away / "filled.npz")
    answer = Image.open(io.BytesIO(base64.b64decode((away / "filled.txt").read_text())))
    for found in (filled["by_array"], filled["by_list"], answer, Image.open(out)):
        np.testing.assert_array_equal(np.asarray(found), expected)
    np.testing.assert_array_equal(filled["without"], inpaint_image(generator, image, mask))
    assert (filled["without"] != expected).any()
    not_base64, wrong_size = ran.stdout.splitlines()[-2:]
    assert "the image is no image file in base64" in not_base64
    assert "a mask of (44, 70): give (45, 70)" in wrong_size


def test_equal_weights_are_one_version_and_the_newest_is_the_candidate(
    world: World, tmp_path: Path
) -> None:
    options = ModelOptions(guided=False, width=8)
    url = world.add_run("one")
    write_weights(tmp_path / "a.safetensors", options)
    write_weights(tmp_path / "b.safetensors", options, gain=2)
    first, second = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "ab")
    assert world.register(url, first, options).number == "1"
    assert world.register(url, first, options).number == "1"
    assert world.register(url, second, options).number == "2"
    candidate = world.client.get_model_version_by_alias("inpainting", "candidate")
    assert candidate.version == 2
    assert candidate.tags["project.weights_sha256"] == hashlib.sha256(second).hexdigest()
    assert candidate.tags["project.metric.l1_percent"] == "9.87654"
    assert storage_url("models:/inpainting@candidate", world.uri) == (
        f"{url}/checkpoints/step-00000020"
    )
    with pytest.raises(RegistryError, match=r"no run of /nowhere.*tracking sync"):
        world.register("/nowhere", first + b" ", options)


def test_evaluate_registers_the_checkpoint_and_needs_no_registry(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = world.add_run("one")
    settings = [
        f"storage={tmp_path}",
        "name=one",
        "tracking.experiment=tests",
        "tracking.register=inpainting",
    ]
    recipe = Path("pipeline/recipes/demo.yaml")
    write_weights(tmp_path / "ema.safetensors", ModelOptions(guided=True, width=8))
    weights = (tmp_path / "ema.safetensors").read_bytes()
    cfg = load(recipe, [*settings, f"tracking.uri={world.uri}"])
    storage = RunStorage.open(cfg)
    checkpoints = CheckpointStore(storage.checkpoints)
    checkpoints.save(20, {"ema.safetensors": weights}, manifest={"metrics": {"val/l1_percent": 1}})
    checkpoints.close()
    register_generator(cfg, storage, checkpoints, 20, {"l1_percent": 1.0})
    found = storage_url("models:/inpainting@candidate", world.uri)
    assert found == f"{url}/checkpoints/step-00000020"
    assert load_generator(found).guided

    away = load(recipe, [*settings, "tracking.uri=http://127.0.0.1:9"])
    register_generator(away, storage, checkpoints, 20, {"l1_percent": 1.0})
    assert "not registered, repeat `evaluate` to register" in caplog.text


@pytest.fixture
def runs(world: World) -> dict[str, str]:
    """Evaluated runs, worse, equal and better; each has a version."""
    table, rng = image_table(60), np.random.default_rng(0)
    urls = {}
    for name, shift in (("middle", 1.0), ("bad", 3.0), ("good", 0.0)):
        settings = config(train__l1_weight=shift)
        run = write_run(str(world.folder), name, settings=settings)
        write_evaluation(run, table, quality(table, rng, shift=shift))
        urls[name] = run.url
    world.client.create_registered_model("inpainting")
    for url in urls.values():
        tags = {RUN_URL: url, STEP: "20"}
        world.client.create_model_version("inpainting", url, tags=tags)
    return urls


def promoted(world: World, *urls: str) -> str:
    said = compare_runs(urls, tracking_uri=world.uri, promote="inpainting")
    return "\n".join(str(part) for part in said if "champion" in str(part))


def champion(world: World) -> Any:
    return world.client.get_registered_model("inpainting").aliases.get("champion")


def test_the_champion_changes_only_where_the_verdict_says_better(
    world: World, runs: dict[str, str]
) -> None:
    assert "champion is version 1" in promoted(world, runs["middle"], runs["bad"])
    assert champion(world) == 1
    assert "champion stays version 1: no run is better" in promoted(world, runs["bad"])
    assert champion(world) == 1
    assert "champion is version 3 of inpainting now, good (was version 1)" in promoted(
        world, runs["bad"], runs["good"]
    )
    assert champion(world) == 3
    assert "champion stays version 3" in promoted(world, runs["middle"])


def test_what_cannot_be_promoted_is_one_clear_line(world: World, runs: dict[str, str]) -> None:
    with pytest.raises(
        RegistryError, match=r"has no registered model other: set tracking\.register"
    ):
        list(compare_runs([runs["bad"]], tracking_uri=world.uri, promote="other"))
    world.client.set_registered_model_alias("inpainting", "champion", "1")
    world.client.set_model_version_tag("inpainting", "1", STEP, "10")
    assert "champion stays: step 10 of" in promoted(world, runs["good"])
    world.client.set_model_version_tag("inpainting", "1", STEP, "20")
    world.client.delete_model_version("inpainting", "3")
    with pytest.raises(RegistryError, match=r"inpainting has no version of step 20 of .*good"):
        list(compare_runs([runs["good"]], tracking_uri=world.uri, promote="inpainting"))
