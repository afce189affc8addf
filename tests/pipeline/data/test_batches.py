"""The order of training is the same for every world size, thread count and interruption."""

import io
import itertools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.masks import MaskSampler, MaskSettings
from data_prep.shards import Dataset, ShardError
from pipeline.data.batch import Batch
from pipeline.data.batches import TrainLoader, val_batches
from tests.pipeline.data.tiny_dataset import copied, image_of, sample_of, shards_of, write_dataset

SIZE = 32
SHARD_COUNTS = (9, 4, 13, 8, 7)  # 41 images
GLOBAL_BATCH = 8
STEPS_PER_EPOCH = 5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("tiny")
    shards = [*shards_of(SHARD_COUNTS, "train"), *shards_of((5, 6), "val")]
    write_dataset(str(folder / "set"), folder / "made", shards)
    return Dataset.open(str(folder / "set"))


def loader_of(dataset: Dataset, **changes: Any) -> TrainLoader:
    arguments: dict[str, Any] = {
        "size_px": SIZE,
        "global_batch": GLOBAL_BATCH,
        "streams": 4,
        "shuffle_block": 6,
        "seed": 3,
        "masks": MaskSampler(MaskSettings({"corrected": 1.0})),
        "flip": True,
    }
    return TrainLoader(dataset, **arguments | changes)


Step = tuple[int, int, Batch]


def first_batches(loader: TrainLoader, steps: int, epoch: int = 0, step: int = 0) -> list[Step]:
    with loader:
        return list(itertools.islice(loader.batches(epoch, step), steps))


def joined(parts: Sequence[Batch]) -> Batch:
    """The global batch of the ranks' parts."""
    return Batch(
        torch.cat([part.image for part in parts]),
        torch.cat([part.mask for part in parts]),
        torch.cat([part.sketch for part in parts]),
        tuple(key for part in parts for key in part.keys),
    )


def assert_same(one: Batch, other: Batch) -> None:
    assert one.keys == other.keys
    assert torch.equal(one.image, other.image)
    assert torch.equal(one.mask, other.mask)
    assert torch.equal(one.sketch, other.sketch)


@pytest.fixture(scope="module")
def undisturbed(dataset: Dataset) -> list[Step]:
    """Two epochs and a half, on one rank with one thread."""
    return first_batches(loader_of(dataset, threads=1), 12)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_global_batches_are_the_same_for_every_world_size_and_thread_count(
    dataset: Dataset, undisturbed: list[Step], world_size: int, threads: int
) -> None:
    ranks = [
        first_batches(loader_of(dataset, rank=rank, world_size=world_size, threads=threads), 12)
        for rank in range(world_size)
    ]
    for expected, *parts in zip(undisturbed, *ranks, strict=True):
        assert all(part[:2] == expected[:2] for part in parts)
        assert_same(joined([part[2] for part in parts]), expected[2])


@pytest.mark.parametrize("done", range(1, 12))
def test_going_on_from_any_step_continues_the_same_sequence(
    dataset: Dataset, undisturbed: list[Step], done: int
) -> None:
    epoch, step = undisturbed[done - 1][:2]
    resumed = first_batches(
        loader_of(dataset, threads=2, rank=1, world_size=2), 12 - done, epoch, step + 1
    )
    for expected, found in zip(undisturbed[done:], resumed, strict=True):
        assert found[:2] == expected[:2]
        half = GLOBAL_BATCH // 2
        _, _, batch = expected
        second_half = Batch(
            batch.image[half:], batch.mask[half:], batch.sketch[half:], batch.keys[half:]
        )
        assert_same(found[2], second_half)


def test_positions_count_steps_within_epochs(undisturbed: list[Step]) -> None:
    expected = [divmod(number, STEPS_PER_EPOCH) for number in range(12)]
    assert [(epoch, step) for epoch, step, _ in undisturbed] == expected


def test_an_epoch_shows_no_image_twice_and_leaves_out_less_than_a_batch(
    undisturbed: list[Step],
) -> None:
    for epoch in (0, 1):
        keys = [key for e, _, batch in undisturbed if e == epoch for key in batch.keys]
        assert len(keys) == len(set(keys)) == STEPS_PER_EPOCH * GLOBAL_BATCH
        assert sum(SHARD_COUNTS) - len(keys) < GLOBAL_BATCH


def test_epochs_differ_in_order_crops_and_masks(undisturbed: list[Step]) -> None:
    first, second = (
        {
            key: (batch.image[i], batch.mask[i])
            for e, _, batch in undisturbed
            if e == epoch
            for i, key in enumerate(batch.keys)
        }
        for epoch in (0, 1)
    )
    assert list(first) != list(second)
    both = first.keys() & second.keys()
    assert sum(torch.equal(first[key][0], second[key][0]) for key in both) < len(both) / 4
    assert sum(torch.equal(first[key][1], second[key][1]) for key in both) < len(both) / 4


def test_crop_and_mask_of_a_image_depend_on_its_key_and_epoch_alone(
    dataset: Dataset, undisturbed: list[Step]
) -> None:
    def by_key(steps: list[Step]) -> dict[str, tuple[torch.Tensor, ...]]:
        return {
            key: (batch.image[i], batch.mask[i], batch.sketch[i])
            for epoch, _, batch in steps
            if epoch == 0
            for i, key in enumerate(batch.keys)
        }

    other = by_key(first_batches(loader_of(dataset, global_batch=6, streams=2), 6))
    for key, expected in by_key(undisturbed).items():
        for one, two in zip(expected, other.get(key, expected), strict=True):
            assert torch.equal(one, two)


def test_another_seed_gives_another_order(dataset: Dataset, undisturbed: list[Step]) -> None:
    other = first_batches(loader_of(dataset, seed=4), 2)
    assert other[0][2].keys != undisturbed[0][2].keys


def test_one_mask_for_the_whole_global_batch_where_asked(dataset: Dataset) -> None:
    steps = [
        first_batches(loader_of(dataset, mask_per_sample=False, rank=rank, world_size=2), 3)
        for rank in range(2)
    ]
    masks = [joined([a[2], b[2]]).mask for a, b in zip(*steps, strict=True)]
    for mask in masks:
        assert (mask == mask[0]).all()
    assert not torch.equal(masks[0], masks[1])


def test_crops_show_what_is_stored_and_the_sketch_moves_with_the_image(
    dataset: Dataset, undisturbed: list[Step]
) -> None:
    mirrored = 0
    for _, _, batch in undisturbed[:STEPS_PER_EPOCH]:
        for image, sketch, key in zip(batch.image, batch.sketch, batch.keys, strict=True):
            number = int(key[-3:])
            assert float(image[..., 2].double().mean()) == pytest.approx(number * 3, abs=2)
            whole, strokes = image_of(number, 40, 56)
            flip = bool(image[0, 0, 0] > image[0, -1, 0])
            mirrored += flip
            if flip:
                image, sketch = image.flip(1), sketch.flip(1)
            left, top = (  # from the first column and row of the two ramps
                int(np.abs(whole[0, :, 0] - float(image[:, 0, 0].double().mean())).argmin()),
                int(np.abs(whole[:, 0, 1] - float(image[0, :, 1].double().mean())).argmin()),
            )
            expected = whole[top : top + SIZE, left : left + SIZE]
            assert np.abs(image.numpy().astype(int) - expected).mean() < 3
            split = int(np.argmax(strokes[0])) - left
            assert int(sketch[0].argmax()) == pytest.approx(split, abs=2)
            assert set(sketch.unique().tolist()) <= {0, 1}
    assert 10 < mirrored < 30


def test_images_smaller_than_the_crop_are_scaled_up(tmp_path: Path) -> None:
    samples = [sample_of(i, height=20, width=30) for i in range(4)]
    write_dataset(str(tmp_path / "set"), tmp_path / "made", [("train", samples)])
    loader = loader_of(Dataset.open(str(tmp_path / "set")), global_batch=4, flip=False)
    ((_, _, batch),) = first_batches(loader, 1)
    assert batch.image.shape == (4, SIZE, SIZE, 3)
    whole = batch.image[0, :, :, 1].double().mean(1)  # the ramp over the full height
    assert whole[0] < 6
    assert whole[-1] > 180


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"world_size": 5}, "5 ranks cannot share 4 streams: start at most 4"),
        ({"global_batch": 6}, "a global batch of 6 cannot take equally many samples"),
        ({"global_batch": 64}, "41 training images cannot fill one global batch of 64"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    dataset: Dataset, changes: dict[str, int], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        loader_of(dataset, **changes)


def names_of_threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith(("decode", "shard"))}


def test_closing_ends_the_threads(dataset: Dataset) -> None:
    loader = loader_of(dataset, threads=2)
    next(loader.batches())
    assert names_of_threads()
    loader.close()
    assert not names_of_threads()


# Damage


def damaged(dataset: Dataset, folder: Path, change: Any) -> Dataset:
    """A copy of the dataset with one train shard's bytes changed."""
    for path in Path(dataset.url).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    shard = folder / "tiny-train-000002.tar"
    shard.write_bytes(change(shard.read_bytes()))
    return Dataset.open(str(folder))


def all_batches(dataset: Dataset, **changes: Any) -> list[Step]:
    return first_batches(loader_of(dataset, **changes), STEPS_PER_EPOCH)


def test_a_truncated_shard_is_an_error_that_names_it(dataset: Dataset, tmp_path: Path) -> None:
    cut = damaged(dataset, tmp_path, lambda data: data[:-3000])
    with pytest.raises(ShardError, match=r"tiny-train-000002\.tar has \d+ bytes instead of"):
        all_batches(cut)


def test_a_shard_with_too_few_samples_is_an_error_that_names_it(
    dataset: Dataset, tmp_path: Path
) -> None:
    def ends_early(data: bytes) -> bytes:
        # the tar's end moves to the third sample, the length stays
        third = data.index(b"class/p015.jpg")
        return data[:third] + bytes(len(data) - third)

    short = damaged(dataset, tmp_path, ends_early)
    with pytest.raises(ShardError, match=r"tiny-train-000002\.tar has 2 samples instead of 13"):
        all_batches(short)


def test_a_damaged_image_is_an_error_that_names_shard_and_key(
    dataset: Dataset, tmp_path: Path
) -> None:
    def overwritten(data: bytes) -> bytes:
        begin = data.index(b"class/p015.jpg") + 512 + 200
        return data[:begin] + bytes(400) + data[begin + 400 :]

    broken = damaged(dataset, tmp_path, overwritten)
    with pytest.raises(ShardError, match=r"tiny-train-000002\.tar: the image of class/p015 is"):
        all_batches(broken, global_batch=41, streams=1)


def test_a_damaged_sketch_is_an_error_that_names_shard_and_key(
    dataset: Dataset, tmp_path: Path
) -> None:
    def overwritten(data: bytes) -> bytes:
        begin = data.index(b"class/p015.sketch.png") + 512
        return data[:begin] + bytes(60) + data[begin + 60 :]

    broken = damaged(dataset, tmp_path, overwritten)
    with pytest.raises(ShardError, match=r"tiny-train-000002\.tar: the sketch of class/p015 is"):
        all_batches(broken, global_batch=41, streams=1)


# S3


def test_shards_on_s3_give_the_same_batches(
    dataset: Dataset, undisturbed: list[Step], s3_url: str, tmp_path: Path
) -> None:
    remote = loader_of(copied(dataset, s3_url), cache=tmp_path / "cache")
    for expected, found in zip(undisturbed, first_batches(remote, 12), strict=True):
        assert_same(found[2], expected[2])


# Validation


def val_of(dataset: Dataset, **changes: Any) -> Iterator[Batch]:
    arguments: dict[str, Any] = {
        "size_px": SIZE,
        "batch": 2,
        "masks": MaskSampler(MaskSettings({"corrected": 1.0})),
        "seed": 3,
    }
    return val_batches(dataset, **arguments | changes)


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
def test_ranks_share_the_held_out_images_without_duplicates(
    dataset: Dataset, world_size: int
) -> None:
    alone = joined(list(val_of(dataset, batch=11)))
    parts = [
        part
        for rank in range(world_size)
        for part in val_of(dataset, rank=rank, world_size=world_size, threads=2)
    ]
    assert_same(joined(parts), alone)
    assert len(set(alone.keys)) == 11


@pytest.mark.parametrize("limit", [1, 2, 11])
def test_the_first_rank_has_an_image_where_any_rank_has_one(dataset: Dataset, limit: int) -> None:
    counts = [
        sum(len(batch.keys) for batch in val_of(dataset, rank=rank, world_size=12, limit=limit))
        for rank in range(12)
    ]
    assert counts[0] == 1
    assert sum(counts) == limit


def test_held_out_images_are_center_crops_of_what_is_stored(dataset: Dataset) -> None:
    batch = next(val_of(dataset))
    sample = next(iter(dataset.read(dataset.shards("val")[0])))
    whole = np.asarray(Image.open(io.BytesIO(sample.jpg)))
    center = whole[4 : 4 + SIZE, 12 : 12 + SIZE].astype(int)
    assert (
        np.abs(batch.image[0].numpy().astype(int) - center).max() <= 4
    )  # decoders differ a little
    assert batch.keys[0] == sample.key


def test_only_so_many_held_out_images_where_a_limit_is_given(dataset: Dataset) -> None:
    assert [len(batch.keys) for batch in val_of(dataset, limit=5)] == [2, 2, 1]
    assert not list(val_of(dataset, limit=0))


def test_an_abandoned_validation_ends_its_threads(dataset: Dataset) -> None:
    batches = val_of(dataset)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not names_of_threads()
