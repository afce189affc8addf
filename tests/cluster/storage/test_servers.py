"""Two servers with nothing in common serve every request that this product makes of S3."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save as save_tensors

from cluster.storage import MIB, MissingKeyError, Store, open_store
from cluster.storage.s3 import s3_client
from pipeline.checkpoints import CheckpointStore
from pipeline.checkpoints.pull import pull
from tests.cluster.storage.moto_server import moto_server


@pytest.fixture(scope="module")
def moto() -> Iterator[Mapping[str, str]]:
    with moto_server() as environment:
        s3_client(environment).create_bucket(Bucket="tests")
        yield environment


@pytest.fixture(params=["SeaweedFS", "moto"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "SeaweedFS":
        return open_store(request.getfixturevalue("s3_url"))
    for name, value in request.getfixturevalue("moto").items():
        monkeypatch.setenv(name, value)
    return open_store(f"s3://tests/{uuid.uuid4().hex[:12]}")


def test_values_are_put_read_listed_and_deleted(store: Store) -> None:
    store.put("a/b.json", b"one")
    store.put("a/b.json", b"0123456789")
    store.put("a/empty", b"")
    assert store.get("a/b.json") == b"0123456789"
    assert store.read_range("a/b.json", 8, 4) == b"89"
    assert store.get("a/empty") == b""
    assert store.size("a/b.json") == 10
    assert store.list_keys("a/") == ["a/b.json", "a/empty"]
    store.delete("a/b.json")
    store.delete("a/b.json")
    assert store.list_keys() == ["a/empty"]
    assert not store.exists("a/b.json")
    with pytest.raises(MissingKeyError):
        store.get("a/b.json")


@pytest.mark.slow
@pytest.mark.parametrize("store", ["moto"], indirect=True)  # test_s3 has the other
def test_keys_beyond_one_page_are_listed(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.put(f"k{number:04d}", b""), range(1005)))
    assert len(store.list_keys()) == 1005


@pytest.mark.slow
def test_a_big_file_goes_up_in_parts_and_comes_down_equal(store: Store, tmp_path: Path) -> None:
    data = os.urandom(33 * MIB)  # beyond the threshold of a multipart upload
    (tmp_path / "here").write_bytes(data)
    store.upload(tmp_path / "here", "big")
    store.download("big", tmp_path / "there")
    assert (tmp_path / "there").read_bytes() == data
    with store.open("big") as source:
        assert source.read() == data
    assert store.clear_unfinished(abandoned_s=0) == 0


def test_pyarrow_writes_and_reads_beside_boto3(store: Store) -> None:
    filesystem, path = store.pyarrow_filesystem()
    with filesystem.open_output_stream(f"{path}/part") as file:
        file.write(b"0123456789")
    assert store.get("part") == b"0123456789"
    with filesystem.open_input_file(f"{path}/part") as file:
        assert file.read_at(4, 3) == b"3456"


def test_a_checkpoint_is_saved_verified_and_pulled(store: Store, tmp_path: Path) -> None:
    weights = save_tensors({"kernel": np.ones(1000, np.float32)})
    checkpoints = CheckpointStore(store, keep=1)
    for step in (10, 20):
        checkpoints.save(step, {"ema.safetensors": weights}, manifest={"metrics": {}})
    checkpoints.close()
    assert checkpoints.steps() == [20]
    assert checkpoints.verify(20) == []
    pull(checkpoints, 20, tmp_path / "pulled")
    assert (tmp_path / "pulled" / "ema.safetensors").read_bytes() == weights
