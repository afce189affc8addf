"""One trainer per run: who is replaced at once, who is waited for, who is respected."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cluster.storage import StorageError, Store, open_store, records
from pipeline import lease as leases
from pipeline.arguments.common import MISTAKE
from pipeline.checkpoints import CheckpointStore
from pipeline.lease import LEASE, HeldLease, Lease, LeaseLostError, RunTakenError, held
from tests.small_dataset import FIXTURE, unpack_dataset

pytestmark = pytest.mark.slow  # half a second and more each

STRANGER = Lease(
    token=7, id="stranger", host="far", pid=1, process="boot/pid 1", job="", since="yesterday"
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(leases, "RENEWAL_S", 0.1)
    monkeypatch.setattr(leases, "TIME_TO_LIVE_S", 1.5)
    monkeypatch.setattr(leases, "SETTLING_S", 0.05)
    monkeypatch.setattr(records, "REREAD_PAUSES_S", (0.0, 0.0))


def hold(store: Store, ended: tuple[str, ...] = ()):
    return held(store, job="", job_has_ended=lambda job: job in ended)


def write(store: Store, lease: Lease) -> None:
    store.put(LEASE, json.dumps(asdict(lease)).encode())


def take_over(store: Store, mine: HeldLease) -> None:
    """A stranger writes until ``mine`` notices, as its renewals do: one of ours may cross."""
    deadline = time.monotonic() + 60
    while not mine.lost:
        assert time.monotonic() < deadline
        write(store, STRANGER)
        time.sleep(0.15)


def seconds_to_acquire(store: Store, ended: tuple[str, ...] = ()) -> float:
    started = time.monotonic()
    with hold(store, ended):
        return time.monotonic() - started


def test_a_run_is_free_again_after_its_trainer_and_tokens_grow(store):
    with hold(store) as first:
        first.check()
    with hold(store) as second:
        assert second.lease.token == first.lease.token + 1


def test_a_living_trainer_is_respected_and_named(store):
    with hold(store) as first, pytest.raises(RunTakenError, match=rf"process {first.lease.pid} on"):
        hold(store).__enter__()
    first.check()


def test_a_process_that_is_gone_from_this_machine_is_replaced_at_once(store, monkeypatch):
    monkeypatch.setattr(leases, "TIME_TO_LIVE_S", 300)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    alive = leases._process(process.pid)
    process.communicate(b"\n")
    assert alive is not None
    write(store, replace(STRANGER, pid=process.pid, process=alive))
    assert seconds_to_acquire(store) < 100


def test_a_ray_job_that_has_ended_is_replaced_at_once(store, monkeypatch):
    monkeypatch.setattr(leases, "TIME_TO_LIVE_S", 300)
    write(store, replace(STRANGER, job="job-1"))
    assert seconds_to_acquire(store, ("job-1",)) < 100


def test_an_unknown_trainer_has_its_time_to_live(store, caplog):
    write(store, STRANGER)
    assert seconds_to_acquire(store) >= 1.5
    assert "waiting up to 2 s whether the run is alive: process 1 on far" in caplog.text


def test_a_lease_that_is_damaged_counts_as_missing(store, caplog):
    store.put(LEASE, b"{")
    with hold(store):
        assert "is damaged and counts as missing" in caplog.text
        assert "waiting" not in caplog.text


def test_one_wrong_byte_in_the_lease_takes_no_run_away(store, monkeypatch):
    with hold(store) as mine:
        whole, reads = store.get, []

        def spoilt(key: str) -> bytes:
            data: bytes = whole(key)
            reads.append(key)
            return data[:-9] + b"X" + data[-8:] if len(reads) < spoilt_reads else data

        monkeypatch.setattr(store, "get", spoilt)
        monkeypatch.setattr(store, "reconnected", lambda: store)
        spoilt_reads = 3
        mine.check()
        spoilt_reads = 10**6
        with pytest.raises(StorageError, match=r"lease.json cannot be read"):
            mine.check()
        with pytest.raises(StorageError, match=r"lease.json cannot be read"):
            hold(store).__enter__()
        monkeypatch.undo()
        assert not mine.lost


def test_of_two_that_start_at_once_one_trains(store):
    write(store, replace(STRANGER, released=True))
    inside: list[int] = []
    refused: list[Exception] = []

    def train() -> None:
        try:
            with hold(store) as mine:
                time.sleep(2)
                mine.check()
                inside.append(mine.lease.token)
        except (RunTakenError, LeaseLostError) as error:
            refused.append(error)

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inside) == 1
    assert len(refused) == 1


def test_who_was_taken_over_notices_and_commits_nothing(store):
    with hold(store) as mine:
        checkpoints = CheckpointStore(store, before_commit=mine.check)
        checkpoints.save(1, {"a.json": b"{}"}, manifest={"metrics": {}})
        checkpoints.wait()
        take_over(store, mine)
        checkpoints.save(2, {"a.json": b"{}"}, manifest={"metrics": {}})
        with pytest.raises(LeaseLostError, match="taken over by process 1 on far"):
            checkpoints.wait()
        assert checkpoints.steps() == [1]
    assert json.loads(store.get(LEASE))["id"] == "stranger"  # not released by the loser


def test_a_commit_that_lands_after_a_takeover_retires_nothing_of_the_new_trainer(
    store, monkeypatch
):
    """Its put may hang for longer than the lease lives."""
    theirs = CheckpointStore(store)
    for step in (1, 3):
        theirs.save(step, {"a.json": b"{}"}, manifest={"metrics": {}})
    theirs.close()
    put = store.put
    with hold(store) as mine:

        def slow_put(key: str, data: bytes) -> None:
            if key == "step-00000002/manifest.json":
                take_over(store, mine)
            put(key, data)

        monkeypatch.setattr(store, "put", slow_put)
        checkpoints = CheckpointStore(store, keep=1, before_commit=mine.check)
        checkpoints.save(2, {"a.json": b"{}"}, manifest={"metrics": {}})
        with pytest.raises(LeaseLostError, match="taken over by process 1 on far"):
            checkpoints.wait()
    assert checkpoints.steps() == [1, 2, 3]


def test_a_copy_of_the_lease_in_a_worker_checks_as_well(store):
    with hold(store) as mine:
        HeldLease(store, mine.lease).check()
        write(store, STRANGER)
        with pytest.raises(LeaseLostError):
            HeldLease(store, mine.lease).check()


def train(storage: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "pipeline", "train", str(FIXTURE / "recipe.yaml")),
            *(f"storage={storage}", "name=run", "train.steps=5000", "train.save_every_steps=5000"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_second_training_is_refused_and_one_after_a_kill_starts_at_once(tmp_path):
    unpack_dataset(tmp_path)
    with train(tmp_path / "storage") as first:
        wait_for_line(first, "starting run=run")
        with train(tmp_path / "storage") as second:
            _, log = second.communicate(timeout=120)
            assert second.returncode == MISTAKE
            assert f"is being trained by process {first.pid} on" in log.splitlines()[-1]
        assert first.poll() is None
        first.kill()
        first.communicate()
    with train(tmp_path / "storage") as third:
        before = wait_for_line(third, "starting run=run")
        assert not any("waiting" in line for line in before)
        third.kill()
        third.communicate()


def wait_for_line(process: "subprocess.Popen[str]", text: str) -> list[str]:
    """Everything that the process logs up to the line that has ``text``."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text} did not come: {lines[-5:]}")


def test_storage_that_hangs_does_not_keep_a_run_from_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "RELEASE_S", 0.2)
    monkeypatch.setattr(leases, "RENEWAL_S", 60)
    store, answers, written = open_store(str(tmp_path)), threading.Event(), threading.Event()
    with hold(store):
        monkeypatch.setattr(leases, "_write", lambda *arguments: written.set())
        monkeypatch.setattr(HeldLease, "check", lambda held: answers.wait(30))
        ending = time.monotonic()
    assert time.monotonic() - ending < 10
    answers.set()
    assert written.wait(30)
