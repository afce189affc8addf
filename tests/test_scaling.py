"""What docs/scaling.md says a step sends is what the networks have, and what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling import collectives_of_all, residents_of_all, sent_bytes
from benchmarks.timing import RESULTS
from models import Discriminator, Generator
from tests.distributed import on_ranks

PAGE = Path("docs/scaling.md").read_text()
DECISION = Path("docs/decisions/zero3.md").read_text()


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / "scaling.json").read_text())
    return record


@pytest.mark.parametrize("engine", ["DDP", "ZeRO 0", "ZeRO 1", "ZeRO 2"])
def test_every_engine_averages_each_gradient_once(measured: dict[str, Any], engine: str) -> None:
    networks = Generator(guided=True), Discriminator(guided=True)
    elements = sum(p.numel() for network in networks for p in network.parameters())
    sums = [n for kind, n in measured["collectives"][engine] if kind == "all_reduce"]
    gathers = [n for kind, n in measured["collectives"][engine] if kind == "all_gather"]
    assert sum(sums) == elements
    # Half of the weights on each of two ranks, padded to a multiple of the alignment.
    assert sum(gathers) == (pytest.approx(elements / 2, abs=4) if engine[-1] in "12" else 0)


@pytest.mark.slow
def test_two_ranks_send_and_hold_what_was_measured(measured: dict[str, Any]) -> None:
    collectives, residents = on_ranks(2, collectives_and_residents)[0]
    assert {name: [list(c) for c in found] for name, found in collectives.items()} == (
        measured["collectives"]
    )
    assert residents == measured["resident_megabytes_of_two_ranks"]


def collectives_and_residents() -> tuple[Any, Any]:
    return collectives_of_all(), residents_of_all()


@pytest.mark.parametrize("engine", ["DDP", "ZeRO 0", "ZeRO 1", "ZeRO 2"])
def test_the_decision_shows_what_stays_on_a_rank(measured: dict[str, Any], engine: str) -> None:
    row = next(line for line in DECISION.splitlines() if line.startswith(f"| {engine} | "))
    weights, _, adam, copy, _ = (float(cell) for cell in row.split("|")[2:7])
    held = measured["resident_megabytes_of_two_ranks"][engine]
    assert [weights, adam, copy] == list(held.values())


def test_a_ring_sends_nearly_twice_the_data() -> None:
    assert sent_bytes([("all_reduce", 1000)], 2) == 4000
    assert sent_bytes([("all_reduce", 1000)], 64) == pytest.approx(4000 * 2 * 63 / 64)
    assert sent_bytes([("all_gather", 500)], 4) == pytest.approx(4000 * 3 / 4)
    with pytest.raises(ValueError, match="broadcast is not among"):
        sent_bytes([("broadcast", 1)], 2)


@pytest.mark.parametrize("engine", ["DDP", "ZeRO 0", "ZeRO 1", "ZeRO 2"])
def test_the_page_shows_the_bytes_that_were_measured(measured: dict[str, Any], engine: str) -> None:
    table = PAGE.partition("<!-- collectives -->")[2].splitlines()
    row = next(line for line in table if line.startswith(f"| {engine} | "))
    shown = [float(cell) for cell in row.split("|")[3:7]]
    assert shown == [round(n, 1) for n in measured["megabytes_sent_per_rank"][engine].values()]


def test_the_page_shows_what_64_ranks_fetch(measured: dict[str, Any]) -> None:
    caches = measured["reading"]["epochs"]
    for number, (small, large) in enumerate(zip(*caches.values(), strict=True), start=1):
        row = (
            f"| {number} | {small['gigabytes']:.0f} GB | {small['requests']:,} "
            f"| {large['gigabytes']:.0f} GB | {large['requests']:,} |"
        )
        assert row in PAGE
