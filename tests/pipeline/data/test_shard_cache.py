"""Shards are read in place where they are local, and from checked copies where they are not."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cluster.services import S3Server
from cluster.storage import MissingKeyError, StorageError, StorageRefusedError, records
from data_prep.shards import Dataset, ShardError, verify
from pipeline.data import shard_cache
from pipeline.data.shard_cache import ShardCache, fetches_shards
from tests.cluster.storage.faulty_s3 import FaultyS3, faulty_s3
from tests.pipeline.data.tiny_dataset import copied, shards_of, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("tiny")
    write_dataset(str(folder / "set"), folder / "made", shards_of((3, 2, 4), "train"))
    return Dataset.open(str(folder / "set"))


@pytest.fixture
def remote(dataset: Dataset, s3_url: str) -> Dataset:
    return copied(dataset, s3_url)


def keys_of(dataset: Dataset, **options: object) -> Iterator[list[str]]:
    """The keys of one shard after the other, all opened at once."""
    with closing(ShardCache(dataset, **options)) as shards:  # type: ignore[arg-type]
        for opened in shards.open(dataset.shards("train")).values():
            yield [sample.key for sample in opened.result().samples]


def test_local_shards_are_read_in_place(dataset: Dataset, tmp_path: Path) -> None:
    assert [len(keys) for keys in keys_of(dataset, cache=tmp_path / "cache")] == [3, 2, 4]
    assert not (tmp_path / "cache").exists()


def test_shards_on_s3_are_fetched_once(dataset: Dataset, remote: Dataset, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert list(keys_of(remote, cache=cache)) == list(keys_of(dataset))
    assert {path.stem for path in cache.iterdir()} == {s.sha256 for s in remote.shards("train")}
    for shard in remote.shards("train"):
        remote.store.delete(shard.name)
    assert list(keys_of(remote, cache=cache)) == list(keys_of(dataset))


def test_the_copies_stay_within_their_bound(remote: Dataset, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    largest = max(shard.bytes for shard in remote.shards("train"))
    assert sum(map(len, keys_of(remote, cache=cache, cache_bytes=largest + 1))) == 9
    assert sum(path.stat().st_size for path in cache.iterdir()) <= largest


def test_a_shard_that_changed_on_s3_is_an_error_that_names_it(
    remote: Dataset, tmp_path: Path
) -> None:
    shard = remote.shards("train")[1]
    data = bytearray(remote.store.get(shard.name))
    data[700] ^= 1
    remote.store.put(shard.name, bytes(data))
    with pytest.raises(ShardError, match=f"{shard.name} has other content than was written"):
        list(keys_of(remote, cache=tmp_path / "cache"))
    assert not (tmp_path / "cache" / f"{shard.sha256}.tar").exists()


def test_a_wrong_byte_on_its_way_is_fetched_again(
    remote: Dataset, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "REREAD_PAUSES_S", (0.0, 0.0))
    with faulty_s3(s3_server.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        proxy.fault("flip answer", "GET", ".tar", times=2)
        assert sum(map(len, keys_of(remote, cache=tmp_path / "cache"))) == 9
        proxy.fault("flip answer", "GET", ".tar", times=2)
        assert verify(remote) == []


@pytest.fixture
def away(
    s3_server: S3Server, remote: Dataset, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultyS3]:
    """The storage of ``remote``, which can be away; clients try once."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(shard_cache, "FIRST_PAUSE_S", 0.05)
    with faulty_s3(s3_server.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def test_shards_are_waited_for_while_storage_is_away(
    remote: Dataset, away: FaultyS3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away.fault("503", "GET", ".tar", times=7)
    assert sum(map(len, keys_of(remote, cache=tmp_path / "cache", away_s=60))) == 9
    assert sum("shard not read yet" in line for line in caplog.messages) == 7
    assert not fetches_shards()


def test_the_wait_for_a_shard_has_an_end(remote: Dataset, away: FaultyS3, tmp_path: Path) -> None:
    away.fault("503", "GET", ".tar", times=1000)
    with pytest.raises(StorageError, match="overloaded"):
        list(keys_of(remote, cache=tmp_path / "cache", away_s=0.3))
    assert not fetches_shards()


@pytest.mark.parametrize(
    ("fault", "error"), [("AccessDenied", StorageRefusedError), ("NoSuchBucket", MissingKeyError)]
)
def test_no_shard_is_waited_for_that_storage_refuses_or_lacks(
    remote: Dataset, away: FaultyS3, tmp_path: Path, fault: str, error: type[StorageError]
) -> None:
    away.fault(fault, "", ".tar", times=12)
    with pytest.raises(error):
        list(keys_of(remote, cache=tmp_path / "cache", away_s=60))


def test_closing_ends_the_wait(
    remote: Dataset, away: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "FIRST_PAUSE_S", 100.0)
    away.fault("503", "GET", ".tar", times=1000)
    shards = ShardCache(remote, cache=tmp_path / "cache", away_s=1000)
    opened = shards.open(remote.shards("train"))
    deadline = time.monotonic() + 20
    while not fetches_shards():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    shards.close()
    assert any(isinstance(future.exception(), StorageError) for future in opened.values())


def test_a_closed_cache_opens_no_more_shards(dataset: Dataset) -> None:
    shards = ShardCache(dataset)
    shards.open(dataset.shards("train"))
    shards.close()
    with pytest.raises(RuntimeError):
        shards.open(dataset.shards("train"))
