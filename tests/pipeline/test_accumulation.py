"""Gradients that add up over parts of a batch make the update of the whole batch."""

from typing import Literal

import pytest
import torch

from models import Discriminator, Generator
from pipeline import ranks as distributed
from pipeline.data.batch import DeviceBatch
from pipeline.engine import Adam, Engine, build_engine
from pipeline.step import train_step
from tests.distributed import on_ranks

STREAMS = 5
SIDE = 32
ENGINES: tuple[tuple[Literal["ddp", "deepspeed"], Literal[0, 1, 2]], ...] = (
    ("ddp", 1),
    ("deepspeed", 0),
    ("deepspeed", 1),
    ("deepspeed", 2),
)


def batch(step: int, part: range, dtype: torch.dtype) -> DeviceBatch:
    rng = torch.Generator().manual_seed(step)
    image = torch.rand(STREAMS, 3, SIDE, SIDE, generator=rng, dtype=torch.float64) * 2 - 1
    mask = torch.zeros(STREAMS, 1, SIDE, SIDE)
    for sample in range(STREAMS):
        mask[sample, :, 2 * sample : 10 + 4 * sample, 4:20] = 1
    image, mask = (tensor[part.start : part.stop].to(dtype) for tensor in (image, mask))
    return DeviceBatch(image, mask, torch.zeros_like(mask), tuple("abcde"[part.start : part.stop]))


def trained(
    micro_batches: int,
    dtype: torch.dtype = torch.float32,
    *,
    steps: int = 1,
    kind: Literal["ddp", "deepspeed"] = "ddp",
    zero_stage: Literal[0, 1, 2] = 1,
) -> dict[str, torch.Tensor]:
    """Weights, moments and the vectors of the spectral norm of both networks."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    ranks = distributed.current()
    engines: list[Engine] = [
        build_engine(
            kind,
            network.to(dtype),
            adam=Adam(),
            ranks=ranks,
            weight=ranks.weight(STREAMS),
            zero_stage=zero_stage,
        )
        for network in (Generator(width=8), Discriminator())
    ]
    for step in range(steps):
        mine = batch(step, ranks.share(STREAMS), dtype)
        assert train_step(mine, *engines, micro_batches=micro_batches).bad == 0
    found: dict[str, torch.Tensor] = {}
    for name, engine in zip(("generator", "discriminator"), engines, strict=True):
        state = engine.state()
        found |= {f"{name}/{key}": value.clone() for key, value in state.weights.items()}
        found |= {f"{name}/{key}": value.clone() for key, value in state.moments.items()}
        found[f"{name}/grad norm"] = distributed.total_over_ranks(
            engine.squared_grad_norm.clone() * ranks.weight(STREAMS) / ranks.world_size
        )
    return found


def with_every_engine() -> list[dict[str, torch.Tensor]]:
    return [trained(2, kind=kind, zero_stage=stage) for kind, stage in ENGINES]


@pytest.mark.slow
def test_parts_of_a_batch_add_up_to_its_update() -> None:
    # In double precision, where rounding cannot hide what is missing.
    whole = trained(1, torch.float64, steps=2)
    parts = trained(2, torch.float64, steps=2)  # of two images and of three
    for name, value in whole.items():
        if value.is_floating_point() and "grad norm" not in name:
            torch.testing.assert_close(parts[name], value, atol=1e-10, rtol=1e-8, msg=name)


def test_more_parts_than_images_are_one_for_each_image() -> None:
    assert [part.keys for part in batch(0, range(3), torch.float32).split(9)] == [
        ("a",),
        ("b",),
        ("c",),
    ]
    assert [len(part.image) for part in batch(0, range(5), torch.float32).split(2)] == [2, 3]


@pytest.mark.slow
def test_every_engine_adds_up_alike_on_unequal_ranks() -> None:
    alone = trained(1)
    for rank in on_ranks(2, with_every_engine):
        for found in rank:
            for network in ("generator", "discriminator"):
                norm = f"{network}/grad norm"
                torch.testing.assert_close(found[norm], alone[norm], rtol=2e-5, atol=0)
                means = [name for name in alone if name.startswith(f"{network}/exp_avg.")]
                here, there = (
                    torch.cat([values[name].flatten() for name in means])
                    for values in (found, alone)
                )
                assert (here - there).norm() < 1e-5 * there.norm()
                for name in alone:
                    if name.startswith(network) and name.endswith("_u"):
                        torch.testing.assert_close(found[name], alone[name], atol=1e-6, rtol=0)
