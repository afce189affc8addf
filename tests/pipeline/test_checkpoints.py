"""Checkpoints: finished or invisible, intact, finite, kept by number and by merit."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save as save_tensors

from cluster.storage import StorageRefusedError, Store, join, open_store, records
from cluster.storage.s3 import S3Store
from pipeline.checkpoints import (
    CheckpointChoice,
    CheckpointError,
    CheckpointStore,
    MetricMode,
    background_saves,
)
from pipeline.checkpoints import pull as pulling
from pipeline.checkpoints.manifest import MANIFEST
from pipeline.checkpoints.pull import pull
from pipeline.checkpoints.urls import choose_checkpoint, find_checkpoints, list_checkpoints

FILES = {"weights.bin": b"G" * 1000, "state.json": b"{}", "empty.bin": b""}
BEST: tuple[str, MetricMode] = ("val/l1", "min")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "REREAD_PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(background_saves, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def run(store: Store) -> Store:
    """The store of one run's checkpoints."""
    return open_store(join(store.url, "runs/one/checkpoints"))


@pytest.fixture
def checkpoints(run: Store) -> Iterator[CheckpointStore]:
    checkpoints = CheckpointStore(run)
    yield checkpoints
    checkpoints.close()


def save(
    checkpoints: CheckpointStore,
    step: int,
    l1: float = 0.5,
    other: Mapping[str, bytes] | None = None,
) -> None:
    files = FILES | dict(other or {})
    checkpoints.save(step, files, manifest={"metrics": {"val/l1": l1}})
    checkpoints.wait()


def test_a_checkpoint_comes_back_as_it_was_saved(checkpoints: CheckpointStore, run: Store) -> None:
    save(checkpoints, 12000)
    assert checkpoints.newest() == 12000
    assert checkpoints.load(12000) == FILES
    assert checkpoints.read(12000, "state.json") == b"{}"
    assert checkpoints.verify(12000) == []
    manifest = json.loads(run.get("step-00012000/manifest.json"))
    assert manifest["step"] == 12000
    assert manifest["metrics"] == {"val/l1": 0.5}
    assert manifest["files"]["weights.bin"]["bytes"] == 1000
    assert len(manifest["files"]["weights.bin"]["sha256"]) == 64


def test_nothing_saved_is_nothing_found(checkpoints: CheckpointStore) -> None:
    assert checkpoints.steps() == []
    assert checkpoints.newest() is None
    assert checkpoints.best(*BEST) is None
    assert checkpoints.load_newest() is None


def tensors(value: float) -> bytes:
    """A safetensors file whose second tensor holds ``value`` once."""
    named = {"first": np.ones(8, np.float32), "second": np.zeros(8, np.float32)}
    named["second"][5] = value
    return save_tensors(named)


def write_as_version_0_1(
    run: Store, step: int, files: Mapping[str, bytes], l1: float, **more: float
) -> None:
    """A checkpoint as code wrote it that did not look at its values."""
    digests = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    metrics = {"val/l1": l1} | {f"val/{name}": value for name, value in more.items()}
    manifest = {"step": step, "metrics": metrics, "files": digests}
    for name, data in {**files, "manifest.json": json.dumps(manifest).encode()}.items():
        run.put(f"step-{step:08d}/{name}", data)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_tensor_that_is_not_finite_is_never_committed(
    checkpoints: CheckpointStore, value: float
) -> None:
    save(checkpoints, 10, other={"ema.safetensors": tensors(1.0)})
    with pytest.raises(
        CheckpointError, match=r"step 20 .* second in ema.safetensors is not finite"
    ):
        save(checkpoints, 20, other={"ema.safetensors": tensors(value)})
    assert checkpoints.steps() == [10]
    assert checkpoints.load_newest() is not None


def test_a_metric_that_is_not_finite_is_never_committed(checkpoints: CheckpointStore) -> None:
    with pytest.raises(CheckpointError, match=r"step 10 .* its metric val/l1 is nan"):
        save(checkpoints, 10, math.nan)
    assert checkpoints.steps() == []


def test_a_checkpoint_that_is_not_finite_counts_as_damaged(
    checkpoints: CheckpointStore, run: Store
) -> None:
    healthy = {"ema.safetensors": tensors(1.0)}
    write_as_version_0_1(run, 10, healthy, 0.5)
    write_as_version_0_1(run, 20, {"ema.safetensors": tensors(math.nan)}, 0.4)
    write_as_version_0_1(run, 30, healthy, math.nan)
    assert checkpoints.load_newest() == (10, healthy)
    assert [len(checkpoints.verify(step)) for step in (10, 20, 30)] == [0, 1, 1]
    assert checkpoints.fault(10) is None
    assert checkpoints.fault(30) == "its metric val/l1 is nan"


def test_a_checkpoint_with_a_metric_that_is_not_finite_is_best_by_no_other(run: Store) -> None:
    for step, l1, psnr in ((10, 0.5, 20.0), (20, math.nan, 100.0), (30, 0.6, 18.0)):
        write_as_version_0_1(run, step, {"ema.safetensors": tensors(1.0)}, l1, psnr=psnr)
    checkpoints = CheckpointStore(run, keep=1, best=("val/psnr", "max"))
    assert checkpoints.best("val/psnr", "max") == 10
    assert checkpoints.prune() == [20]


def test_pruning_keeps_the_newest_healthy_checkpoint(run: Store) -> None:
    for step in (10, 20):
        write_as_version_0_1(run, step, {"ema.safetensors": tensors(1.0)}, 0.5)
    for step in (30, 40, 50):
        write_as_version_0_1(run, step, {"ema.safetensors": tensors(math.nan)}, math.nan)
    assert CheckpointStore(run, keep=1).prune() == [10, 30, 40]


def test_pruning_keeps_all_where_none_is_healthy(run: Store) -> None:
    for step in (10, 20, 30):
        write_as_version_0_1(run, step, {"ema.safetensors": tensors(math.nan)}, 0.5)
    assert CheckpointStore(run, keep=1).prune() == []


class Killed(BaseException):
    """What stands for kill -9 at a write: nothing after it happens."""


def fail_on(number: int, real: Callable[..., None]) -> tuple[Callable[..., None], list[str]]:
    """``real``, until its call ``number`` (from 0), which never happens, nor do later ones."""
    done: list[str] = []
    lock = threading.Lock()

    def failing(key: str, *data: bytes) -> None:
        with lock:
            if len(done) >= number:
                raise Killed(key)
            done.append(key)
        real(key, *data)

    return failing, done


@pytest.mark.parametrize("number", range(len(FILES) + 1))
def test_a_save_killed_at_any_write_leaves_the_one_before_newest(
    run: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = CheckpointStore(run)
    save(before, 10)
    failing, done = fail_on(number, run.put)
    with monkeypatch.context() as patch:
        patch.setattr(run, "put", failing)
        with pytest.raises(Killed):
            save(before, 20, 0.1, {"weights.bin": b"other"})
    assert len(done) == number
    assert before.steps() == [10]

    after = CheckpointStore(run)  # the process that comes next
    assert after.newest() == 10
    assert after.load_newest() == (10, FILES)
    save(after, 20)
    assert after.steps() == [10, 20]
    assert after.verify(20) == []


@pytest.mark.parametrize("number", range(len(FILES) + 1))
def test_a_deletion_killed_at_any_point_leaves_no_half_checkpoint(
    run: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = CheckpointStore(run)
    save(before, 10)
    save(before, 20)
    failing, _ = fail_on(number, run.delete)
    with monkeypatch.context() as patch:
        patch.setattr(run, "delete", failing)
        with pytest.raises(Killed):
            before.delete(10)
    after = CheckpointStore(run)
    for step in after.steps():
        assert after.verify(step) == []
    assert after.steps() == ([10, 20] if number == 0 else [20])
    save(after, 30)  # takes the leftovers away
    if number:
        assert not run.list_keys("step-00000010/")


def test_a_save_again_of_a_step_replaces_it_whole(checkpoints: CheckpointStore, run: Store) -> None:
    save(checkpoints, 10, other={"gone.bin": b"1"})
    save(checkpoints, 10, other={"state.json": b"new"})
    assert checkpoints.load(10) == FILES | {"state.json": b"new"}
    assert not run.exists("step-00000010/gone.bin")


def test_saving_runs_in_the_background_and_its_error_comes_up_at_the_next_save(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, go_on, real = CheckpointStore(run), threading.Event(), run.put

    def slow(key: str, data: bytes) -> None:
        assert go_on.wait(10)
        if key.startswith("step-00000020"):
            raise StorageRefusedError("access denied")
        real(key, data)

    monkeypatch.setattr(run, "put", slow)
    checkpoints.save(10, FILES, manifest={})  # comes back although nothing can be written yet
    assert checkpoints.steps() == []
    go_on.set()
    checkpoints.save(20, FILES, manifest={})  # waits for the first one
    assert checkpoints.steps() == [10]
    with pytest.raises(CheckpointError, match=r"step 20 could not .* step 10 is safe: access"):
        checkpoints.save(30, FILES, manifest={})
    checkpoints.save(40, FILES, manifest={})
    checkpoints.close()
    assert checkpoints.steps() == [10, 40]


def test_closing_raises_what_the_last_save_raised(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = CheckpointStore(run)
    monkeypatch.setattr(run, "put", fail_on(0, run.put)[0])
    checkpoints.save(10, FILES, manifest={})
    with pytest.raises(Killed):
        checkpoints.close()


def test_the_newest_and_the_best_stay(run: Store) -> None:
    checkpoints = CheckpointStore(run, keep=2, best=BEST)
    for step, l1 in [(10, 0.4), (20, 0.1), (30, 0.3), (40, 0.15), (50, 0.35)]:
        save(checkpoints, step, l1)
    assert checkpoints.steps() == [20, 40, 50]
    assert checkpoints.best(*BEST) == 20
    assert checkpoints.best("val/l1", "max") == 50  # of those that stayed
    assert checkpoints.best("val/unknown", "min") is None
    assert {key.partition("/")[0] for key in run.list_keys()} == {
        "step-00000020",
        "step-00000040",
        "step-00000050",
    }


def test_the_best_k_stay_by_their_metric_and_direction(run: Store) -> None:
    checkpoints = CheckpointStore(run, keep=1, best=("val/l1", "max"), keep_best=2, every=30)
    for step, l1 in [(10, 0.4), (20, 0.1), (30, 0.2), (40, 0.5), (50, 0.3)]:
        save(checkpoints, step, l1)
    assert checkpoints.steps() == [10, 30, 40, 50]
    assert checkpoints.plan_pruning().kept == {
        10: "best 2 val/l1",
        30: "every 30 steps",
        40: "best 2 val/l1",
        50: "newest, newest healthy",
    }


def test_a_writer_that_lost_the_run_deletes_nothing(run: Store) -> None:
    save(CheckpointStore(run), 10)

    def refuse() -> None:
        raise CheckpointError("taken over")

    late = CheckpointStore(run, before_commit=refuse)
    with pytest.raises(CheckpointError, match="taken over"):
        save(late, 10)
    assert CheckpointStore(run).load(10) == FILES


def test_pruning_takes_what_a_killed_writer_left_once_nobody_writes(run: Store) -> None:
    checkpoints = CheckpointStore(run)
    save(checkpoints, 20)
    run.put("step-00000030/weights.bin", b"cut short")
    run.put("step-00000040/manifest.set-aside.json", b"{}")
    assert checkpoints.prune() == []
    assert checkpoints.prune(being_written=False) == [30]
    assert checkpoints.plan_pruning(being_written=False).kept == {
        20: "newest 3, newest healthy",
        40: "set aside: it could not be read when the run resumed",
    }


def test_checkpoints_that_were_validated_in_another_way_do_not_compete(run: Store) -> None:
    checkpoints = CheckpointStore(run, keep=1, best=BEST)
    for step, l1, masks in [(10, 0.1, "a"), (20, 0.2, "a"), (30, 0.4, "b"), (40, 0.5, "b")]:
        manifest = {"metrics": {"val/l1": l1}, "validation": {"masks": masks}}
        checkpoints.save(step, FILES, manifest=manifest)
    checkpoints.close()
    assert checkpoints.steps() == [10, 30, 40]  # the best of each, and the newest
    assert checkpoints.best(*BEST) == 30


def test_of_equals_the_later_one_is_best(checkpoints: CheckpointStore) -> None:
    save(checkpoints, 10)
    save(checkpoints, 20)
    assert checkpoints.best(*BEST) == 20


def test_pruning_leaves_what_is_being_written_now(checkpoints: CheckpointStore, run: Store) -> None:
    save(checkpoints, 20)
    run.put("step-00000010/weights.bin", b"left behind")
    run.put("step-00000030/weights.bin", b"on its way")
    assert checkpoints.prune() == [10]
    assert run.list_keys("step-00000010/") == []
    assert run.list_keys("step-00000030/") != []


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (b"X" * 1000, "its sha256 differs"),
        (b"G" * 999, "999 of 1000 bytes"),
        (None, "it is missing"),
    ],
)
def test_a_damaged_file_is_named_and_skipped(
    checkpoints: CheckpointStore, run: Store, tmp_path: Path, damage: bytes | None, reason: str
) -> None:
    save(checkpoints, 10)
    save(checkpoints, 20)
    key = "step-00000020/weights.bin"
    if damage is None:
        run.delete(key)
    else:
        run.put(key, damage)
    (fault,) = checkpoints.verify(20)
    assert fault.startswith(f"{run.url}/{key} is damaged: {reason}")
    assert checkpoints.verify(10) == []
    for use in (checkpoints.load, lambda step: pull(checkpoints, step, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"step-00000020/weights.bin"):
            use(20)
    assert not (tmp_path / "out").exists()
    assert checkpoints.load_newest() == (10, FILES)
    save(checkpoints, 15)  # the run resumed from 10
    assert checkpoints.steps() == [10, 15]


def test_a_damaged_manifest_is_named(checkpoints: CheckpointStore, run: Store) -> None:
    save(checkpoints, 10)
    save(checkpoints, 20)
    run.put("step-00000020/manifest.json", b'{"files": {"generator')
    assert checkpoints.best(*BEST) == 10
    assert checkpoints.load_newest() == (10, FILES)
    (fault,) = checkpoints.verify(20)
    assert "step-00000020/manifest.json is damaged" in fault
    assert [found.step for found in list_checkpoints(run.url)] == [10]


def test_a_file_that_the_manifest_does_not_know_is_named(
    checkpoints: CheckpointStore, run: Store
) -> None:
    save(checkpoints, 10)
    run.put("step-00000010/stranger", b"")
    assert checkpoints.verify(10) == [f"{run.url}/step-00000010/stranger is not in the manifest"]


def test_damaged_checkpoints_alone_are_an_error_and_never_a_fresh_start(
    checkpoints: CheckpointStore, run: Store
) -> None:
    save(checkpoints, 10)
    run.delete("step-00000010/state.json")
    with pytest.raises(CheckpointError, match=r"every checkpoint .* is damaged"):
        checkpoints.load_newest()


def test_a_missing_step_is_named_with_those_that_exist(checkpoints: CheckpointStore) -> None:
    save(checkpoints, 10)
    with pytest.raises(CheckpointError, match="no finished checkpoint of step 11: it has 10"):
        checkpoints.load(11)
    with pytest.raises(CheckpointError, match=r"no other\.bin: it has empty\.bin, state"):
        checkpoints.read(10, "other.bin")


@pytest.mark.parametrize("form", ["", "/", "/checkpoints", "/checkpoints/step-00000010"])
def test_a_run_its_checkpoints_and_one_of_them_can_be_named(
    checkpoints: CheckpointStore, store: Store, tmp_path: Path, form: str
) -> None:
    save(checkpoints, 10, 0.9)
    save(checkpoints, 20, 0.1)
    save(checkpoints, 30, 0.5)
    url = join(store.url, "runs/one") + form
    single = form.endswith("10")
    assert [found.step for found in list_checkpoints(url)] == ([10] if single else [10, 20, 30])
    wanted: dict[CheckpointChoice, int] = {"newest": 30, "best": 20}
    for which, step in (wanted | {10 if single else 30: 30}).items():
        paths = pull(*choose_checkpoint(url, which, BEST), tmp_path / str(which))
        manifest = json.loads((tmp_path / str(which) / "manifest.json").read_text())
        assert manifest["step"] == (10 if single else step)
        assert {path.name: path.read_bytes() for path in paths[:-1]} == FILES
    if single:
        with pytest.raises(CheckpointError, match=r"is step 10, and step 30 was asked for"):
            choose_checkpoint(url, 30, BEST)
    assert CheckpointStore(find_checkpoints(url)[0].store, keep=1, best=BEST).prune() == [10]


def test_a_place_without_checkpoints_is_an_error_that_says_what_to_give(store: Store) -> None:
    with pytest.raises(
        CheckpointError, match="has no finished checkpoint: give the folder of a run"
    ):
        list_checkpoints(store.url)


def test_many_manifests_are_read_together_and_what_fails_one_by_one(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = CheckpointStore(open_store(s3_url), keep=10)
    for step in range(1, 6):
        save(checkpoints, step)
    checkpoints.close()
    monkeypatch.setattr(records, "MANY", 4)
    one_by_one: list[str] = []
    real = S3Store.get

    def get(store: S3Store, key: str) -> bytes:
        one_by_one.append(key)
        return real(store, key)

    monkeypatch.setattr(S3Store, "get", get)
    assert list(checkpoints.manifests()) == [1, 2, 3, 4, 5]
    assert one_by_one == []
    checkpoints.store.put(checkpoints.key(2, MANIFEST), b"{}")
    assert list(checkpoints.manifests()) == [1, 3, 4, 5]
    assert set(one_by_one) == {checkpoints.key(2, MANIFEST)}
    assert "checkpoint skipped step=2" in caplog.text
    monkeypatch.setattr(checkpoints, "steps", lambda: [1, 3, 4, 5, 9])
    assert list(checkpoints.manifests()) == [1, 3, 4, 5]


def test_a_pull_cut_short_resumes_in_the_middle_of_a_file(
    checkpoints: CheckpointStore, run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(1000)
    save(checkpoints, 20, other={"weights.bin": data})
    monkeypatch.setattr(pulling, "PART", 300)
    monkeypatch.setattr(pulling, "READERS", 1)
    fetched: list[tuple[str, int]] = []
    real, killing = run.read_range, [True]

    def counting(key: str, start: int, size: int) -> bytes:
        fetched.append((key, start))
        if killing and start >= 600:
            raise Killed
        return real(key, start, size)

    monkeypatch.setattr(run, "read_range", counting)
    out, weights = tmp_path / "out", "step-00000020/weights.bin"
    with pytest.raises(Killed):
        pull(checkpoints, 20, out)
    assert not out.exists()
    fetched.clear()
    killing.clear()
    paths = pull(checkpoints, 20, out)
    assert fetched == [(weights, 600), (weights, 900), ("step-00000020/state.json", 0)]
    assert (out / "weights.bin").read_bytes() == data
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in paths)
    assert [path.name for path in tmp_path.iterdir() if "unfinished" in path.name] == []
    fetched.clear()
    assert pull(checkpoints, 20, out) == paths  # nothing is left to fetch
    assert fetched == []


def test_no_secret_of_the_environment_reaches_the_storage(
    checkpoints: CheckpointStore, run: Store
) -> None:
    save(checkpoints, 10)
    secret = os.environ.get("AWS_SECRET_ACCESS_KEY", "unset")
    for key in run.list_keys():
        assert secret.encode() not in run.get(key)


def test_keeping_none_is_refused(run: Store) -> None:
    with pytest.raises(ValueError, match="keep=0"):
        CheckpointStore(run, keep=0)


def test_an_unknown_mode_is_refused(checkpoints: CheckpointStore) -> None:
    mode: Any = "lowest"
    with pytest.raises(ValueError, match="lowest"):
        checkpoints.best("val/l1", mode)
