"""One scenario of the machines program; `make chaos` runs all of them."""

from pathlib import Path

import pytest

from tests.chaos.__main__ import main
from tests.chaos.namespaces import why_not


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_continues_on_the_machine_that_is_left(tmp_path: Path) -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    result = str(tmp_path / "result.json")
    assert main(["machines", "--seeds", "1", "--out", result]) == 0
