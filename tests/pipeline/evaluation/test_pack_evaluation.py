"""Evaluations on a pack: the same numbers for everybody, kept, replayed, and beside baselines."""

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet

from cluster.storage import Store, join, open_store
from data_prep.images import decode
from data_prep.shards import Dataset
from models.options import ModelOptions
from pipeline import networks
from pipeline.arguments.common import DONE, MISTAKE
from pipeline.checkpoints import CheckpointStore
from pipeline.cli import build_parser, main
from pipeline.evaluation.baselines import BASELINES, Filled, GeneratorFiller
from pipeline.evaluation.metrics import METRICS, measure
from pipeline.evaluation.pack_evaluation import (
    KEPT_IMAGES,
    Contestant,
    StoredEvaluation,
    check_against_stored,
    evaluate_on_pack,
    evaluation_folder,
    sheet_items,
)
from pipeline.evaluation.pack_metrics import PackMetrics
from pipeline.evaluation.packs import MASK_FAMILIES, Pack, PackContent, make_pack
from pipeline.evaluation.published import PublishedValue, beside
from pipeline.evaluation.record import incomparable, read_evaluations
from pipeline.tracking.protocol import NullTracker
from tests.distributed import on_ranks
from tests.pipeline.data.tiny_dataset import shards_of, write_dataset
from tests.pipeline.evaluation.test_feature_metrics import inception, vgg
from tests.weights import write_weights

pytestmark = pytest.mark.slow  # seconds together

GRAY = Contestant("gray", baseline="gray")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    folder = tmp_path_factory.mktemp("packs")
    url = str(folder / "set")
    write_dataset(url, folder / "scratch", shards_of([12], "val"))
    return make_pack(str(folder / "pack"), Dataset.open(url), images=12, size_px=32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "generator.safetensors"
    write_weights(path, ModelOptions(guided=True, width=8), gain=2.0)
    return path


@pytest.fixture
def trained(weights: Path) -> Contestant:
    return Contestant("ours", weights.read_bytes(), step=7)


def evaluated(
    pack: Pack, contestant: Contestant, measured: PackMetrics, store: Store
) -> StoredEvaluation:
    found = evaluate_on_pack(pack, contestant, measured, store)
    assert found is not None  # this is the only rank
    return found


def rows_of(store: Store, folder: str) -> dict[str, list[Any]]:
    table = parquet.read_table(BytesIO(store.get(f"{folder}/rows.parquet")))
    rows: dict[str, list[Any]] = table.to_pydict()
    return rows


def test_values_are_those_of_each_filled_image_and_means_are_those_of_the_table(
    pack: Pack, trained: Contestant, tmp_path: Path
) -> None:
    store = open_store(str(tmp_path))
    found = evaluated(pack, trained, PackMetrics(), store)
    rows = rows_of(store, "evaluation/pack/step-00000007")
    assert rows["key"] == [item.key for item in pack.items]
    assert rows["mask_family"] == [item.mask_family for item in pack.items]
    assert rows["coverage_bin"] == [item.coverage_bin for item in pack.items]
    filler = GeneratorFiller(
        networks.read_generator(trained.weights or b"", ""), torch.device("cpu"), coarse_only=False
    )
    for place, item in enumerate(pack.items):
        content = pack.read(item)
        completed = filler(content).completed
        known = content.mask == 0
        np.testing.assert_allclose(completed[known], content.image[known] / 255, atol=1e-6)
        values = measure(completed, content.image.astype(np.float32) / 255, content.mask)
        for name, value in values.items():
            assert rows[name][place] == pytest.approx(value, abs=1e-6)
    for name in METRICS:
        assert found.metrics[name] == pytest.approx(math.fsum(rows[name]) / 12, rel=1e-12)


def test_the_record_holds_definitions_intervals_groups_digests_and_code(
    pack: Pack, trained: Contestant, tmp_path: Path
) -> None:
    measured = PackMetrics(inception=inception(), vgg=vgg())
    record = evaluated(pack, trained, measured, open_store(str(tmp_path))).record
    assert record["settings"]["pack_digest"] == pack.digest
    assert record["settings"]["weights_sha256"] == trained.weights_sha256
    assert set(record["definitions"]) == set(record["metrics"])
    for definition in record["definitions"].values():
        assert {"region", "range", "resize", "n", "weights_sha256", "better"} <= set(definition)
        assert definition["n"] == 12
    assert record["definitions"]["lpips"]["weights_sha256"] == vgg().sha256
    assert "biased" in record["definitions"]["fid"]["definition"]
    low, high = record["intervals"]["l1_percent"]
    assert low < record["metrics"]["l1_percent"] < high
    assert sum(g["images"] for g in record["groups"]["coverage_bin"].values()) == 12
    assert 0 < record["metrics"]["fid_floor"] < record["metrics"]["fid"]
    assert set(record["environment"]) == {"git_commit", "code_sha256", "device", "packages"}


def test_files_are_kept_for_people_and_for_comparisons(
    pack: Pack, trained: Contestant, tmp_path: Path
) -> None:
    run = open_store(str(tmp_path / "run"))
    evaluated(pack, trained, PackMetrics(), run)
    (evaluation,) = read_evaluations(run)
    assert (evaluation.pack, evaluation.step) == (pack.name, 7)
    assert list(evaluation.values) == list(METRICS)
    assert evaluation.families == [item.mask_family for item in pack.items]
    assert len(pack.items) <= KEPT_IMAGES
    for item in pack.items:
        original = decode(run.get(evaluation.files[f"images/{item.key}.original.png"])).pixels
        np.testing.assert_array_equal(original, pack.read(item).image)
        for layer in ("", ".hole", ".sketch", ".coarse"):
            assert f"images/{item.key}{layer}.png" in evaluation.files
    height = decode(run.get(evaluation.files["samples.png"])).pixels.shape[0]
    assert height > 160 * len(sheet_items(pack))
    evaluated(pack, GRAY, PackMetrics(), open_store(str(tmp_path / "gray")))
    (other,) = read_evaluations(open_store(str(tmp_path / "gray")))
    assert incomparable(evaluation, other) is None


def _on_rank(pack: Pack, contestant: Contestant, url: str) -> dict[str, float | None] | None:
    measured = PackMetrics(inception=inception(), vgg=vgg())
    baseline = evaluate_on_pack(pack, GRAY, measured, open_store(f"{url}-gray"))
    found = evaluate_on_pack(pack, contestant, measured, open_store(url))
    assert (baseline is None) == (found is None)
    return dict(found.metrics) if found else None


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same_numbers(
    pack: Pack, trained: Contestant, tmp_path: Path
) -> None:
    alone = _on_rank(pack, trained, str(tmp_path / "1"))
    first, *others = on_ranks(3, _on_rank, pack, trained, str(tmp_path / "3"))
    assert others == [None, None]
    assert first == pytest.approx(alone, rel=1e-6)
    expected, found = (
        rows_of(open_store(str(tmp_path / ranks)), "evaluation/pack/step-00000007")
        for ranks in ("1", "3")
    )
    for name, column in found.items():
        if name in METRICS:
            np.testing.assert_allclose(column, expected[name], rtol=1e-6)
        else:
            assert column == expected[name]


def test_the_command_line_offers_every_baseline_and_every_family() -> None:
    def choices(words: list[str], flag: str) -> list[str]:
        parser = build_parser()
        for word in words:
            (commands,) = (a for a in parser._actions if isinstance(a.choices, dict))
            parser = commands.choices[word]  # type: ignore[index]
        (action,) = (a for a in parser._actions if flag in a.option_strings)
        return list(action.choices or ())

    assert choices(["evaluate"], "--baseline") == list(BASELINES)
    assert choices(["evalpack", "make"], "--family") == list(MASK_FAMILIES)


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_every_baseline_fills_the_hole_and_nothing_else(
    pack: Pack, weights: Path, name: str
) -> None:
    filler = Contestant(name, weights.read_bytes(), name).filler(torch.device("cpu"))
    for item in pack.items[:4]:
        content = pack.read(item)
        completed = filler(content).completed
        known = content.mask == 0
        np.testing.assert_allclose(completed[known], content.image[known] / 255, atol=1e-6)
        assert np.isfinite(completed).all()


def test_flat_baselines_have_the_color_they_are_named_after(pack: Pack) -> None:
    content = pack.read(pack.items[0])
    inside = content.mask > 0
    gray, mean = (
        Contestant(name, baseline=name).filler(torch.device("cpu"))(content).completed[inside]
        for name in ("gray", "mean-color")
    )
    assert (gray == 0.5).all()
    np.testing.assert_allclose(
        mean, np.broadcast_to(content.image[~inside].mean(axis=0) / 255, mean.shape), atol=1e-6
    )


def test_an_evaluation_is_not_repeated_until_something_changes(
    pack: Pack, trained: Contestant, tmp_path: Path
) -> None:
    store = open_store(str(tmp_path))
    assert not evaluated(pack, trained, PackMetrics(), store).again
    assert evaluated(pack, trained, PackMetrics(), store).again
    with_vgg = evaluated(pack, trained, PackMetrics(vgg=vgg()), store)
    assert not with_vgg.again
    assert "lpips" in with_vgg.metrics


def test_a_check_reproduces_what_is_stored_and_says_what_changed(
    pack: Pack, trained: Contestant, tmp_path: Path
) -> None:
    store, folder = open_store(str(tmp_path)), evaluation_folder(pack, trained)
    with pytest.raises(FileNotFoundError, match="no evaluation to check"):
        check_against_stored(pack, trained, PackMetrics(), store)
    evaluated(pack, trained, PackMetrics(), store)
    assert check_against_stored(pack, trained, PackMetrics(), store) == (True, [])
    record = json.loads(store.get(f"{folder}/metrics.json"))
    record["environment"]["code_sha256"] = "of other code"
    store.put(f"{folder}/metrics.json", json.dumps(record).encode())
    same, lines = check_against_stored(pack, trained, PackMetrics(), store)
    assert same
    assert [line.split(" was ")[0] for line in lines] == ["changed: code_sha256"]
    other = Contestant("ours", baseline="gray", step=7)
    same, lines = check_against_stored(pack, other, PackMetrics(), store)
    assert not same
    assert any(line.startswith("changed: weights_sha256 was ") for line in lines)
    assert any(line.startswith("l1_percent: 12 images differ, class/p") for line in lines)


def test_a_value_that_is_not_a_number_is_counted_and_never_averaged_away(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = pack.items[3].key

    class Broken:
        guided = False

        def __call__(self, content: PackContent) -> Filled:
            completed = content.image.astype(np.float32) / 255
            if np.array_equal(content.image, pack.read(pack.items[3]).image):
                completed[content.mask > 0] = np.nan
            return Filled(completed, None)

    monkeypatch.setattr(Contestant, "filler", lambda self, device: Broken())
    measured, store = PackMetrics(inception=inception(), vgg=vgg()), open_store(str(tmp_path))
    found = evaluated(pack, GRAY, measured, store)
    of_the_images = {name: v for name, v in found.metrics.items() if name != "fid_floor"}
    assert all(value is None for value in of_the_images.values())
    assert found.record["not_finite"] == dict.fromkeys([*METRICS, "lpips"], 1)
    assert all(interval is None for interval in found.record["intervals"].values())
    rows = rows_of(store, evaluation_folder(pack, GRAY))
    where = [key for key, value in zip(rows["key"], rows["psnr_db"], strict=True) if value != value]
    assert where == [broken]
    assert check_against_stored(pack, GRAY, measured, store)[0]


def test_published_values_are_beside_ours_only_where_the_setting_agrees(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def value(size_px: int, images: int | None, family: str | None) -> PublishedValue:
        return PublishedValue(
            "theirs", "l1_percent", 9.1, "table", "tiny", images, size_px, "free-form", family
        )

    monkeypatch.setattr(
        "pipeline.evaluation.published.PUBLISHED",
        [value(32, 2, "box"), value(32, 3, "box"), value(64, 2, "box"), value(32, 2, None)],
    )
    settings = {**pack.settings, "source": "tiny"}
    same = Pack(pack.url, pack.name, pack.digest, 32, settings, pack.families, pack.items)
    rows = list(beside(same, {"l1_percent": 5.0}, {"box": {"images": 2, "l1_percent": 4.0}}))
    assert [row.why_not for row in rows] == [
        "",
        "n=3, not 2",
        "64 px, not 32",
        "other masks (free-form)",
    ]
    assert rows[0].ours == 4.0
    (other, *_) = beside(pack, {"l1_percent": 5.0}, {"box": {"images": 2, "l1_percent": 4.0}})
    assert other.why_not == "images of tiny, not of another source"
    assert not list(beside(pack, {"psnr_db": 20.0}, {}))


@pytest.mark.slow
def test_weights_and_baselines_are_evaluated_into_one_table_and_replayed_by_a_fresh_process(
    pack: Pack, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    command = ["evaluate", str(weights), "--pack", pack.url, "--out", out, "--baseline", "telea"]
    assert main(command) == DONE
    printed = capsys.readouterr().out
    for words in ("generator.safetensors", "telea", "L1 %", "no: images of places2", "table 1"):
        assert words in printed
    assert open_store(out).exists("evaluation/pack/step-00000000/metrics.json")
    telea = join("baselines", "telea", "evaluation/pack/step-00000000/metrics.json")
    assert open_store(out).exists(telea)
    fresh = subprocess.run(
        [sys.executable, "-m", "pipeline", *command, "--check"],
        capture_output=True,
        text=True,
    )
    assert fresh.returncode == DONE, fresh.stderr
    assert fresh.stdout.splitlines() == [
        "generator.safetensors: reproduced",
        "telea: reproduced",
    ]
    record = json.loads(open_store(out).get(telea))
    record["metrics"]["l1_percent"] += 1e-3
    open_store(out).put(telea, json.dumps(record).encode())
    assert main([*command, "--check"]) == MISTAKE
    assert "telea: NOT reproduced" in capsys.readouterr().out


def test_a_recipe_is_evaluated_at_its_best_checkpoint_into_its_run_also_on_s3(
    pack: Pack,
    weights: Path,
    tmp_path: Path,
    s3_url: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logged: dict[str, float] = {}

    class Recording(NullTracker):
        def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
            assert step == 20
            logged.update(values)

    monkeypatch.setattr("pipeline.commands.evaluate.open_run_tracker", lambda *_: Recording())
    copied = open_store(join(s3_url, "packs", "frozen"))
    for key in pack.store.list_keys():
        copied.put(key, pack.store.get(key))
    write_dataset(join(s3_url, "datasets", "tiny"), tmp_path / "scratch", shards_of([2], "val"))
    checkpoints = CheckpointStore(open_store(join(s3_url, "runs", "toy", "checkpoints")))
    for step, l1 in ((10, 4.0), (20, 3.0), (30, 5.0)):
        files = {"ema.safetensors": weights.read_bytes()}
        checkpoints.save(step, files, manifest={"metrics": {"val/l1_percent": l1}})
    checkpoints.close()
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(
        f"{{name: toy, storage: '{s3_url}', data: {{name: tiny, source: folder, root: x}}, "
        "train: {steps: 30}, tracking: {backend: none}}"
    )
    assert main(["evaluate", str(recipe), "--pack", copied.url, "--baseline", "coarse"]) == DONE
    run = open_store(join(s3_url, "runs", "toy"))
    (evaluation,) = read_evaluations(run)
    assert (evaluation.pack, evaluation.step) == (pack.name, 20)
    assert run.exists("baselines/coarse/evaluation/pack/step-00000020/metrics.json")
    assert logged["evaluation/pack/l1_percent"] == pytest.approx(evaluation.mean("l1_percent"))
    assert "coarse" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--pack", "{pack}"], "give --out FOLDER"),
        (["--pack", "{pack}", "--out", "x"], "nothing to evaluate"),
        (["w.safetensors", "a=b", "--pack", "{pack}", "--out", "x"], "settings belong to a recipe"),
        (["--pack", "{pack}", "--out", "x", "--baseline", "coarse"], "'coarse' is a part of weig"),
        (["--pack", "/nowhere", "--out", "x", "--baseline", "gray"], "no finished evaluation pack"),
        (["--baseline", "gray"], "--baseline goes with --pack"),
        ([], "give a recipe, or --pack"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(
    pack: Pack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word.format(pack=pack.url) for word in arguments]
    assert main(["evaluate", *words]) == MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
