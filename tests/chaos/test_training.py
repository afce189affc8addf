"""Two seeds of the training program; `make chaos` runs all of them."""

from pathlib import Path

import pytest

from tests.chaos import training
from tests.chaos.__main__ import main


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_of_a_job_break_no_promise(tmp_path: Path) -> None:
    assert training.SEEDS >= 20
    result = str(tmp_path / "result.json")
    assert main(["training", "--first-seed", "6", "--seeds", "2", "--out", result]) == 0
