"""``python -m pipeline parity``: what it prints, and when it fails."""

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.arguments.common import DONE, MISTAKE
from pipeline.cli import main
from pipeline.commands import parity
from pipeline.commands.parity import Row, Trajectory
from pipeline.config import Config
from pipeline.ranks import Device

RECIPE = Path("pipeline/recipes/demo.yaml")
SMALL = ["model.width=8", "train.size_px=64", "train.global_batch=2", "train.streams=2"]


@pytest.mark.distributed
def test_every_engine_trains_as_one_process_does(capsys):
    assert main(["parity", str(RECIPE), *SMALL]) == DONE
    table = capsys.readouterr().out
    for engine in ("DDP", "ZeRO 0", "ZeRO 1", "ZeRO 2"):
        assert f"{engine}, 2 ranks" in table
    assert "first gradient, discriminator" in table
    assert "FAILS" not in table


@pytest.mark.slow
def test_in_bf16_an_engine_may_differ_by_three_times_its_noise(monkeypatch):
    trained: list[Trajectory] = []
    real = functools.partial(parity._train, steps=2)

    def train(*args: Any, **options: Any) -> Trajectory:
        trained.append(real(*args, **options))
        return trained[-1]

    def on_ranks(cfg: Config, kind: Device) -> list[Trajectory]:
        plain, exact, other, _ = trained  # `exact` is fp32, `other` has another seed
        noise = {n: g - exact.gradients[n] for n, g in plain.gradients.items()}
        return [
            replace(
                plain if factor != 0.9 else other,
                gradients={n: g + 3 * factor * noise[n] for n, g in plain.gradients.items()},
                norms=plain.norms,
            )
            for factor in (0.0, 0.9, 1.1, 0.0)  # of what is allowed
        ]

    monkeypatch.setattr(parity, "_train", train)
    monkeypatch.setattr(parity, "_on_ranks", on_ranks)
    rows = list(parity.parity_rows(config.load(RECIPE, [*SMALL, "train.precision=bf16"])))
    assert all(row.limit > 0 for row in rows)
    assert max(row.difference for row in rows if "loss" in row.quantity) > parity.LOSS_TOLERANCE
    assert [(row.engine, row.quantity) for row in rows if not row.holds] == [
        ("ZeRO 1, 2 ranks", "first gradient, generator"),
        ("ZeRO 1, 2 ranks", "first gradient, discriminator"),
    ]


@pytest.mark.parametrize("difference", [2e-4, math.nan])
def test_a_row_that_does_not_hold_is_named_and_fails_the_command(monkeypatch, capsys, difference):
    rows = [
        Row("DDP, 2 ranks", "loss/adversarial", 1e-6, 1e-4),
        Row("ZeRO 1, 2 ranks", "loss/l1_refined", difference, 1e-4),
    ]
    monkeypatch.setattr(parity, "parity_rows", lambda cfg: iter(rows))
    assert main(["parity", str(RECIPE)]) == MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ZeRO 1, 2 ranks, loss/l1_refined: differs by")


def test_one_stream_is_too_few_for_two_ranks():
    cfg = config.load(RECIPE, ["train.workers=1", "train.streams=1"])
    with pytest.raises(config.ConfigError, match=r"train.streams 1 should be at least 2"):
        next(parity.parity_rows(cfg))
