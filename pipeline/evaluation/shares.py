"""Measurements in shares: one on each rank, or on each GPU of the cluster."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from cluster.session import run_on_gpus
from pipeline import ranks as distributed
from pipeline.ranks import Device

R = TypeVar("R")


def measured_in_shares(measure: Callable[[int, int], R], device: Device) -> list[R] | None:
    """``measure(share, shares)`` for every share, in order: one on each of torchrun's ranks, or on
    each GPU of the cluster, or a single one here. None on all ranks except the first."""
    if dist.is_initialized():
        ranks = distributed.current()
        return distributed.gathered_on_first(measure(ranks.rank, ranks.world_size))
    return [measure(0, 1)] if device == "cpu" else run_on_gpus(measure)
