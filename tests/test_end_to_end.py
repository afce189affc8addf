"""The whole job on two ranks: left alone, stopped half way, killed; and what is left on storage."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import skimage
import torch
from PIL import Image
from safetensors.torch import load_file

from models.options import ModelOptions
from pipeline import config
from pipeline.arguments.common import DONE, MISTAKE, STOPPED
from pipeline.run_storage import RunStorage
from pipeline.tracking.history import read_history
from tests.weights import write_weights

pytestmark = pytest.mark.timeout(900)  # whole jobs, on machines that may be busy

RECIPE = "pipeline/recipes/demo.yaml"
STEPS = 14


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Twelve small crops of real photographs, eight to train on and four held out."""
    folder: Path = tmp_path_factory.mktemp("images")
    source = Path(skimage.__file__).parent / "data"
    for split, name, count in (("train", "chelsea.png", 8), ("val", "coffee.png", 4)):
        photograph = Image.open(source / name).convert("RGB")
        (folder / split).mkdir()
        for number in range(count):
            left, top = 24 * number, 10 * number
            photograph.crop((left, top, left + 96, top + 80)).save(folder / split / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def settings(images, tmp_path_factory) -> list[str]:
    """Overrides that make the demo's recipe small, with one storage for all tests here."""
    return [
        f"storage={os.path.relpath(tmp_path_factory.mktemp('storage'))}",  # as README has it
        "data.source=folder",
        f"data.root={images}",
        "data.name=crops",
        "data.stored_px=72",
        "data.shard_samples=4",
        "train.size_px=64",
        f"train.steps={STEPS}",
        "train.log_every_steps=1",
        "train.save_every_steps=2",
        "train.keep_checkpoints=10",
        "evaluate.samples_while_training=4",
        "tracking.backend=jsonl",
    ]


def pipeline(*arguments: str, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def succeeded(*arguments: str) -> str:
    result = pipeline(*arguments)
    assert result.returncode == DONE, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def left_alone(settings) -> config.Config:
    """An undisturbed run: prepared, trained by Ray Train, evaluated."""
    overrides = [*settings, "name=left-alone"]
    succeeded("run", RECIPE, *overrides)
    return config.load(Path(RECIPE), overrides)


def checkpoints(cfg: config.Config) -> Path:
    return Path(RunStorage.open(cfg).checkpoints.url)


def weights(cfg: config.Config) -> bytes:
    folder = checkpoints(cfg) / f"step-{STEPS:08d}"
    return b"".join(
        (folder / f"{name}.safetensors").read_bytes()
        for name in ("generator", "ema", "discriminator", "optimizer")
    )


def test_the_job_leaves_a_dataset_checkpoints_and_an_evaluation(left_alone):
    assert (Path(RunStorage.open(left_alone).dataset_url) / "dataset.json").exists()
    manifest = json.loads((checkpoints(left_alone) / f"step-{STEPS:08d}/manifest.json").read_text())
    assert manifest["metrics"]["val/psnr_db"] > 5
    assert manifest["validation"]["masks"]["mixture"] == {"corrected": 1, "box": 1}
    assert len(manifest["dataset_digest"]) == 64
    (evaluated,) = (Path(RunStorage.open(left_alone).run_url) / "evaluation").iterdir()
    assert json.loads((evaluated / "metrics.json").read_text())["pictures"] == 4
    with Image.open(evaluated / "samples.png") as sheet:
        assert sheet.width > 300


def test_the_metrics_of_every_step_stay_after_an_evaluation_of_an_earlier_best_one(left_alone):
    curve = read_history(RunStorage.open(left_alone).run).curves["loss/l1_refined"]
    assert curve.steps.tolist() == list(range(1, STEPS + 1))


def test_a_finished_job_does_nothing_again(left_alone, settings):
    before = {path: path.stat().st_mtime_ns for path in Path(left_alone.storage).rglob("*.*")}
    succeeded("train", RECIPE, *settings, "name=left-alone")
    succeeded("evaluate", RECIPE, *settings, "name=left-alone")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_run_stopped_half_way_ends_where_the_undisturbed_one_does(left_alone, settings):
    overrides = [*settings, "name=stopped"]
    cfg = config.load(Path(RECIPE), overrides)
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "train", RECIPE, *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(checkpoints(cfg) / "step-00000002/manifest.json", process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == STOPPED
    succeeded("train", RECIPE, *overrides)
    assert weights(cfg) == weights(left_alone)


def test_a_run_whose_processes_were_all_killed_ends_there_too(left_alone, settings):
    overrides = [*settings, "name=killed", "train.launcher=local"]
    cfg = config.load(Path(RECIPE), overrides)
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "pipeline", "train", RECIPE, *overrides),
    ]
    process = subprocess.Popen(
        torchrun,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wait_for(checkpoints(cfg) / "step-00000002/manifest.json", process)
    # torchrun starts its workers in new sessions, so they are found by their parent.
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        victim.kill()
    process.wait(timeout=60)
    again = subprocess.run(
        torchrun,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert again.returncode == DONE, again.stderr[-4000:]
    assert weights(cfg) == weights(left_alone)
    curve = read_history(RunStorage.open(cfg).run).curves["loss/l1_refined"]
    assert curve.steps.tolist() == list(range(1, STEPS + 1))  # also those before the kill


def test_the_job_runs_on_a_folder_of_faces(photographs, settings):
    overrides = [
        *(*settings, "name=faces", "data.name=faces", f"data.root={photographs / 'faces'}"),
        *("data.subject=face", "data.val_fraction=0.15", "data.shard_samples=16"),
        *("train.launcher=local", "train.engine=deepspeed", "train.steps=2"),
    ]
    cfg = config.load(Path(RECIPE), overrides)
    succeeded("run", RECIPE, *overrides)
    record = json.loads((Path(RunStorage.open(cfg).dataset_url) / "dataset.json").read_text())
    assert record["counts"]["pictures"]["failed"] == 0
    faces = len(list((photographs / "faces").iterdir()))
    assert record["counts"]["sketches"] == {"landmarks68": faces}
    assert (checkpoints(cfg) / "step-00000002/manifest.json").exists()


def test_a_run_starts_from_weights_and_resumes_without_them(left_alone, settings, tmp_path):
    given = tmp_path / "unguided.safetensors"
    unguided = write_weights(given, ModelOptions(guided=False), gain=4.0).state_dict()
    overrides = [
        *(*settings, "name=started", "train.launcher=local"),
        *(f"train.init_from={given}", "train.learning_rate=1e-9"),
    ]
    cfg = config.load(Path(RECIPE), overrides)
    started = pipeline("train", RECIPE, *overrides, "train.steps=1", "train.engine=deepspeed")
    assert started.returncode == DONE, started.stderr[-4000:]
    assert f"generator={given} discriminator=fresh" in started.stderr
    for name in ("generator", "ema"):
        found = load_file(checkpoints(cfg) / f"step-00000001/{name}.safetensors")
        for key, value in unguided.items():
            if key == "coarse.conv01.weight":  # its fourth channel is the sketch's
                found[key] = found[key][:, [0, 1, 2, 4, 5]]
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)
    given.unlink()
    succeeded("train", RECIPE, *overrides, "train.steps=2")


def test_training_without_a_dataset_says_what_to_do(settings):
    result = pipeline("train", RECIPE, *settings, "data.name=nothing")
    assert result.returncode == MISTAKE
    assert "prepare it first" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.attention=renormalised", "has another model (attention differ)"),
        ("train.global_batch=64", "64"),
        (
            "data.stored_px=96 train.size_px=80",
            "stored at 72 pixels, fewer than train.size_px 80",
        ),
        ("name=new train.init_from=nowhere.safetensors", "nowhere.safetensors was not found"),
    ],
)
def test_what_cannot_train_is_refused_before_any_machine_starts(
    left_alone, settings, override, message
):
    more = f"train.steps={STEPS + 1}"
    result = pipeline("train", RECIPE, *settings, "name=left-alone", more, *override.split())
    assert result.returncode == MISTAKE
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while not path.exists():
        assert process.poll() is None, f"ended with {process.returncode} before {path.name} came"
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.05)
