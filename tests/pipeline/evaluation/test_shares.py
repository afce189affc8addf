"""Held-out images in shares give the evaluation that one process makes."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import config
from pipeline.evaluation.evaluator import Evaluation, ImageMetrics
from pipeline.evaluation.job import _measure_share
from pipeline.evaluation.sample_sheet import SamplePanel
from pipeline.evaluation.shares import measured_in_shares
from pipeline.run_storage import RunStorage
from tests.distributed import on_ranks

FIXTURE = Path("tests/fixtures/before_1.0").absolute()
CPU = torch.device("cpu")


@pytest.mark.slow
def test_shares_of_the_held_out_images_make_the_evaluation_of_all(tmp_path: Path) -> None:
    with tarfile.open(FIXTURE / "storage.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    cfg = config.load(FIXTURE / "recipe.yaml", [f"storage={tmp_path / 'storage'}"])
    storage = RunStorage.open(cfg)
    arguments = cfg, storage.checkpoints, 2, storage.open_dataset()
    whole = _measure_share(*arguments, 0, 1)
    parts = [_measure_share(*arguments, share, 2) for share in range(2)]
    assert all(part.rows for part in parts)
    joined = Evaluation.joined(parts, cfg.evaluate.sheet)
    assert joined.csv() == whole.csv()
    assert joined.means() == whole.means()
    assert np.array_equal(joined.sheet(), whole.sheet())


def evaluation(rows: int, panels: int, first: int) -> Evaluation:
    numbers = range(first, first + rows)
    pixels = np.zeros((2, 2, 3), np.uint8)
    return Evaluation(
        [ImageMetrics(str(number), 10.0, {}) for number in numbers],
        [SamplePanel(pixels, pixels, None, None, pixels) for _ in range(panels)],
        CPU,
    )


def test_panels_are_those_of_the_first_images() -> None:
    short = [evaluation(1, 1, 0), evaluation(3, 3, 1)]
    assert len(Evaluation.joined(short, keep=3).panels) == 3
    assert [row.key for row in Evaluation.joined(short, keep=3).rows] == ["0", "1", "2", "3"]
    long = [evaluation(5, 2, 0), evaluation(5, 2, 5)]
    assert len(Evaluation.joined(long, keep=2).panels) == 2


def shares() -> list[tuple[int, int]] | None:
    return measured_in_shares(lambda share, shares: (share, shares), "cpu")


@pytest.mark.slow
def test_every_rank_measures_a_share_and_the_first_has_all() -> None:
    assert on_ranks(2, shares) == [[(0, 2), (1, 2)], None]
    assert shares() == [(0, 1)]
