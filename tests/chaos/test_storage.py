"""The first seeds of the storage program; `make chaos` runs all of them."""

import json
from pathlib import Path

import pytest

from tests.chaos.__main__ import main

SEEDS = 40


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_failures_of_storage_break_no_promise(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    assert main(["storage", "--seeds", str(SEEDS), "--out", str(out)]) == 0, out.read_text()
    result = json.loads(out.read_text())
    assert result["count"] == SEEDS
    assert result["continued"] + result["stopped"] == SEEDS
