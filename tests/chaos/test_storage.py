"""The first seeds of the storage program; `make chaos` runs all of them."""

from pathlib import Path

import pytest

from tests.chaos import storage
from tests.chaos.__main__ import main


@pytest.mark.slow
def test_a_few_failures_of_storage_break_no_promise(tmp_path: Path) -> None:
    assert storage.SEEDS >= 300
    assert main(["storage", "--seeds", "4", "--out", str(tmp_path / "result.json")]) == 0
