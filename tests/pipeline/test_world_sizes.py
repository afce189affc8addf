"""Every number of ranks from one to the number of streams trains on the same global batches."""

from typing import Literal, TypeAlias

import pytest
import torch
import torch.nn.functional as F

from models import Discriminator, Generator
from pipeline import ranks as distributed
from pipeline.data.batch import DeviceBatch
from pipeline.engine import Adam, _weighted, build_engine
from pipeline.ranks import Ranks
from pipeline.step import train_step
from tests.distributed import on_ranks

STREAMS = 4
STEPS = 50
SIDE = 32
RATE = 1e-4  # the paper's; at four times that a last bit grows to percents, see docs/decisions
COMPARED = ("loss/l1_coarse", "loss/l1_refined", "loss/discriminator")

Kind: TypeAlias = tuple[Literal["ddp", "deepspeed"], Literal[0, 1, 2], int]
"""An engine, a ZeRO stage, and in how many parts each rank takes its batch."""
DDP: Kind = ("ddp", 1, 1)
IN_PARTS: Kind = ("ddp", 1, 2)
MORE: dict[int, tuple[Kind, ...]] = {
    2: (IN_PARTS,),
    3: (("deepspeed", 1, 1), ("deepspeed", 2, 1)),  # with unequal shares
}
Losses: TypeAlias = list[dict[str, float]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 16])
def test_the_shares_of_ranks_cover_the_streams_in_order(world_size):
    ranks = [Ranks(rank, world_size=world_size) for rank in range(world_size)]
    shares = [rank.share(16) for rank in ranks]
    assert [stream for share in shares for stream in share] == list(range(16))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert sum(rank.weight(16) for rank in ranks) == pytest.approx(world_size)
    if 16 % world_size == 0:
        assert {rank.weight(16) for rank in ranks} == {1.0}


def test_equal_shares_leave_the_loss_untouched():
    loss = torch.tensor(0.1)
    assert _weighted(loss, 1.0) is loss  # so every bit is as without weights
    assert _weighted(loss, 1.5) == 1.5 * loss


def losses(*kinds: Kind) -> list[Losses]:
    """Of every step of each kind, one kind after the other."""
    return [losses_under(*kind) for kind in kinds]


def losses_under(
    kind: Literal["ddp", "deepspeed"], zero_stage: Literal[0, 1, 2], parts: int
) -> Losses:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    device = torch.device("cpu")
    ranks = distributed.current()
    mine, weight = ranks.share(STREAMS), ranks.weight(STREAMS)
    networks = (Generator(guided=False, width=8), Discriminator(guided=False, width=8))
    engines = [
        build_engine(
            kind, network, adam=Adam(RATE), ranks=ranks, weight=weight, zero_stage=zero_stage
        )
        for network in networks
    ]
    found = []
    for step in range(STEPS):
        rng = torch.Generator().manual_seed(step)
        coarse = torch.rand(STREAMS, 3, 8, 8, generator=rng, dtype=torch.float64) * 2 - 1
        image = F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear").float()
        mask = torch.zeros(STREAMS, 1, SIDE, SIDE)
        for sample in range(STREAMS):
            mask[sample, :, 2 * sample : 10 + 4 * sample, 4:20] = 1
        part = slice(mine.start, mine.stop)
        batch = DeviceBatch(
            image[part], mask[part], torch.zeros_like(mask[part]), tuple("abcd"[part])
        )
        values = train_step(batch, *engines, micro_batches=parts).losses
        means = distributed.mean({name: values[name] for name in COMPARED}, device, weight=weight)
        found.append(means)
    return found


@pytest.fixture(scope="module")
def alone() -> Losses:
    return losses_under(*DDP)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_ranks_loses_alike_for_fifty_steps(alone: Losses, world_size: int) -> None:
    for rank in on_ranks(world_size, losses, DDP, *MORE.get(world_size, ())):
        for found in rank:
            for here, there in zip(found, alone, strict=True):
                assert here == pytest.approx(there, rel=1e-4)


@pytest.mark.slow
def test_parts_of_a_batch_lose_alike_for_fifty_steps(alone: Losses) -> None:
    for here, there in zip(losses_under(*IN_PARTS), alone, strict=True):
        assert here == pytest.approx(there, rel=1e-4)
