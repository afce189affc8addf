"""A run's metrics stay with it on storage: whole, in order, whatever happens to the run."""

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.storage import StorageError, Store, open_store
from cluster.storage.files import FileStore
from pipeline.tracking import RunInfo, history, open_tracker
from pipeline.tracking.history import AttemptInfo, HistoryTracker, HistoryWriter, read_history


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "run"))


def write(run: Store, values: Mapping[int, Mapping[str, float]], **info: Any) -> None:
    writer = HistoryWriter(run, AttemptInfo(**info))
    for step, of_step in values.items():
        writer.add(step, of_step)
    writer.close()


def test_every_value_at_every_step_comes_back(store: Store) -> None:
    values = {step: {"loss/l1": 1 / step, "lr/generator": 1e-4} for step in range(1, 200)}
    for step in range(50, 200, 50):
        values[step] |= {"val/psnr_db": 20 + step / 100}
    write(store, values)
    curves = read_history(store).curves
    assert [*curves] == ["loss/l1", "lr/generator", "val/psnr_db"]
    assert curves["loss/l1"].steps.tolist() == [*range(1, 200)]
    np.testing.assert_allclose(curves["loss/l1"].values, 1 / np.arange(1, 200), rtol=1e-8)
    assert curves["val/psnr_db"].steps.tolist() == [50, 100, 150]


def test_two_kinds_of_metrics_at_one_step_are_both_kept(run: Store) -> None:
    writer = HistoryWriter(run, AttemptInfo())
    writer.add(10, {"loss/l1": 0.5})
    writer.add(10, {"val/ssim": 0.9})
    writer.close()
    curves = read_history(run).curves
    assert (curves["loss/l1"].values.tolist(), curves["val/ssim"].values.tolist()) == ([0.5], [0.9])


def test_a_running_attempt_can_be_read(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "WRITE_EVERY_S", 0.02)
    writer = HistoryWriter(run, AttemptInfo())
    try:
        for step in (1, 2):
            writer.add(step, {"loss/l1": 0.1 * step})
            wait_until(lambda step=step: last_step(run) == step)
    finally:
        writer.close()


def test_a_flush_writes_what_was_added_before(run: Store) -> None:
    writer = HistoryWriter(run, AttemptInfo())
    try:
        for step in (1, 2):
            writer.add(step, {"loss/l1": 0.1 * step})
            writer.flush()
            assert last_step(run) == step
    finally:
        writer.close()


def test_a_flush_gives_up_on_storage_that_does_not_answer(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "FLUSH_S", 0.05)
    answers = threading.Event()
    put = run.put
    monkeypatch.setattr(run, "put", lambda key, data: answers.wait(20) and put(key, data))
    writer = HistoryWriter(run, AttemptInfo())
    writer.add(1, {"loss/l1": 0.1})
    writer.flush()
    assert last_step(run) is None
    answers.set()
    writer.close()
    assert last_step(run) == 1


def last_step(run: Store) -> int | None:
    curve = read_history(run).curves.get("loss/l1")
    return int(curve.steps[-1]) if curve else None


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_resumed_attempt_supersedes_what_came_after_its_checkpoint(run: Store) -> None:
    write(run, {step: {"loss/l1": 1.0} for step in range(1, 15)})
    write(run, {step: {"loss/l1": 2.0} for step in range(11, 18)}, resume_from_step=10)
    write(run, {step: {"loss/l1": 3.0} for step in range(6, 8)}, resume_from_step=5)
    curve = read_history(run).curves["loss/l1"]
    assert curve.steps.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert curve.values.tolist() == [1, 1, 1, 1, 1, 3, 3]


def test_hours_leave_out_pauses_and_superseded_steps_but_cost_counts_them(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0]
    monkeypatch.setattr(history, "_now_ms", lambda: now[0])
    hour = 3_600_000

    def attempt(start_h: float, values: Mapping[int, float], **info: Any) -> None:
        now[0] = int(start_h * hour)
        writer = HistoryWriter(run, AttemptInfo(**info))
        for step, at_h in values.items():
            now[0] = int(at_h * hour)
            writer.add(step, {"loss/l1": 0.0})
        writer.close()

    attempt(100, {10: 101, 20: 102, 30: 103}, world_size=2, global_batch=4)
    attempt(
        200,
        {30: 200.5, 40: 201},
        resume_from_step=20,
        world_size=4,
        global_batch=8,
        device="NVIDIA H100",
    )
    found = read_history(run)
    assert found.curves["loss/l1"].steps.tolist() == [10, 20, 30, 40]
    assert found.curves["loss/l1"].hours.tolist() == [1, 2, 2.5, 3]
    assert found.rank_hours == 3 * 2 + 1 * 4
    assert found.gpu_hours == 1 * 4
    assert found.images(np.array([10, 20, 30, 40])).tolist() == [40, 80, 160, 240]


def test_values_that_are_no_numbers_come_back_as_such(run: Store) -> None:
    write(run, {1: {"a": math.nan}, 2: {"a": math.inf}, 3: {"a": -math.inf}, 4: {"a": 1.5}})
    values = read_history(run).curves["a"].values
    np.testing.assert_array_equal(values, [math.nan, math.inf, -math.inf, 1.5])
    for key in run.list_keys("metrics/"):  # strict JSON, which NaN is not
        for line in run.get(key).splitlines() if key.endswith("l") else [run.get(key)]:
            json.loads(line, parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "damage",
    [
        b"[4,17000000000",
        b"[4,1700000000000,0.4",
        b"[4,1700000000000,0.4]\n[5,17",
        b"\x00\xff\n",
        b"[4]\n",
        b'{"a": 1}\n',
        b'[4,1700000000000,"nothing"]\n',
        b"[4,1700000000000,null]\n",
        b'["step","ms"]\n[3,1]\n',
    ],
)
def test_torn_and_foreign_lines_are_passed_over_and_counted(run: Store, damage: bytes) -> None:
    write(run, {step: {"a": float(step)} for step in (1, 2, 3)})
    piece = "metrics/0001-000001.jsonl"
    run.put(piece, run.get(piece) + damage)
    run.put("metrics/0001-000002.jsonl", b"nothing of ours\n")
    run.put("metrics/notes.txt", b"?")
    found = read_history(run)
    assert set(found.curves["a"].steps.tolist()) - {4} == {1, 2, 3}
    assert found.damaged_lines >= 2
    write(run, {4: {"a": 4.0}}, resume_from_step=3)
    assert read_history(run).curves["a"].values[-1] == 4


@pytest.mark.parametrize("record", [b"", b"{", b"[]", b'{"format": 9}', b'{"format": 1}'])
def test_a_damaged_record_of_an_attempt_hides_no_values(run: Store, record: bytes) -> None:
    write(run, {1: {"a": 1.0}})
    run.put("metrics/0001.json", record)
    assert read_history(run).curves["a"].values.tolist() == [1]


def test_long_histories_are_written_in_pieces(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "PIECE_BYTES", 2000)
    write(run, {step: {"a": step / 7} for step in range(500)})
    pieces = [key for key in run.list_keys("metrics/") if key.endswith(".jsonl")]
    assert len(pieces) > 5
    assert all(run.size(key) < 2100 for key in pieces)
    run.delete(pieces[1])  # the others stay readable
    assert 300 < len(read_history(run).curves["a"].steps) < 500


ENDLESS = """
import itertools, sys, time
from cluster.storage import open_store
from pipeline.tracking import history

history.WRITE_EVERY_S = 0.02
writer = history.HistoryWriter(open_store(sys.argv[1]), history.AttemptInfo())
for step in itertools.count(1):
    writer.add(step, {"loss/l1": float(step)})
    time.sleep(0.001)
"""


def test_a_killed_attempt_leaves_whole_lines_without_gaps(run: Store) -> None:
    with subprocess.Popen([sys.executable, "-c", ENDLESS, run.url]) as process:
        wait_until(lambda: (last_step(run) or 0) > 50)
        process.kill()
    found = read_history(run)
    steps = found.curves["loss/l1"].steps.tolist()
    assert steps == [*range(1, len(steps) + 1)]
    assert found.damaged_lines == 0


class FailingStore(FileStore):
    """Raises, or hangs, until it is repaired."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.broken = True
        self.puts = 0

    def put(self, key: str, data: bytes) -> None:
        self.puts += 1
        if self.broken:
            raise StorageError("away")
        super().put(key, data)


def test_values_wait_in_memory_while_storage_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "WRITE_EVERY_S", 0.01)
    store = FailingStore(tmp_path)
    writer = HistoryWriter(store, AttemptInfo())
    writer.add(1, {"a": 1.0})
    wait_until(lambda: store.puts > 2)
    store.broken = False
    writer.add(2, {"a": 2.0})
    wait_until(lambda: (tmp_path / "metrics/0001-000001.jsonl").exists())
    store.broken, store.puts = True, 0
    writer.add(3, {"a": 3.0})
    wait_until(lambda: store.puts > 2)
    store.broken = False
    writer.close()
    assert read_history(store).curves["a"].values.tolist() == [1, 2, 3]


def test_a_storage_that_hangs_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(history, "CLOSE_S", 0.05)
    store, mended = FailingStore(tmp_path), threading.Event()
    monkeypatch.setattr(store, "put", lambda *_: mended.wait(20))
    writer = HistoryWriter(store, AttemptInfo())
    started = time.monotonic()
    writer.add(1, {"a": 1.0})
    writer.close()
    assert time.monotonic() - started < 5
    assert "not on storage" in caplog.text
    mended.set()


def test_steps_of_before_this_format_are_read_from_the_json_lines(run: Store) -> None:
    old = [{"step": step, "loss/l1": step / 10} for step in (1, 2, 3, 4)]
    lines = [*old, {"status": "FINISHED"}]
    run.put("tracking/metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    curve = read_history(run).curves["loss/l1"]
    assert (curve.steps.tolist(), curve.values.tolist()) == ([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4])
    assert np.isnan(curve.hours).all()
    write(run, {3: {"loss/l1": 9.0}}, resume_from_step=2)
    assert read_history(run).curves["loss/l1"].values.tolist() == [0.1, 0.2, 9]


@pytest.mark.parametrize("backend", ["jsonl", "none"])
def test_whatever_the_tracker_the_metrics_stay_with_the_run(run: Store, backend: Any) -> None:
    inner = open_tracker(backend, RunInfo("demo", run.url), store=run, resume_from_step=0)
    with HistoryTracker(inner, HistoryWriter(run, AttemptInfo())) as tracker:
        tracker.log_metrics(1, {"loss/l1": 0.25})
        tracker.log_image("samples", 1, np.zeros((4, 4, 3), np.uint8))
        tracker.finish("KILLED")
    assert read_history(run).curves["loss/l1"].values.tolist() == [0.25]
    if backend == "jsonl":
        assert run.exists("tracking/samples-00000001.png")


def test_a_run_without_any_metrics_has_an_empty_history(run: Store) -> None:
    found = read_history(run)
    assert (dict(found.curves), [*found.attempts], found.rank_hours) == ({}, [], 0)
