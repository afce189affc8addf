"""Slow ranks are named, and so are ranks whose weights are not those of the others."""

import pytest
import torch

from pipeline import ranks as distributed
from pipeline.rank_health import (
    OwnTime,
    RankTimes,
    SlowRanks,
    different_replicas,
    elapsed_ms,
    mark,
    metrics,
)
from tests.distributed import on_ranks

GIB = 2**30


def times(*own_ms: float) -> list[RankTimes]:
    return [RankTimes(f"host{r}", ms, 0.0, (r + 1) * GIB) for r, ms in enumerate(own_ms)]


def test_a_rank_that_is_slow_for_some_reports_is_named_once():
    slow = SlowRanks()
    assert [slow.look(times(40, 41, 90, 39)) for _ in range(2)] == [[], []]
    (sentence,) = slow.look(times(40, 41, 90, 39))
    assert sentence.startswith("rank 2 on host2 is slow: it waits 0 ms for data and computes 90 ms")
    assert slow.look(times(40, 41, 90, 39)) == []
    assert slow.look(times(40, 41, 42, 39)) == []
    assert [bool(slow.look(times(40, 41, 90, 39))) for _ in range(3)] == [False, False, True]


def test_small_differences_and_single_ranks_are_passed_over():
    slow = SlowRanks()
    for _ in range(5):
        assert slow.look(times(40, 50)) == []
        assert slow.look(times(1, 3)) == []
        assert slow.look(times(40)) == []


def test_waiting_for_data_makes_a_rank_slow():
    slow, late = SlowRanks(), RankTimes("b", 40, 200, 0)
    for _ in range(2):
        slow.look([RankTimes("a", 40, 0, 0), late])
    (sentence,) = slow.look([RankTimes("a", 40, 0, 0), late])
    assert "rank 1 on b is slow: it waits 200 ms for data" in sentence


def test_the_slowest_rank_and_the_largest_peak_are_metrics():
    assert metrics(times(40, 90, 50)) == {
        "speed/slowest_rank": 1.0,
        "speed/slowest_rank_ms": 90,
        "speed/median_rank_ms": 50,
        "speed/peak_memory_gib": 3.0,
    }


def test_a_rank_times_its_own_passes():
    cpu, own = torch.device("cpu"), OwnTime()
    assert own.read_ms() == 0.0
    own.add((1.0, 1.5))
    own.add((2.0, 2.25))
    assert own.read_ms() == 375.0
    assert elapsed_ms(mark(cpu), mark(cpu)) >= 0


def compared(odd_rank: int | None) -> list[str | None]:
    torch.manual_seed(0)
    rank = torch.distributed.get_rank()
    network = torch.nn.Conv2d(3, 8, 3)
    network.weight.data = network.weight.data.to(memory_format=torch.channels_last)
    before = different_replicas({"generator": network.parameters()})
    if rank == odd_rank:
        assert network.bias is not None
        network.bias.data[3] += 1e-7
    other = [torch.ones(3)]
    return [before, different_replicas({"other": other, "generator": network.parameters()})]


@pytest.mark.slow
def test_the_rank_with_other_weights_is_named():
    for before, after in on_ranks(3, compared, 1):
        assert before is None
        assert after is not None
        assert after.startswith("the generator of rank 1 (")
        assert after.endswith(") differs from that of the others")


def test_of_two_ranks_that_differ_both_are_named(monkeypatch):
    found = [("a", {"generator": 1}), ("b", {"generator": 2})]
    monkeypatch.setattr(distributed, "gathered", lambda mine: found)
    fault = different_replicas({"generator": [torch.ones(3)]})
    assert fault == "the generator of rank 0 (a), 1 (b) differs from that of the others"
