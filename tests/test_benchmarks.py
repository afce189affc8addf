"""The READMEs quote the committed results."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import goals, landmarks
from benchmarks.__main__ import ON_CPU, commands
from benchmarks.goals import BEGIN, END, GOALS, README, table
from benchmarks.timing import RESULTS


def test_the_readme_quotes_the_results_as_they_are() -> None:
    quoted = README.read_text().partition(BEGIN)[2].partition(END)[0]
    assert quoted == table(), "python -m benchmarks.goals brings the table up to date"


def test_the_front_page_quotes_the_step_as_it_is() -> None:
    step = json.loads((RESULTS / "step_cpu.json").read_text())
    ratio = step["times_faster_than_reference_fp32"]["fp32"]
    assert f"{ratio:.2f} times" in Path("README.md").read_text()


def test_every_committed_result_names_device_and_versions_and_is_held_against_a_goal() -> None:
    for path in RESULTS.glob("*.json"):
        record = json.loads(path.read_text())
        assert record["benchmark"] == path.stem
        assert record["device"]
        assert all(record["versions"].values())
        held = [goal for goal in GOALS if goal.key.split("/")[0] == path.stem]
        assert held, f"{path.name} has no goal"


@pytest.mark.parametrize(
    ("value", "at_most", "said"),
    [
        (3.0, False, "goal"),
        (2.5, False, "floor"),
        (1.9, False, "**under the floor**"),
        (3.1, True, "**under the floor**"),
        (None, False, "not measured"),
    ],
)
def test_a_result_is_judged_by_goal_and_floor(
    value: float | None, at_most: bool, said: str
) -> None:
    low, high = (3.0, 3.0) if at_most else (3.0, 2.0)
    assert goals.reached(value, goals.Goal("", "", low, high, at_most=at_most)) == said


def test_a_name_chooses_its_benchmark_on_every_device() -> None:
    assert commands(["step"]) == [["step"], ["step", "--device", "cuda", "--batch", "32"]]
    assert [command[0] for command in commands([])][: len(ON_CPU)] == list(ON_CPU)


def test_a_face_that_nobody_annotated_is_a_mismatch_and_no_error() -> None:
    truth = np.random.default_rng(0).uniform(100, 200, (68, 2))
    assert landmarks.nearest_error(truth + 3, [truth]) == pytest.approx(
        landmarks.error(truth + 3, truth)
    )
    assert landmarks.nearest_error(truth + 300, [truth]) is None
    assert landmarks.nearest_error(truth.mean(axis=0) + 0.3 * (truth - 150), [truth]) is None
    assert landmarks.nearest_error(truth, [truth + 300, truth + 1]) is not None
