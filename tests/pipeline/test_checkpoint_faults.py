"""Storage that spoils bytes, goes away or refuses: no checkpoint is lost, torn or given up."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save as save_tensors

from cluster.services import S3Server
from cluster.storage import (
    CorruptedTransferError,
    StorageError,
    StorageRefusedError,
    Store,
    join,
    open_store,
    records,
)
from cluster.storage.records import seal
from pipeline.checkpoints import CheckpointError, CheckpointStore, background_saves
from pipeline.checkpoints.manifest import manifest_bytes
from pipeline.checkpoints.pull import pull
from pipeline.checkpoints.urls import list_checkpoints
from pipeline.cli import main
from tests.cluster.storage.faulty_s3 import FaultyS3, faulty_s3

WEIGHTS = save_tensors({"kernel": np.arange(300, dtype=np.float32)})
FILES = {"ema.safetensors": WEIGHTS, "state.json": b"{}"}
MANIFEST = "step-00000020/manifest.json"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "REREAD_PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(background_saves, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(background_saves, "LONGEST_PAUSE_S", 0.1)


@pytest.fixture
def s3(
    s3_server: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[FaultyS3, str]]:
    """A proxy before the S3 server, which every client here goes through, and an empty prefix."""
    with faulty_s3(s3_server.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # ours are under test
        yield proxy, s3_url


def save(checkpoints: CheckpointStore, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, FILES, manifest={"metrics": {"val/l1_percent": 1.0}})
    checkpoints.wait()


def test_one_wrong_byte_while_reading_costs_no_checkpoint(
    s3: tuple[FaultyS3, str], tmp_path: Path
) -> None:
    proxy, url = s3
    checkpoints = CheckpointStore(open_store(url), keep=2)
    save(checkpoints, 10, 20)
    for name in ("ema.safetensors", "manifest.json"):
        proxy.fault("flip answer", "GET", f"step-00000020/{name}")
        assert checkpoints.load_newest() == (20, FILES)
        proxy.fault("flip answer", "GET", f"step-00000020/{name}", times=2)
        assert checkpoints.verify(20) == []
        proxy.fault("flip answer", "GET", f"step-00000020/{name}", times=2)
        pull(checkpoints, 20, tmp_path / name)
        assert (tmp_path / name / "ema.safetensors").read_bytes() == WEIGHTS


def test_what_every_reading_spoils_is_kept_on_storage(s3: tuple[FaultyS3, str]) -> None:
    proxy, url = s3
    checkpoints = CheckpointStore(open_store(url), keep=1, best=("val/l1_percent", "min"))
    save(checkpoints, 10, 20)
    before = set(open_store(url).list_keys())
    proxy.fault("flip answer", "GET", "ema.safetensors", times=3 * 2)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load_newest()
    assert "delete" not in str(caught.value)
    assert "left as they are" in str(caught.value)
    assert set(open_store(url).list_keys()) == before


def test_a_checkpoint_that_was_passed_over_is_set_aside_and_never_deleted(store: Store) -> None:
    """Resuming from 10 because 20 could not be read may not cost 20 its files."""
    checkpoints = CheckpointStore(store, keep=2)
    save(checkpoints, 10, 20)
    save(checkpoints, 15)
    assert checkpoints.steps() == [10, 15]
    assert store.get("step-00000020/ema.safetensors") == WEIGHTS
    assert store.exists("step-00000020/manifest.set-aside.json")
    save(checkpoints, 20)  # the run comes there by itself
    assert checkpoints.steps() == [15, 20]
    assert checkpoints.verify(20) == []


def test_what_a_killed_pull_left_is_not_in_the_next_one(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(open_store(str(tmp_path / "run")))
    save(checkpoints, 10)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(checkpoints, 10, tmp_path / "out", advance=interrupt)
    (work,) = tmp_path.glob(".out.*.unfinished")
    (work / ".unfinished-machine-1").write_bytes(b"half a manifest")
    pull(checkpoints, 10, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*FILES, "manifest.json"}


def test_a_repeated_pull_of_an_exact_step_costs_one_request(
    s3: tuple[FaultyS3, str], tmp_path: Path
) -> None:
    proxy, url = s3
    save(CheckpointStore(open_store(join(url, "checkpoints"))), 10, 20)
    command = ["checkpoints", "pull", url, "--step", "10", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    proxy.requests.clear()
    assert main(command) == 0
    assert len(proxy.requests) == 1
    assert proxy.requests[0].endswith("checkpoints/step-00000010/manifest.json")


def test_a_cut_or_busy_answer_is_asked_for_again(s3: tuple[FaultyS3, str]) -> None:
    proxy, url = s3
    checkpoints = CheckpointStore(open_store(url))
    save(checkpoints, 20)
    proxy.fault("cut", "GET", "ema.safetensors", times=2)
    assert checkpoints.load(20) == FILES


def test_a_download_that_never_comes_whole_is_one_clear_line(
    s3: tuple[FaultyS3, str], tmp_path: Path
) -> None:
    proxy, url = s3
    store = open_store(url)
    store.put("key", WEIGHTS)
    proxy.fault("long answer", "GET", "/key", times=99)
    with pytest.raises(StorageError, match="key: ") as caught:
        store.download("key", tmp_path / "key")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "key").exists()


def test_a_corrupted_upload_is_repeated(s3: tuple[FaultyS3, str]) -> None:
    proxy, url = s3
    store = open_store(url)
    proxy.fault("flip request", "PUT", "/key", times=2)
    store.put("key", WEIGHTS)
    assert store.get("key") == WEIGHTS
    proxy.fault("flip request", "PUT", "/key", times=3)
    with pytest.raises(CorruptedTransferError, match="bytes changed on their way") as caught:
        store.put("key", WEIGHTS)
    assert "when_required" not in str(caught.value)


def test_a_save_survives_storage_that_is_away(s3: tuple[FaultyS3, str]) -> None:
    proxy, url = s3
    checkpoints = CheckpointStore(open_store(url))
    save(checkpoints, 10)
    proxy.away = True
    started = time.monotonic()
    checkpoints.save(20, FILES, manifest={})
    assert time.monotonic() - started < 0.2  # training continues
    time.sleep(0.3)
    checkpoints.raise_failure()
    proxy.away = False
    checkpoints.close()
    assert checkpoints.steps() == [10, 20]
    assert checkpoints.load(20) == FILES


def test_the_next_save_supersedes_one_that_is_being_repeated(s3: tuple[FaultyS3, str]) -> None:
    proxy, url = s3
    checkpoints = CheckpointStore(open_store(url))
    proxy.away = True
    for step in (10, 20, 30):
        checkpoints.save(step, FILES, manifest={})
        time.sleep(0.15)
    proxy.away = False
    checkpoints.close()
    assert checkpoints.steps() == [30]


def test_after_the_deadline_the_run_ends_and_names_the_step_that_is_safe(
    s3: tuple[FaultyS3, str],
) -> None:
    proxy, url = s3
    checkpoints = CheckpointStore(open_store(url), save_deadline_s=0.4)
    save(checkpoints, 10)
    proxy.away = True
    checkpoints.save(20, FILES, manifest={})
    with pytest.raises(
        CheckpointError, match=r"step 20 could not be saved .* minutes .*step 10 is safe"
    ):
        checkpoints.close()


def test_superseding_does_not_put_the_deadline_off(store: Store, fails: Fails) -> None:
    checkpoints = CheckpointStore(store, save_deadline_s=0.4)
    fails(store, "put", StorageError("away"))

    def train() -> None:
        for step in range(20):
            checkpoints.save(step, FILES, manifest={})
            time.sleep(0.1)

    with pytest.raises(CheckpointError, match="could not be saved"):
        train()


def test_training_does_not_wait_for_a_save_that_hangs(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, real = threading.Event(), store.put

    def hanging(key: str, data: bytes) -> None:
        assert answers.wait(10)
        real(key, data)

    monkeypatch.setattr(store, "put", hanging)
    checkpoints = CheckpointStore(store, longest_wait_s=0.05)
    for step in (10, 20, 30):
        checkpoints.save(step, FILES, manifest={})
    answers.set()
    checkpoints.close()
    assert checkpoints.steps() == [10, 30]  # never more than two in memory


def test_a_checkpoint_is_safe_before_older_ones_are_deleted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, looking = threading.Event(), threading.Event()

    def hanging(checkpoints: CheckpointStore, step: int) -> None:
        looking.set()
        assert answers.wait(30)

    monkeypatch.setattr(CheckpointStore, "_clean_up", hanging)
    committed: list[int] = []
    checkpoints = CheckpointStore(store, after_commit=committed.append)
    checkpoints.save(10, FILES, manifest={})
    assert looking.wait(30)
    assert checkpoints.safe_step == 10
    assert committed == [10]
    answers.set()
    checkpoints.close()


def test_what_cannot_heal_surfaces_at_the_next_step(s3: tuple[FaultyS3, str]) -> None:
    checkpoints = CheckpointStore(open_store(s3[1].replace("s3://tests", "s3://never-made")))
    checkpoints.save(10, FILES, manifest={})

    def train() -> None:
        for _ in range(200):  # steps
            time.sleep(0.02)
            checkpoints.raise_failure()

    with pytest.raises(CheckpointError, match="bucket was not found"):
        train()


def test_a_failure_to_clean_up_does_not_fail_the_save(store: Store, fails: Fails) -> None:
    checkpoints = CheckpointStore(store, keep=1)
    save(checkpoints, 10)
    fails(store, "delete", StorageRefusedError("no permission to delete"), "step-00000010")
    save(checkpoints, 20)
    assert checkpoints.steps() == [10, 20]


Fails = Callable[..., None]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Fails:
    def patch(store: Store, method: str, error: Exception, key_part: str = "") -> None:
        real = getattr(store, method)

        def failing(key: str, *arguments: bytes) -> None:
            if key_part in key:
                raise error
            real(key, *arguments)

        monkeypatch.setattr(store, method, failing)

    return patch


def test_every_single_bit_flip_of_a_manifest_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "REREAD_PAUSES_S", ())  # one reading finds it
    store = open_store(str(tmp_path))
    checkpoints = CheckpointStore(store)
    config = {"train": {"learning_rate": 1e-05}, "name": "caf\u00e9"}  # 1E-05 is equal
    manifest = {"metrics": {"val/l1_percent": 0.1 + 0.2}, "config": config}
    checkpoints.save(20, {"state.json": b"{}"}, manifest=manifest)
    checkpoints.wait()
    data = store.get(MANIFEST)
    assert checkpoints.verify(20) == []
    path = tmp_path / MANIFEST
    passed = []
    for position, bit in itertools.product(range(len(data)), range(8)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        if not checkpoints.verify(20):
            passed.append((position, bit))
    assert passed == []


DAMAGES: dict[str, bytes] = {
    "it is empty": b"",
    "it is not JSON": b'{"files": {"ema',
    "it holds a list": b"[]",
    "files is missing": b"{}",
    "files should be named values": b'{"files": [], "step": 20}',
    "files has no size and sha256": b'{"files": {"a.bin": 3}, "step": 20}',
    "files.a.bin.bytes": b'{"files": {"a.bin": {"bytes": "3", "sha256": "x"}}, "step": 20}',
    "should be a whole number": b'{"files": {}, "step": "20"}',
    "metrics": b'{"files": {}, "step": 20, "metrics": [1]}',
    "val/l1_percent": b'{"files": {}, "step": 20, "metrics": {"val/l1_percent": "low"}}',
    "config": b'{"files": {}, "step": 20, "config": 3}',
    "describes step 21": b'{"files": {}, "step": 21}',
    "not a plain file name": json.dumps(
        {"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}, "step": 20}
    ).encode(),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_newest_manifest_is_named_and_passed_over(tmp_path: Path, reason: str) -> None:
    store = open_store(str(tmp_path))
    checkpoints = CheckpointStore(store)
    save(checkpoints, 10, 20)
    store.put(MANIFEST, DAMAGES[reason])
    (fault,) = checkpoints.verify(20)[:1]
    assert reason.rpartition(".")[2] in fault
    assert f"{MANIFEST} is damaged" in fault
    assert [found.step for found in list_checkpoints(store.url)] == [10]
    newest = checkpoints.newest_manifest()
    assert newest is not None
    assert newest.step == 10
    assert checkpoints.load_newest() == (10, FILES)
    assert 20 not in CheckpointStore(store, keep=1, best=("val/l1_percent", "min")).prune()


def test_a_checkpoint_of_a_newer_release_is_one_line_and_stays(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    checkpoints = CheckpointStore(store)
    save(checkpoints, 10, 20)
    store.put(MANIFEST, seal({"files": {}, "step": 20}, version=99))
    with pytest.raises(CheckpointError, match="written by a newer release") as caught:
        checkpoints.load_newest()
    assert "damaged" not in str(caught.value)


def test_a_manifest_never_leads_out_of_the_folder_of_a_pull(tmp_path: Path) -> None:
    store = open_store(join(str(tmp_path), "storage"))
    checkpoints = CheckpointStore(store)
    for name in ("../escaped", "/etc/escaped", "a/../../escaped", ".hidden", "manifest.json"):
        files = {name: {"bytes": 0, "sha256": "0" * 64}}
        store.put(MANIFEST, manifest_bytes({"files": files, "step": 20}))
        with pytest.raises(CheckpointError, match="not a plain file name"):
            pull(checkpoints, 20, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["storage"]
