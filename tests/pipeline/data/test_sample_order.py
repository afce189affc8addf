"""The order of training is a function of integers, and so is what fits a dataset."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.sample_order import SampleOrder, dataset_misfits


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(lambda c: sum(c) >= 12),
    streams=st.sampled_from([1, 2, 3, 4, 6]),
    shuffle_block=st.integers(1, 40),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 9),
)
def test_the_order_deals_every_sample_once_and_knows_its_shards_ahead(
    counts: list[int], streams: int, shuffle_block: int, epoch: int, seed: int
) -> None:
    def new_order() -> SampleOrder:
        return SampleOrder(
            counts, streams=streams, global_batch=12, shuffle_block=shuffle_block, seed=seed
        )

    order, refs = new_order(), []
    for step in range(order.steps):
        for stream in range(streams):
            given = order.samples(epoch, step, stream)
            assert len(given) == 12 // streams
            assert {ref.shard for ref in given} <= set(order.shards_ahead(epoch, step, stream))
            assert given == new_order().samples(epoch, step, stream)  # found without what is before
            refs += given
    assert len(refs) == len(set(refs)) == sum(counts) // 12 * 12
    assert all(ref.sample < counts[ref.shard] for ref in refs)
    last = order.shards_ahead(epoch, order.steps - 1, 0)
    assert {ref.shard for ref in order.samples(epoch + 1, 0, 0)} <= set(last)


def test_a_stream_reads_its_shards_one_after_the_other() -> None:
    order = SampleOrder([100] * 16, streams=4, global_batch=8, shuffle_block=50, seed=0)
    for stream in range(4):
        widths = [len(set(order.shards_ahead(0, step, stream))) for step in range(150)]
        assert max(widths) <= 2


FITTING = {
    "train_samples": 41,
    "val_samples": 5,
    "stored_px": 64,
    "size_px": 64,
    "streams": 4,
    "global_batch": 8,
}


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({}, []),
        ({"global_batch": 40}, []),
        ({"global_batch": 44}, ["41 training images cannot fill one global batch of 44"]),
        ({"global_batch": 6}, ["a global batch of 6 cannot take equally many samples from 4"]),
        ({"val_samples": 0}, ["no held-out images: raise data.val_fraction"]),
        ({"stored_px": 63}, ["stored at 63 pixels, fewer than train.size_px 64"]),
        (
            {"train_samples": 0, "val_samples": 0, "size_px": 65},
            ["0 training images cannot", "no held-out images", "fewer than train.size_px 65"],
        ),
    ],
)
def test_every_number_of_a_recipe_that_does_not_fit_the_dataset_is_named(
    changes: dict[str, int], faults: list[str]
) -> None:
    found = dataset_misfits(**(FITTING | changes))
    assert len(found) == len(faults)
    for line, fault in zip(found, faults, strict=True):
        assert fault in line
