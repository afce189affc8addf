"""Run a function on several ranks of a real process group."""

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

PATIENCE_S = 480.0  # on a machine that may be busy

P = ParamSpec("P")
R = TypeVar("R")


def on_ranks(
    world_size: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
) -> list[R]:
    """What ``function`` returns on each rank, in order; gloo on loopback, one process each.

    The first rank that fails makes the call fail with its exception.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        with ProcessPoolExecutor(world_size, mp_context=get_context("spawn")) as pool:
            calls = [
                pool.submit(_rank, rank, world_size, meeting, function, args, kwargs)
                for rank in range(world_size)
            ]
            return [call.result(timeout=PATIENCE_S) for call in calls]


def _rank(
    rank: int,
    world_size: int,
    meeting: Path,
    function: Callable[..., R],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> R:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size
    )
    try:
        return function(*args, **kwargs)
    finally:
        dist.destroy_process_group()
