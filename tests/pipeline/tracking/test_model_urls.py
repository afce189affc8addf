"""Weights by the names that MLflow gives them: runs, registered models, logged models."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cluster.storage import join, open_store
from models.options import ModelOptions
from pipeline.checkpoints import CheckpointStore
from pipeline.cli import main
from pipeline.evaluation.run_record import find_runs
from pipeline.networks import load_generator
from pipeline.tracking import RunInfo
from pipeline.tracking.mlflow import MlflowRun
from pipeline.tracking.model_urls import WEIGHTS_URL, storage_url
from tests.weights import write_weights

pytestmark = pytest.mark.slow  # MLflow's import and its database


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, empty_database: bytes
) -> Iterator[tuple[str, str, MlflowClient]]:
    """A run with two checkpoints, which MLflow knows: its folder, its id, MLflow's client."""
    folder = tmp_path_factory.mktemp("models")
    uri, url = f"sqlite:///{folder}/mlflow.db", f"{folder}/runs/one"
    (folder / "mlflow.db").write_bytes(empty_database)
    write_weights(folder / "ema.safetensors", ModelOptions(guided=False))
    weights = (folder / "ema.safetensors").read_bytes()
    checkpoints = CheckpointStore(open_store(join(url, "checkpoints")))
    for step, l1 in ((10, 0.2), (20, 0.4)):
        metrics = {"val/l1_percent": l1}
        checkpoints.save(step, {"ema.safetensors": weights}, manifest={"metrics": metrics})
    checkpoints.close()
    run = MlflowRun(
        RunInfo("one", url, dataset_name="bundled", dataset_digest="0" * 36), uri, "tests"
    )
    run.connect()
    best = join(url, "checkpoints", "step-00000010")
    event = {"step": 10, "url": best, "values": {"val/l1_percent": 0.2}, "ms": 1}
    run.receive([{"kind": "checkpoint", **event}])
    client = MlflowClient(uri)
    client.create_registered_model("inpainting")
    version = client.create_model_version(
        "inpainting", source=best, run_id=run.id, tags={WEIGHTS_URL: best}
    )
    client.set_registered_model_alias("inpainting", "champion", version.version)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        yield url, str(run.id), client


def test_every_address_of_mlflow_leads_to_storage(world: tuple[str, str, MlflowClient]) -> None:
    url, run_id, client = world
    best = f"{url}/checkpoints/step-00000010"
    assert storage_url(f"runs:/{run_id}") == url
    newest = "checkpoints/step-00000020"
    assert storage_url(f"runs:/{run_id}/{newest}") == f"{url}/{newest}"
    assert storage_url("models:/inpainting@champion") == best
    assert storage_url("models:/inpainting/1") == best
    experiment = client.get_run(run_id).info.experiment_id
    (model,) = client.search_logged_models([experiment])
    assert storage_url(f"models:/{model.model_id}") == best


def test_commands_take_the_addresses_of_mlflow(
    world: tuple[str, str, MlflowClient], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, run_id, _ = world
    assert load_generator("models:/inpainting@champion").guided is False
    assert load_generator(f"runs:/{run_id}").guided is False
    assert find_runs([f"runs:/{run_id}"], storage=None, tracking_uri=None) == [url]
    assert main(["checkpoints", "ls", f"runs:/{run_id}", "--json"]) == 0
    assert '"step": 20' in capsys.readouterr().out
    assert main(["checkpoints", "verify", "models:/inpainting/1"]) == 0
    assert "step 10" in capsys.readouterr().out
    out = str(tmp_path / "pulled")
    assert main(["checkpoints", "pull", f"runs:/{run_id}", "--step", "best", "--out", out]) == 0
    assert "step 10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("address", "part"),
    [
        ("runs:/0123456789abcdef0123456789abcdef", "give the URL on storage"),
        ("models:/inpainting@missing", "give the URL on storage"),
        ("models:/inpainting", "MLflow's addresses are runs:/ID"),
    ],
)
def test_an_address_that_mlflow_does_not_know_is_one_clear_line(
    world: tuple[str, str, MlflowClient], address: str, part: str
) -> None:
    with pytest.raises(ValueError, match=part) as caught:
        storage_url(address)
    assert "\n" not in str(caught.value)


def test_with_mlflow_away_a_command_ends_in_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    assert main(["checkpoints", "ls", "models:/inpainting@champion"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "give the URL on storage" in line
    assert "secret" not in line
