"""The first seeds of the storage program; `make chaos` runs all of them."""

import json
from pathlib import Path

import pytest

from tests.chaos import storage
from tests.chaos.__main__ import RESULTS, main

SEEDS = 20


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_failures_of_storage_break_no_promise(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    assert main(["storage", "--seeds", str(SEEDS), "--out", str(out)]) == 0, out.read_text()
    result = json.loads(out.read_text())
    assert result["count"] == SEEDS
    assert result["continued"] + result["stopped"] == SEEDS


def test_the_committed_result_is_of_every_seed_and_no_promise_is_broken() -> None:
    assert storage.SEEDS >= 300
    result = json.loads((RESULTS / "storage.json").read_text())
    assert result["count"] == storage.SEEDS
    assert result["broken"] == 0
    known = {f"{s.work}, {s.trouble}, on {s.kind}" for s in storage.scenarios()}
    assert {each["scenario"] for each in result["scenarios"]} == known
