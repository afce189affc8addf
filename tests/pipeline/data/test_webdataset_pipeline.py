"""Other people's training code reads our datasets through webdataset itself."""

import json
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import webdataset
from torch.utils.data import DataLoader

from data_prep.images import decode_sketch
from data_prep.shards import Dataset, ShardError
from pipeline.data import webdataset_pipeline
from pipeline.data.webdataset_pipeline import open_as_webdataset
from tests.pipeline.data.tiny_dataset import copied, image_of, shards_of, write_dataset

COUNTS = (3, 2, 4, 1)

few_cores = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("tiny")
    shards = [
        (split, [replace(sample, meta=json.dumps({"of": sample.key}).encode()) for sample in made])
        for split, made in [*shards_of(COUNTS, "train"), *shards_of((2,), "val")]
    ]
    write_dataset(str(folder / "set"), folder / "made", shards)
    return Dataset.open(str(folder / "set"))


def keys_of(samples: webdataset.FluidWrapper) -> list[str]:
    return [sample["__key__"] for sample in samples]


def test_every_sample_comes_once_with_image_sketch_and_meta(dataset: Dataset) -> None:
    found = list(open_as_webdataset(dataset.url))
    expected = [raw for shard in dataset.shards("train") for raw in dataset.read(shard)]
    assert [sample["__key__"] for sample in found] == [raw.key for raw in expected]
    for sample, raw in zip(found, expected, strict=True):
        assert sample["image"].shape == (40, 56, 3)
        assert sample["image"].dtype == np.uint8
        image, _ = image_of(int(raw.key[-3:]), 40, 56)
        assert np.abs(sample["image"].astype(int) - image).mean() < 3
        np.testing.assert_array_equal(sample["sketch"], decode_sketch(raw.sketch))
        assert set(np.unique(sample["sketch"])) == {0, 1}
        assert sample["meta"] == {"of": raw.key}
        assert Path(sample["__url__"]).is_file()
    assert len({id(sample["image"]) for sample in found}) == sum(COUNTS)


def test_the_split_is_chosen(dataset: Dataset) -> None:
    assert len(keys_of(open_as_webdataset(dataset.url, "val"))) == 2
    with pytest.raises(ShardError, match="no samples in the split 'test': give train or val"):
        open_as_webdataset(dataset.url, "test")  # type: ignore[arg-type]


def test_stages_of_webdataset_follow(dataset: Dataset) -> None:
    batches = open_as_webdataset(dataset.url).to_tuple("image", "sketch").batched(4)
    assert [images.shape[0] for images, _ in batches] == [4, 4, 2]


@few_cores
def test_workers_share_the_shards(dataset: Dataset) -> None:
    loader = DataLoader(open_as_webdataset(dataset.url), batch_size=None, num_workers=2)
    assert sorted(sample["__key__"] for sample in loader) == sorted(
        keys_of(open_as_webdataset(dataset.url))
    )


def test_ranks_share_the_shards(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = keys_of(open_as_webdataset(dataset.url))
    shares = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(keys_of(open_as_webdataset(dataset.url)))
    assert all(shares)
    assert sorted(shares[0] + shares[1]) == sorted(whole)


def test_a_seed_shuffles_the_shards_anew_each_epoch_and_alike_each_time(dataset: Dataset) -> None:
    one, other = (open_as_webdataset(dataset.url, shuffle_seed=1) for _ in range(2))
    epochs = [tuple(keys_of(one)) for _ in range(4)]
    assert len(set(epochs)) > 1
    assert epochs == [tuple(keys_of(other)) for _ in range(4)]


def test_shards_on_s3_come_through_the_checked_cache(
    dataset: Dataset, s3_url: str, tmp_path: Path
) -> None:
    remote, cache = copied(dataset, s3_url), tmp_path / "cache"
    for _ in range(2):
        assert keys_of(open_as_webdataset(s3_url, cache=cache)) == keys_of(
            open_as_webdataset(dataset.url)
        )
        for shard in remote.shards("train"):
            remote.store.delete(shard.name)
    assert len(list(cache.iterdir())) == len(COUNTS)


@pytest.mark.parametrize("place", ["file", "cache"])
def test_no_sample_of_a_shard_with_another_digest_is_given_out(
    dataset: Dataset, tmp_path: Path, place: str, request: pytest.FixtureRequest
) -> None:
    url = str(tmp_path / "set") if place == "file" else request.getfixturevalue("s3_url")
    shard = copied(dataset, url).shards("train")[1]
    cache = tmp_path / "cache"
    if place == "cache":
        keys_of(open_as_webdataset(url, cache=cache))
    broken = cache / f"{shard.sha256}.tar" if place == "cache" else Path(url, shard.name)
    data = bytearray(broken.read_bytes())
    data[700] ^= 1
    broken.write_bytes(data)
    samples = iter(open_as_webdataset(url, cache=cache))
    assert len(list(islice(samples, COUNTS[0]))) == COUNTS[0]
    with pytest.raises(ShardError, match=f"{shard.name} has other content than was written"):
        next(samples)


@few_cores
def test_the_lines_of_the_documentation_run(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    indented = re.findall(r"^    (.*)$", webdataset_pipeline.__doc__ or "", re.MULTILINE)
    assert len(indented) == 5
    lines = "\n".join(indented).replace("s3://bucket/datasets/places2", dataset.url)
    exec(lines, {})
    assert len(capsys.readouterr().out.splitlines()) == sum(COUNTS)
