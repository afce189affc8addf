"""Shards: the plan, the bytes of a tar, and what a reader says about a damaged one."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import resource
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from data_prep.shards import (
    FORMAT,
    Dataset,
    RawSample,
    ShardError,
    digest_of,
    index_entry,
    plan,
    read_samples,
    shard_name,
    verify,
    write_shard,
)


def samples(count: int = 8) -> list[RawSample]:
    rng = random.Random(1)
    return [
        RawSample(f"a/key-{i:03d}", rng.randbytes(rng.randrange(3000)), b"png%d" % i, b"{}")
        for i in range(count)
    ]


def written(path: Path, count: int = 8) -> bytes:
    write_shard(path, samples(count), split="train", name=path.name)
    return path.read_bytes()


def test_what_is_written_is_read_back_from_a_path_bytes_or_a_stream(tmp_path: Path) -> None:
    data = written(tmp_path / "a.tar")
    assert list(read_samples(tmp_path / "a.tar")) == samples()
    assert list(read_samples(data)) == samples()
    assert list(read_samples(io.BytesIO(data))) == samples()


# webdataset leaves closing its file to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_plain_tarfile_and_webdataset_read_a_shard(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    written(path)
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert [member.name for member in members[:3]] == [
            "a/key-000.jpg",
            "a/key-000.sketch.png",
            "a/key-000.json",
        ]
        assert {(m.mtime, m.uid, m.gid, m.mode, m.type) for m in members} == {
            (0, 0, 0, 0o444, tarfile.REGTYPE)
        }
        last = tar.extractfile("a/key-007.jpg")
        assert last is not None
        assert last.read() == samples()[7].jpg
    read = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [(s["__key__"], s["jpg"], s["sketch.png"], s["json"]) for s in read] == [
        (s.key, s.jpg, s.sketch, s.meta) for s in samples()
    ]


def test_the_record_of_a_shard_says_what_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "demo-val-000003.tar"
    shard = write_shard(path, samples(5), split="val", name=shard_name("demo", "val", 3))
    assert shard.name == path.name
    assert shard.bytes == path.stat().st_size
    assert shard.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (shard.samples, shard.first_key, shard.last_key) == (5, "a/key-000", "a/key-004")


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    assert written(tmp_path / "a.tar") == written(tmp_path / "b.tar")


def test_a_shard_of_no_samples_is_a_tar(tmp_path: Path) -> None:
    data = written(tmp_path / "a.tar", 0)
    assert list(read_samples(data)) == []
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getmembers() == []


def test_a_tar_cut_anywhere_is_an_error_that_names_it(tmp_path: Path) -> None:
    data = written(tmp_path / "a.tar", 3)
    for length in range(0, len(data), 100):
        with pytest.raises(ShardError, match=r"^b\.tar (is truncated|has)"):
            list(read_samples(data[:length], name="b.tar"))


def test_a_foreign_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.txt", "b.txt", "c.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(ShardError, match=r"foreign\.tar: b\.txt follows an incomplete a"):
        list(read_samples(path))
    with pytest.raises(ShardError, match="not one of our shards"):
        list(read_samples(random.Random(0).randbytes(2048)))


def test_the_longest_key_is_read_back(tmp_path: Path) -> None:
    sample = RawSample("k" * 89, b"jpg", b"png", b"{}")
    write_shard(tmp_path / "a.tar", [sample], split="train", name="a.tar")
    assert list(read_samples(tmp_path / "a.tar")) == [sample]


@pytest.mark.parametrize("key", ["a.b", "", "a b", "ä", "k" * 90])
def test_a_key_that_cannot_name_a_member_is_refused(tmp_path: Path, key: str) -> None:
    sample = RawSample(key, b"", b"", b"")
    with pytest.raises(ShardError, match="key"):
        write_shard(tmp_path / "a.tar", [sample], split="train", name="a.tar")
    with pytest.raises(ShardError, match="key"):
        plan([key], shard_samples=8, seed=0)


def test_samples_out_of_order_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="sorted"):
        write_shard(tmp_path / "a.tar", samples()[::-1], split="train", name="a.tar")


@given(count=st.integers(0, 300), shard_samples=st.integers(1, 50), seed=st.integers(0, 9))
def test_a_plan_holds_every_key_once_in_filled_sorted_shards(
    count: int, shard_samples: int, seed: int
) -> None:
    keys = [f"k{i}" for i in range(count)]
    shards = plan(keys, shard_samples=shard_samples, seed=seed)
    assert sorted(key for shard in shards for key in shard) == sorted(keys)
    assert all(shard and shard == sorted(shard) for shard in shards)
    assert plan(reversed(keys), shard_samples=shard_samples, seed=seed) == shards


def test_large_shards_are_between_half_full_and_full() -> None:
    for count in (10_000, 15_000, 19_000):
        sizes = [len(s) for s in plan(map(str, range(count)), shard_samples=1000, seed=0)]
        assert min(sizes) > 500 * 0.9
        assert max(sizes) < 1000 * 1.1


def test_another_image_changes_one_shard() -> None:
    before = plan(map(str, range(1000)), shard_samples=100, seed=0)
    after = plan(map(str, range(1001)), shard_samples=100, seed=0)
    assert sum(old != new for old, new in zip(before, after, strict=True)) == 1


def test_two_images_of_one_key_are_refused() -> None:
    with pytest.raises(ShardError, match="two images have the key 'b'"):
        plan(["a", "b", "b"], shard_samples=8, seed=0)


def test_a_folder_without_dataset_json_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"dataset\.json is missing"):
        Dataset.open(str(tmp_path))


@pytest.mark.parametrize(
    "content", [b"[]", b"{}", b"no JSON \xff", b'{"format":1}', b'{"format":1,"name":"small"}']
)
def test_a_dataset_json_that_lacks_something_is_reported_in_one_line(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(ShardError, match=r"/dataset\.json is not one of our datasets"):
        Dataset.open(str(tmp_path))


def finished(root: Path) -> Dataset:
    """Two shards with what makes them a dataset."""
    names = [shard_name("small", "train", number) for number in range(2)]
    shards = [write_shard(root / name, samples(), split="train", name=name) for name in names]
    index = {"shardlist": [index_entry(shard) for shard in shards]}
    beside = {"index.json": json.dumps(index).encode(), "sizes.json": b"{}"}
    for name, data in beside.items():
        (root / name).write_bytes(data)
    record = {
        "format": FORMAT,
        "name": "small",
        "digest": digest_of({}, shards),
        "settings": {"shaping": {}},
        "counts": {},
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in beside.items()
        },
    }
    (root / "dataset.json").write_text(json.dumps(record))
    return Dataset.open(str(root))


def test_a_shard_that_the_disk_cannot_read_is_one_fault_beside_the_others(tmp_path: Path) -> None:
    dataset = finished(tmp_path)
    assert verify(dataset) == []
    first, second = (tmp_path / shard.name for shard in dataset.index)
    first.unlink()
    first.symlink_to("/proc/self/mem")  # reading it from the front is an input/output error
    second.unlink()
    assert verify(dataset) == [
        f"{first}: Input/output error",
        f"{second}: No such file or directory",
    ]


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Room for 2 GiB more than there is in use."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**30, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    ("place", "written"),
    [
        (0, b"\xff" * 120),  # no end of the name
        (0, b"\n\x1b[2J"),
        (124, b"77777777777"),  # 8 GiB
        (124, b"-0000000600"),
        (124, b"no number"),
        (156, b"5"),
    ],
)
def test_a_damaged_header_is_one_fault_that_names_its_shard(
    tmp_path: Path, place: int, written: bytes
) -> None:
    dataset = finished(tmp_path)
    path = tmp_path / dataset.index[1].name
    data = bytearray(path.read_bytes())
    data[place : place + len(written)] = written
    path.write_bytes(data)
    with little_memory():
        (fault,) = verify(dataset)
    assert path.name in fault
    assert fault.isprintable()


@pytest.mark.parametrize("content", [b"{}", b"[1]", b'{"shardlist": [{}]}', b"no JSON", None])
def test_an_index_that_cannot_be_read_is_one_fault_beside_the_others(
    tmp_path: Path, content: bytes | None
) -> None:
    dataset = finished(tmp_path)
    (tmp_path / "index.json").unlink()
    if content is not None:
        (tmp_path / "index.json").write_bytes(content)
    (tmp_path / "sizes.json").write_bytes(b"{ }")
    fault = (
        ": No such file or directory"
        if content is None
        else " is not one of our indexes, or damaged: its sha256 differs from the one in "
        "dataset.json"
    )
    assert verify(dataset) == [
        f"{tmp_path / 'index.json'}{fault}",
        "sizes.json has 3 bytes instead of 2",
    ]
