"""Two seeds of the training program; `make chaos` runs all of them."""

import json
from pathlib import Path

import pytest

from tests.chaos import training
from tests.chaos.__main__ import RESULTS, main


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_of_a_job_break_no_promise(tmp_path: Path) -> None:
    result = str(tmp_path / "result.json")
    assert main(["training", "--first-seed", "6", "--seeds", "2", "--out", result]) == 0


def test_the_committed_result_is_of_every_seed_and_no_promise_is_broken() -> None:
    assert training.SEEDS >= 20
    result = json.loads((RESULTS / "training.json").read_text())
    assert result["count"] == training.SEEDS
    assert result["broken"] == 0
