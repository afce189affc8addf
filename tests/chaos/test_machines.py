"""One scenario of the machines program; `make chaos` runs all of them."""

import json
from pathlib import Path

import pytest

from tests.chaos import machines
from tests.chaos.__main__ import RESULTS, main
from tests.chaos.namespaces import why_not


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_continues_on_the_machine_that_is_left(tmp_path: Path) -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    result = str(tmp_path / "result.json")
    assert main(["machines", "--seeds", "1", "--out", result]) == 0


def test_the_committed_result_is_of_every_scenario_and_no_promise_is_broken() -> None:
    result = json.loads((RESULTS / "machines.json").read_text())
    assert result["count"] == machines.SEEDS
    assert result["broken"] == 0
