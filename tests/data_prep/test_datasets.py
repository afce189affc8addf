"""Datasets as Hugging Face's ``datasets`` reads them, from local files and without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cluster.storage import open_store
from data_prep.files import SourceImage
from data_prep.images import decode, decode_sketch
from data_prep.manifest import ShardRecord, publish, write_record
from data_prep.samples import ImageBatch, make_samples
from data_prep.shards import Dataset, RawSample, plan, shard_name, write_shard
from tests.data_prep.settings import SAMPLE_SETTINGS, list_source, read_listed

CALLED = {"train": "train", "validation": "val"}


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The library; whatever it would keep is kept in a folder of the test run."""
    home = tmp_path_factory.mktemp("hugging_face")
    with pytest.MonkeyPatch.context() as patch:
        # Both are read when it is imported.
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(home))
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        datasets.disable_progress_bars()
        yield datasets


def made(url: Path, subjects: set[str]) -> Dataset:
    """A dataset of some of the bundled photographs; bright parts stand for edges."""

    def start_edges(images: ImageBatch) -> Any:
        return lambda: (images[..., 0] > 128).astype(np.uint8)

    images = [p for p in list_source("bundled") if p.subject in subjects]
    url.mkdir()
    store, records = open_store(str(url)), []
    for split in ("train", "val"):
        of_split = {image.key: image for image in images if image.split == split}
        for number, keys in enumerate(plan(of_split, shard_samples=16, seed=0)):
            chosen: list[SourceImage] = [of_split[key] for key in keys]
            name = shard_name("small", split, number)
            made_of = list(
                make_samples(chosen, SAMPLE_SETTINGS, read=read_listed, start_edges=start_edges)
            )
            rows = [
                row | {"shard": name, "index_in_shard": i} for i, (row, _) in enumerate(made_of)
            ]
            samples = [sample for _, sample in made_of if sample is not None]
            shard = write_shard(url / name, samples, split=split, name=name)
            record = ShardRecord.of(
                shard,
                rows,
                plan="",
                root=None,
                sample_settings=SAMPLE_SETTINGS.record(),
                excluded={},
            )
            write_record(store, record, rows)
            records.append(record)
    publish(
        store,
        records,
        name="small",
        license="as the photographs",
        requested={"source": "bundled"},
        shaping=SAMPLE_SETTINGS.record(),
        duplicates=0,
    )
    return Dataset.open(str(url))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return made(tmp_path_factory.mktemp("scenes") / "set", {"scene"})


def assert_same(read: Any, dataset: Dataset) -> None:
    """Every split holds every sample, in order, as it is in the shards."""
    assert set(read) == set(CALLED)
    for called, split in CALLED.items():
        shards = [shard for shard in dataset.index if shard.split == split]
        written = [sample for shard in shards for sample in dataset.read(shard)]
        found = list(read[called])
        assert [row["__key__"] for row in found] == [sample.key for sample in written]
        for row, sample in zip(found, written, strict=True):
            assert_same_sample(row, sample)


def assert_same_sample(row: dict[str, Any], sample: RawSample) -> None:
    # Pillow may round a value of a JPEG otherwise than we do.
    difference = np.asarray(row["jpg"]).astype(int) - decode(sample.jpg).pixels
    assert np.abs(difference).max() <= 3
    assert row["sketch.png"].mode == "L"
    assert (np.asarray(row["sketch.png"]) == 255 * decode_sketch(sample.sketch)).all()
    assert row["json"] == json.loads(sample.meta)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_shards_open_as_plain_webdataset_files(
    hugging_face: ModuleType, scenes: Dataset, streaming: bool
) -> None:
    files = {name: f"{scenes.url}/small-{split}-*.tar" for name, split in CALLED.items()}
    read = hugging_face.load_dataset("webdataset", data_files=files, streaming=streaming)
    assert_same(read, scenes)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_the_folder_opens_by_its_card_with_scenes_and_faces_mixed(
    hugging_face: ModuleType, tmp_path: Path, streaming: bool
) -> None:
    """The card states the types, which cannot be inferred: the first samples are scenes."""
    dataset = made(tmp_path / "set", {"scene", "face"})
    assert set(dataset.counts["sketches"]) == {"hed", "landmarks68"}
    read = hugging_face.load_dataset(dataset.url, streaming=streaming)
    assert_same(read, dataset)
