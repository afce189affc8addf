"""Ranks that are slow, and ranks whose weights are not those of the others."""

import socket
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from pipeline import ranks as distributed

Mark: TypeAlias = float | torch.cuda.Event
SLOW_TIMES = 1.5  # as long as the median of the other ranks
SLOW_MS = 5.0  # and so much longer
SLOW_REPORTS = 3  # in a row


def mark(device: torch.device) -> Mark:
    """This moment in the work of ``device``; nothing waits for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def elapsed_ms(start: Mark, end: Mark) -> float:
    """Between two marks of one device, which has passed both."""
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return float(start.elapsed_time(end))
    assert isinstance(end, float)
    return 1000 * (end - start)


class OwnTime:
    """How long this rank takes for what it does alone: waiting for data, and the forward pass.

    A whole step takes equally long on all ranks, since the fast ones wait for the slow.
    """

    KEPT = 20

    def __init__(self) -> None:
        self._passes: deque[tuple[Mark, Mark]] = deque(maxlen=self.KEPT)

    def add(self, passed: tuple[Mark, Mark]) -> None:
        self._passes.append(passed)

    def read_ms(self) -> float:
        """Mean forward pass of the last steps, which the device has finished."""
        found = [elapsed_ms(*each) for each in self._passes]
        self._passes.clear()
        return statistics.fmean(found) if found else 0.0


@dataclass(frozen=True)
class RankTimes:
    """What a rank reports about itself."""

    host: str
    forward_ms: float
    """Of its own forward pass, for an average share of the batch."""
    wait_ms: float
    """For data, in each step."""
    peak_bytes: int
    """The most memory of its device, or of the process on a CPU."""

    @property
    def own_ms(self) -> float:
        return self.forward_ms + self.wait_ms


def own_times(forward_ms: float, wait_ms: float, device: torch.device) -> RankTimes:
    return RankTimes(socket.gethostname(), forward_ms, wait_ms, _peak_bytes(device))


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # unknown to Windows

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@dataclass
class SlowRanks:
    """Names ranks that keep the others waiting at several reports in a row."""

    _reports: Counter[int] = field(default_factory=Counter)

    def look(self, times: Sequence[RankTimes]) -> list[str]:
        """A sentence for each rank that has now been slow for ``SLOW_REPORTS`` reports."""
        found = []
        for rank, mine in enumerate(times):
            others = [each.own_ms for other, each in enumerate(times) if other != rank]
            usual = statistics.median(others) if others else mine.own_ms
            slow = mine.own_ms > max(SLOW_TIMES * usual, usual + SLOW_MS)
            self._reports[rank] = self._reports[rank] + 1 if slow else 0
            if self._reports[rank] == SLOW_REPORTS:
                found.append(
                    f"rank {rank} on {mine.host} is slow: it waits {mine.wait_ms:.0f} ms for data "
                    f"and computes {mine.forward_ms:.0f} ms forward, together {mine.own_ms:.0f} "
                    f"where the other ranks take {usual:.0f}; all wait for it"
                )
        return found


def metrics(times: Sequence[RankTimes]) -> dict[str, float]:
    """The slowest rank, how far it is behind, and the largest peak of memory."""
    own = [each.own_ms for each in times]
    slowest = own.index(max(own))
    return {
        "speed/slowest_rank": float(slowest),
        "speed/slowest_rank_ms": own[slowest],
        "speed/median_rank_ms": statistics.median(own),
        "speed/peak_memory_gib": max(each.peak_bytes for each in times) / 2**30,
    }


def different_replicas(networks: Mapping[str, Iterable[Tensor]]) -> str | None:
    """Which ranks hold other weights than most, bit by bit; None where all are equal.

    Collective; waits for the device. The answer is the same on all ranks.
    """
    sums = {name: _checksum(tensors) for name, tensors in networks.items()}
    everywhere = distributed.gathered((socket.gethostname(), sums))
    hosts = [host for host, _ in everywhere]
    for name in sums:
        values = [found[name] for _, found in everywhere]
        counts = Counter(values).most_common()
        if len(counts) == 1:
            continue
        tie = counts[0][1] == counts[1][1]
        odd = [r for r, value in enumerate(values) if tie or value != counts[0][0]]
        named = ", ".join(f"{rank} ({hosts[rank]})" for rank in odd)
        return f"the {name} of rank {named} differs from that of the others"
    return None


def _checksum(tensors: Iterable[Tensor]) -> int:
    """Of every bit of float32 tensors; equal for equal weights in any layout."""
    sums = [tensor.detach().view(torch.int32).sum(dtype=torch.int64) for tensor in tensors]
    places = torch.arange(1, len(sums) + 1, device=sums[0].device)
    return int((torch.stack(sums) * places).sum())
