"""Shards are read in place where they are local, and from checked copies where they are not."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cluster.services import S3Server
from cluster.storage import records
from data_prep.shards import Dataset, ShardError, verify
from pipeline.data.shard_cache import ShardCache
from tests.cluster.storage.faulty_s3 import faulty_s3
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


def test_a_closed_cache_opens_no_more_shards(dataset: Dataset) -> None:
    shards = ShardCache(dataset)
    shards.open(dataset.shards("train"))
    shards.close()
    with pytest.raises(RuntimeError):
        shards.open(dataset.shards("train"))
