"""A comparison says which run is better, where, and claims nothing that is not there."""

import math
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from cluster.storage import join
from pipeline.evaluation.comparison import Comparison, compare
from pipeline.evaluation.record import EvaluationRecord, read_evaluations
from pipeline.evaluation.run_record import RunRecord, UnknownRunError, find_runs, read_runs
from pipeline.tracking.history import History
from tests.pipeline.evaluation.runs import (
    SETTINGS,
    config,
    image_table,
    quality,
    write_evaluation,
    write_run,
)

TABLE = image_table(150)


def read(storage: Path, *names: str) -> list[RunRecord]:
    return read_runs(find_runs(names, storage=str(storage), tracking_uri=None))


def run_of(
    name: str, values: dict[str, np.ndarray], table: dict[str, Any] = TABLE, **settings: Any
) -> RunRecord:
    """A run in memory."""
    record = EvaluationRecord(
        folder="evaluation/step-20",
        pack="held-out",
        step=20,
        settings={"step": 20, **SETTINGS},
        definitions={},
        keys=table["key"],
        hole_percent=table["hole_percent"],
        families=table["mask_family"],
        values=values,
        files={},
    )
    flat = {"name": name, "seed": 0, "model.convolution": "gated", **settings}
    return RunRecord(name, f"/runs/{name}", flat, "d", "c0ffee", 20, History({}, []), [record])


def groups_without_a_difference(
    rng: np.random.Generator, seeds: int, luck: float
) -> list[RunRecord]:
    """Two recipes whose seeds scatter alike, and which suit some images better than others."""
    runs = []
    for recipe in ("gated", "vanilla"):
        suits = TABLE["difficulty"] * (rng.lognormal(0, 0.2, 150) - math.exp(0.02))
        table = TABLE | {"difficulty": np.maximum(TABLE["difficulty"] + suits, 0.5)}
        for number in range(seeds):
            values = quality(table, rng, shift=rng.normal(0, luck))
            values["l1_percent"] = np.maximum(values["l1_percent"], 0.1)
            runs.append(run_of(f"{recipe}-{number}", values, seed=number, recipe=recipe))
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "luck"), [(1, 0.0), (2, 0.5), (3, 0.2)])
def test_at_most_5_in_100_verdicts_claim_a_difference_that_is_not_there(
    seeds: int, luck: float
) -> None:
    rng = np.random.default_rng(seeds)
    verdicts = [
        compare(groups_without_a_difference(rng, seeds, luck)).verdicts[0] for _ in range(150)
    ]
    false = sum(verdict.outcome != "none" for verdict in verdicts)
    # Of honest 5 %, 12 or fewer of 150 in 95 of 100 trials.
    assert false <= 12
    assert all(verdict.text.startswith("No difference found") for verdict in verdicts) == (
        not false
    )


def test_a_planted_degradation_is_found_and_named() -> None:
    rng = np.random.default_rng(0)
    good, bad = quality(TABLE, rng), quality(TABLE, rng, shift=0.8)
    (verdict,) = compare([run_of("old", good), run_of("new", bad, recipe="x")]).verdicts
    assert verdict.outcome == "worse"
    assert verdict.text.startswith("new worse than old over all images by L1 0.")
    assert "n=150" in verdict.text
    assert "these weights, not of the settings" in verdict.scope


def test_a_degradation_of_a_recipe_is_found_over_three_seeds() -> None:
    rng = np.random.default_rng(0)
    runs = [
        run_of(f"{recipe}-s{number}", quality(TABLE, rng, shift=shift), seed=number, recipe=recipe)
        for recipe, shift in (("old", 0.0), ("new", 1.5))
        for number in range(3)
    ]
    comparison = compare(runs)
    assert [group.described for group in comparison.groups] == ["old (3 seeds)", "new (3 seeds)"]
    (verdict,) = comparison.verdicts
    assert verdict.outcome == "worse"
    assert verdict.scope.startswith("This speaks of the settings: 3 and 3 seeds")


def test_a_difference_on_one_kind_of_holes_alone_is_claimed_there_alone() -> None:
    rng = np.random.default_rng(3)
    first = quality(TABLE, rng, noise=0.05)
    second = {name: values + rng.normal(0, 0.01, 150) for name, values in first.items()}
    thick = np.array(TABLE["mask_family"]) == "thick"
    second["psnr_db"] = second["psnr_db"] + np.where(thick, rng.normal(0.4, 0.1, 150), 0)
    comparison = compare([run_of("A", first), run_of("B", second, recipe="x")])
    families = [f for f in comparison.findings if f.kind == "family" and f.claimed]
    assert [(f.metric.name, f.part) for f in families] == [("psnr_db", "thick")]
    (verdict,) = comparison.verdicts
    assert "B better than A" in verdict.text
    assert "on thick holes by PSNR 0.41 dB [0.39, 0.44], n=50" in verdict.text
    assert verdict.text.endswith("no difference found elsewhere.")


def test_the_primary_metric_is_the_one_declared() -> None:
    rng = np.random.default_rng(0)
    runs = [run_of("A", quality(TABLE, rng)), run_of("B", quality(TABLE, rng), recipe="x")]
    assert "SSIM" in compare(runs, primary="ssim").verdicts[0].text
    with pytest.raises(ValueError, match="fid was not measured: give one of l1_percent"):
        compare(runs, primary="fid")


def test_a_metric_without_a_better_side_is_said_to_differ() -> None:
    rng = np.random.default_rng(0)
    sharp = [{"sharpness": rng.normal(mean, 1, 150)} for mean in (5, 9)]
    runs = [run_of(name, each, recipe=name) for name, each in zip("AB", sharp, strict=True)]
    (verdict,) = compare(runs, primary="sharpness").verdicts
    assert verdict.outcome == "mixed"
    assert verdict.text.startswith("B different from A over all images by sharpness ")


def test_a_value_that_is_no_number_is_named_and_never_averaged_away() -> None:
    rng = np.random.default_rng(0)
    values = [quality(TABLE, rng) for _ in range(3)]
    values[1]["l1_percent"][[4, 7]] = [math.nan, math.inf]
    comparison = compare(
        [run_of(name, each, recipe=name) for name, each in zip("ABC", values, strict=True)]
    )
    (left_out,) = comparison.apart
    assert left_out.label == "B: l1_percent"
    assert "2 of 150 images (class/image_0004, class/image_0007)" in left_out.reason
    asked = {(finding.group, finding.metric.name) for finding in comparison.findings}
    assert ("B", "l1_percent") not in asked
    assert {("B", "ssim"), ("C", "l1_percent")} <= asked
    assert [verdict.outcome for verdict in comparison.verdicts] == ["unknown", "none"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size_px": 128}, "another crop size (size_px: 128, not 64)"),
        ({"dataset_digest": "e" * 64}, "another dataset"),
        ({"masks": {"mixture": {"brush": 1}}}, "masks of other settings"),
        ({"seed": 1}, "masks drawn from another seed (seed: 1, not 0)"),
        ({"pack_digest": "abc"}, "another pack"),
    ],
)
def test_runs_measured_otherwise_are_set_apart_with_the_reason(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    rng = np.random.default_rng(0)
    for name, settings in (("A", {}), ("B", change), ("C", {})):
        write_evaluation(
            write_run(str(tmp_path), name, settings=config(train__l1_weight=ord(name))),
            TABLE,
            quality(TABLE, rng),
            settings=settings,
        )
    comparison = compare(read(tmp_path, "A", "B", "C"))
    (apart,) = comparison.apart
    assert (apart.label, apart.reason.startswith(reason)) == ("B", True)
    assert [group.label for group in comparison.groups] == ["A", "C"]


def test_other_definitions_holes_and_images_are_set_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    other_holes = TABLE | {"hole_percent": TABLE["hole_percent"] + 1}
    other_images = TABLE | {"key": [f"other/{number}" for number in range(150)]}
    defined = {"psnr_db": {"region": "image", "better": "higher", "unit": "dB"}}
    for name, table, definitions in (
        ("A", TABLE, defined),
        ("B", TABLE, {"psnr_db": {**defined["psnr_db"], "region": "hole"}}),
        ("C", other_holes, None),
        ("D", other_images, None),
    ):
        run = write_run(str(tmp_path), name)
        write_evaluation(run, table, quality(TABLE, rng), definitions=definitions)
    write_run(str(tmp_path), "E")
    reasons = {a.label: a.reason for a in compare(read(tmp_path, *"ABCDE")).apart}
    assert reasons["B"] == "another definition of psnr_db than A"
    assert reasons["C"] == "other holes in 150 of 150 images than A"
    assert reasons["D"] == "no image in common than A"
    assert reasons["E"].startswith("no evaluation")


def test_runs_with_some_images_in_common_are_compared_on_those(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = quality(TABLE, rng)
    part = {name: column[:60] for name, column in TABLE.items()}
    write_evaluation(write_run(str(tmp_path), "A"), TABLE, values)
    shuffled = {name: column[59::-1] for name, column in values.items()}
    run = write_run(str(tmp_path), "B", settings=config(train__l1_weight=2.0))
    write_evaluation(run, {name: column[::-1] for name, column in part.items()}, shuffled)
    comparison = compare(read(tmp_path, "A", "B"))
    assert comparison.images == TABLE["key"][:60]
    assert {f.estimate.difference for f in comparison.findings} == {0.0}


def test_the_newest_step_of_the_pack_that_most_have_is_taken(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in "AB":
        run = write_run(str(tmp_path), name, settings=config(train__l1_weight=ord(name)))
        write_evaluation(run, TABLE, quality(TABLE, rng))
        for step in (10, 20):
            write_evaluation(
                run,
                TABLE,
                quality(TABLE, rng),
                step=step,
                folder=f"evaluation/scenes/step-{step:08d}",
                settings={"pack_digest": "0123456789", "seed": name},
            )
    runs = read(tmp_path, "A", "B")
    comparison = compare(runs)
    assert comparison.pack == "scenes"
    assert [g.records[0].step for g in comparison.groups] == [20, 20]
    assert compare(runs, pack="012345").pack == "scenes"
    assert compare(runs, pack="s3://bucket/packs/scenes").pack == "scenes"
    assert compare(runs, pack="held-out").pack == "held-out"
    assert len(compare(runs, pack="faces").apart) == 2


def test_parquet_is_read_where_it_is(tmp_path: Path) -> None:
    run = write_run(str(tmp_path), "A")
    values = quality(TABLE, np.random.default_rng(0))
    write_evaluation(run, TABLE, values)
    (from_csv,) = read_evaluations(run)
    columns = {name: TABLE[name] for name in ("key", "hole_percent", "mask_family")} | values
    data = BytesIO()
    parquet.write_table(pyarrow.table(columns), data)
    run.put("evaluation/step-00000020/rows.parquet", data.getvalue())
    run.delete("evaluation/step-00000020/rows.csv")
    (from_parquet,) = read_evaluations(run)
    assert (from_csv.keys, from_csv.families) == (from_parquet.keys, from_parquet.families)
    np.testing.assert_allclose(from_csv.values["ssim"], from_parquet.values["ssim"])


@pytest.mark.parametrize(
    "damage",
    [("metrics.json", b"{"), ("metrics.json", b"[]"), ("rows.csv", b""), ("rows.csv", b"key\nx\n")],
)
def test_a_damaged_evaluation_is_passed_over(tmp_path: Path, damage: tuple[str, bytes]) -> None:
    run = write_run(str(tmp_path), "A")
    for step in (10, 20):
        write_evaluation(run, TABLE, quality(TABLE, np.random.default_rng(0)), step=step)
    run.put(f"evaluation/step-00000020/{damage[0]}", damage[1])
    assert [record.step for record in read_evaluations(run)] == [10]


def grouped(*runs: RunRecord, **options: Any) -> list[list[str]]:
    groups = compare([*runs], **options).groups
    return [[run.label for run in group.runs] for group in groups]


def test_runs_of_one_recipe_form_a_group_where_their_seeds_differ() -> None:
    values = quality(TABLE, np.random.default_rng(0))
    first, second = run_of("a", values, seed=0), run_of("b", values, seed=1)
    other = run_of("c", values, recipe="x")
    assert grouped(first, second, other) == [["a", "b"], ["c"]]
    assert grouped(first, second, other, separate=True) == [["a"], ["b"], ["c"]]
    elsewhere = {"train.loader_threads": 9, "train.device": "cuda", "tracking.uri": "x", "seed": 2}
    moved = replace(first, label="d", config={**first.config, **elsewhere})
    assert grouped(first, second, moved) == [["a", "b", "d"]]


def test_equal_seeds_are_no_repetition_so_the_code_is_what_differs() -> None:
    values = quality(TABLE, np.random.default_rng(0))
    runs = [
        replace(run_of(f"{commit}{seed}", values, seed=seed), git_commit=commit)
        for commit in ("old", "new")
        for seed in (0, 1)
    ]
    assert grouped(*runs) == [["old0", "old1"], ["new0", "new1"]]
    again = run_of("again", values)
    assert grouped(run_of("once", values), again) == [["once"], ["again"]]


def test_what_differs_is_listed_and_what_is_equal_is_not(tmp_path: Path) -> None:
    write_run(str(tmp_path), "A")
    write_run(
        str(tmp_path), "B", settings=config(model__convolution="partial", seed=5), commit="beef"
    )
    comparison: Comparison = compare(read(tmp_path, "A", "B"))
    assert comparison.settings == {
        "model.convolution": ["gated", "partial"],
        "seed": [0, 5],
        "git commit": ["c0ffee", "beef"],
    }


def test_runs_are_found_by_name_pattern_url_and_id_without_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    storage = str(tmp_path)
    for name in ("gated", "gated-2", "vanilla"):
        write_run(storage, name)

    def find(*words: str, at: str | None = storage) -> list[str]:
        urls = find_runs(words, storage=at, tracking_uri=None)
        return [url.removeprefix(join(storage, "runs")) for url in urls]

    assert find("vanilla", "gated") == ["/vanilla", "/gated"]
    assert find("gated*", "gated") == ["/gated", "/gated-2"]
    assert find(join(storage, "runs", "gated") + "/", at=None) == ["/gated"]
    run_id = read(tmp_path, "vanilla")[0]
    manifest = f"{abs(hash('vanilla')):032x}"[:32]
    assert find(manifest) == [run_id.url.removeprefix(join(storage, "runs"))]
    with pytest.raises(UnknownRunError, match="did you mean gated"):
        find("gatde")
    with pytest.raises(UnknownRunError, match="give --storage"):
        find("gated", at=None)
    with pytest.raises(UnknownRunError, match="holds no run"):
        find(storage)
    with pytest.raises(UnknownRunError, match="matches x\\*"):
        find("x*")
