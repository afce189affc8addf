"""Every number of ranks from one to the number of streams trains on the same global batches."""

from typing import Literal

import pytest
import torch

from models import Discriminator, Generator
from pipeline import ranks as distributed
from pipeline.data.batch import Batch
from pipeline.engine import Adam, build_engine
from pipeline.ranks import Ranks
from pipeline.step import train_step
from tests.distributed import on_ranks

STREAMS = 4
STEPS = 2
SIDE = 32


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 16])
def test_the_shares_of_ranks_cover_the_streams_in_order(world_size):
    ranks = [Ranks(rank, world_size=world_size) for rank in range(world_size)]
    shares = [rank.share(16) for rank in ranks]
    assert [stream for share in shares for stream in share] == list(range(16))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert sum(rank.weight(16) for rank in ranks) == pytest.approx(world_size)
    if 16 % world_size == 0:
        assert {rank.weight(16) for rank in ranks} == {1.0}  # bit-equal: nothing is multiplied


def losses(kind: Literal["ddp", "deepspeed"]) -> list[dict[str, float]]:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    device = torch.device("cpu")
    ranks = distributed.current()
    mine, weight = ranks.share(STREAMS), ranks.weight(STREAMS)
    networks = (Generator(guided=False, width=8), Discriminator(guided=False, width=8))
    engines = [
        build_engine(kind, network, adam=Adam(1e-3), ranks=ranks, weight=weight)
        for network in networks
    ]
    found = []
    for step in range(STEPS):
        rng = torch.Generator().manual_seed(step)
        image = torch.randint(256, (STREAMS, SIDE, SIDE, 3), generator=rng, dtype=torch.uint8)
        mask = torch.zeros(STREAMS, SIDE, SIDE, dtype=torch.uint8)
        for sample in range(STREAMS):
            mask[sample, 2 * sample : 10 + 4 * sample, 4:20] = 1
        part = slice(mine.start, mine.stop)
        batch = Batch(image[part], mask[part], torch.zeros_like(mask[part]), tuple("abcd"[part]))
        values = train_step(batch.to(device), *engines)
        found.append(distributed.mean(values.losses, device, weight=weight))
    return found


@pytest.fixture(scope="module")
def alone() -> list[dict[str, float]]:
    return losses("ddp")


@pytest.mark.parametrize("world_size", [3, 4])  # test_engine.py has two
def test_any_number_of_ranks_loses_alike_under_ddp(alone, world_size):
    for found in on_ranks(world_size, losses, "ddp"):
        for here, there in zip(found, alone, strict=True):
            assert here == pytest.approx(there, rel=1e-4, abs=1e-5)


def test_three_ranks_lose_alike_under_deepspeed(alone):
    for found in on_ranks(3, losses, "deepspeed"):
        for here, there in zip(found, alone, strict=True):
            assert here == pytest.approx(there, rel=1e-4, abs=1e-5)
