"""Losses and bad steps between two reports."""

import pytest
import torch

from pipeline.interval import BadStep, Interval
from pipeline.state import Position
from pipeline.step import FAULTS, StepResult

CPU = torch.device("cpu")


def step(interval: Interval, number: int, loss: float, *faults: str) -> None:
    flags = torch.tensor([float(name in faults) for name in FAULTS])
    interval.add(
        Position(number), (f"key{number}",), StepResult({"loss/l1": torch.tensor(loss)}, flags)
    )


def test_losses_are_the_mean_of_good_steps_since_the_last_report():
    interval = Interval()
    step(interval, 1, 100.0)
    interval.read(CPU)
    for number, loss in ((2, 1.0), (4, 3.0)):
        step(interval, number, loss)
        step(interval, number + 1, float("nan"), "adversarial loss")
    values = interval.read(CPU)
    assert values.means == {"loss/l1": pytest.approx(2.0)}
    assert values.bad == [
        BadStep(Position(number), (f"key{number}",), ("adversarial loss",)) for number in (3, 5)
    ]


def test_faults_come_in_the_order_of_computation():
    interval = Interval()
    step(interval, 1, 1.0, "generator gradient", "discriminator loss")
    assert interval.read(CPU).bad[0].faults == ("discriminator loss", "generator gradient")


def test_bad_steps_in_a_row_are_counted_across_reports():
    interval = Interval()
    for number in (1, 2):
        step(interval, number, 0.0, "generator output")
    values = interval.read(CPU)
    assert (values.in_a_row, values.means) == (2, {})
    step(interval, 3, 0.0, "generator output")
    step(interval, 4, 0.0)
    assert interval.read(CPU).in_a_row == 3
    step(interval, 5, 0.0)
    assert interval.read(CPU).in_a_row == 0


def test_a_loss_is_the_mean_of_the_steps_that_have_it():
    interval = Interval()
    step(interval, 1, 1.0)
    both = {"loss/l1": torch.tensor(3.0), "loss/adversarial": torch.tensor(0.5)}
    interval.add(Position(2), ("key2",), StepResult(both, torch.zeros(len(FAULTS))))
    assert interval.read(CPU).means == {"loss/l1": 2.0, "loss/adversarial": 0.5}
