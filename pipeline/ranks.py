"""Which rank this process is, and the few things that ranks do together."""

import os
import socket
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from pipeline.errors import TrainingError

T = TypeVar("T")
Device: TypeAlias = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Ranks:
    """One process in the process group; a plain single process is rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    machine: int = 0
    """Number of the node that this rank runs on."""
    kind: Device = "auto"
    """What the rank computes on; ``auto``: a GPU where the node has one."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The CPU, or the GPU of this local rank. Raises TrainingError without a GPU."""
        if self.kind == "cpu" or (self.kind == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise TrainingError(
                f"torch finds no GPU on {socket.gethostname()}: install its CUDA build and a "
                "driver, or set train.device=cpu"
            )
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    def share(self, streams: int) -> range:
        """The streams that this rank serves; the ranks' shares follow one another."""
        first, last = (number * streams // self.world_size for number in (self.rank, self.rank + 1))
        return range(first, last)

    def weight(self, streams: int) -> float:
        """Samples of this rank over those of an average one; 1 where all have equally many.

        The mean over ranks of ``weight`` times a rank's own mean is the mean over all samples.
        """
        return self.world_size * len(self.share(streams)) / streams


def launched_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def join_torchrun(backend: str, timeout: timedelta = default_pg_timeout) -> None:
    """Form the process group of torchrun's ranks, in every attempt of ``--max-restarts``.

    Torch 2.13 keeps one store for all attempts, in which ranks would read what those before them
    wrote (pytorch#135712). So each attempt has keys of its own.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    attempt = dist.PrefixStore(  # type: ignore[attr-defined]
        os.environ["TORCHELASTIC_RESTART_COUNT"], store
    )
    dist.init_process_group(
        backend, store=attempt, rank=rank, world_size=world_size, timeout=timeout
    )


def current(
    local_rank: int | None = None, machine: int | None = None, device: Device = "auto"
) -> Ranks:
    """Rank and world size of the process group that exists now.

    ``local_rank`` and ``machine`` come from Ray Train, or from torchrun's environment.
    """
    if not dist.is_initialized():
        return Ranks(kind=device)
    if local_rank is None:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if machine is None:
        machine = int(os.environ.get("GROUP_RANK", "0"))
    return Ranks(dist.get_rank(), local_rank, dist.get_world_size(), machine, device)


@contextmanager
def sharing_work() -> Iterator[Ranks]:
    """Torchrun's ranks, in a process group that carries results; else this process alone."""
    if not launched_by_torchrun() or dist.is_initialized():
        yield current()
        return
    join_torchrun("gloo")
    try:
        yield current()
    finally:
        dist.destroy_process_group()


def gathered_on_first(value: T) -> list[T] | None:
    """The value of every rank, in their order; None on all ranks except the first."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values


class Vote:
    """Yes-or-no questions that all ranks put at every step; any rank's yes is the answer.

    The answer is that of two steps ago, the same on every rank. It travels between CPUs
    while training continues, so nobody waits for a device, and hardly for other ranks. Collective:
    all ranks make one, and ask equally often.
    """

    DELAY = 2

    def __init__(self, timeout: timedelta) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=timeout) if several else None
        self._open: deque[tuple[torch.Tensor, dist.Work]] = deque()

    def ask(self, *mine: bool) -> tuple[bool, ...]:
        if self._group is None:
            return mine
        votes = torch.tensor(mine, dtype=torch.int32)
        work = dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._open.append((votes, work))
        if len(self._open) <= self.DELAY:
            return tuple(False for _ in mine)
        return self._answer()

    def close(self) -> None:
        """Wait for the answers that nobody has read."""
        while self._open:
            self._answer()

    def _answer(self) -> tuple[bool, ...]:
        votes, work = self._open.popleft()
        work.wait()
        return tuple(bool(vote) for vote in votes)


def mean(
    values: Mapping[str, torch.Tensor | float], device: torch.device, *, weight: float = 1.0
) -> dict[str, float]:
    """Mean of each scalar over all ranks; every rank calls it with the same names.

    ``weight`` is that of this rank's values, see ``Ranks.weight``. The values leave the device
    here, in one transfer.
    """
    stacked = torch.stack(
        [torch.as_tensor(value, dtype=torch.float32, device=device) for value in values.values()]
    )
    if dist.is_initialized():
        if weight != 1:
            stacked *= weight
        dist.all_reduce(stacked)
        stacked /= dist.get_world_size()
    return dict(zip(values, stacked.tolist(), strict=True))


def largest(values: torch.Tensor) -> torch.Tensor:
    """``values``, each replaced by the largest over all ranks; stays on the device."""
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def total_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The sum of ``value`` over all ranks; stays on the device."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def total(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Sum of each scalar over all ranks, in double precision."""
    stacked = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(stacked)
    return dict(zip(values, stacked.tolist(), strict=True))


def gathered(value: T) -> list[T]:
    """The value of every rank, in their order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """The value of rank 0, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
