"""Evaluation measures completed images, alike on any number of ranks, and draws them."""

import csv
import io
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from models import Generator
from pipeline.data.batch import Batch
from pipeline.evaluation.evaluator import Evaluation, evaluate
from pipeline.evaluation.metrics import METRICS

CPU = torch.device("cpu")


def batch_of(first: int, count: int, size: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(first)
    mask = torch.zeros(count, size, size, dtype=torch.uint8)
    mask[:, 8:24, 8:24] = 1
    return Batch(
        image=torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator),
        mask=mask,
        sketch=torch.ones(count, size, size, dtype=torch.uint8),
        keys=tuple(f"class/p{first + i}" for i in range(count)),
    )


class Gray:
    """Fills every hole with ``value`` and remembers what it was given."""

    def __init__(self, value: float, *, guided: bool = False) -> None:
        self.value, self.guided = value, guided
        self.given: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def __call__(
        self, incomplete: Tensor, mask: Tensor, sketch: Tensor | None, /
    ) -> tuple[Tensor, Tensor]:
        self.given.append((incomplete, mask, sketch))
        filled = torch.full_like(incomplete, self.value)
        return filled, filled


def test_metrics_are_those_of_the_filled_holes() -> None:
    batch = batch_of(0, 3)
    evaluation = evaluate(Gray(0.0), [batch], device=CPU)
    for row, image in zip(evaluation.rows, batch.image, strict=True):
        difference = (image[8:24, 8:24].double() / 255 - 0.5).abs()
        assert row.values["l1_percent"] == pytest.approx(100 * float(difference.mean()), abs=1e-4)
        assert row.values["l2_percent"] == pytest.approx(
            100 * float((difference**2).mean()), abs=1e-4
        )
        assert row.hole_percent == 25
    assert [row.key for row in evaluation.rows] == list(batch.keys)


@pytest.mark.parametrize("guided", [False, True])
def test_the_generator_sees_no_pixel_of_the_hole_and_the_sketch_only_if_guided(
    guided: bool,
) -> None:
    generator = Gray(0.0, guided=guided)
    evaluate(generator, [batch_of(0, 2)], device=CPU)
    incomplete, mask, sketch = generator.given[0]
    assert not incomplete[mask.expand_as(incomplete) > 0].any()
    assert (sketch is not None) == guided
    if sketch is not None:
        assert torch.equal(sketch, mask)


def test_means_over_ranks_are_those_of_one_rank_with_all_images() -> None:
    batches = [batch_of(0, 3), batch_of(3, 1), batch_of(4, 2)]
    alone = evaluate(Gray(0.3), batches, device=CPU).means()
    parts = [evaluate(Gray(0.3), share, device=CPU) for share in (batches[:1], batches[1:], [])]

    sums: list[Mapping[str, float]] = []

    def noted(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
        sums.append(values)
        return dict(values) | {"images": 1.0}

    def total(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
        return {name: sum(each[name] for each in sums) for name in values}

    for part in parts:
        part.means(noted)
    for part in parts:  # the last rank has no images
        assert part.means(total) == pytest.approx(alone)


def test_no_images_at_all_are_an_error() -> None:
    with pytest.raises(ValueError, match="no held-out images"):
        evaluate(Gray(0.0), [], device=CPU).means()


def test_rows_are_written_as_csv() -> None:
    evaluation = evaluate(Gray(0.0), [batch_of(0, 2)], device=CPU)
    lines = list(csv.DictReader(io.StringIO(evaluation.csv())))
    assert [line["key"] for line in lines] == ["class/p0", "class/p1"]
    assert float(lines[1]["psnr_db"]) == evaluation.rows[1].values["psnr_db"]


@pytest.mark.parametrize(("guided", "columns"), [(False, 4), (True, 5)])
def test_the_sheet_shows_the_stages_of_the_kept_images(guided: bool, columns: int) -> None:
    batch = batch_of(0, 3)
    evaluation = evaluate(Gray(1.0, guided=guided), [batch], device=CPU, keep=2)
    sheet = evaluation.sheet()
    scale, gap, text = 5, 6, 20  # 32 px are enlarged to at least 160
    side = scale * 32
    top_px, row_px = gap + text, side + text + gap
    assert sheet.shape == (top_px + 2 * row_px, columns * (side + gap) + gap, 3)

    def cell(line: int, column: int) -> np.ndarray:
        top, left = top_px + line * row_px, gap + column * (side + gap)
        return sheet[top : top + side : scale, left : left + side : scale]

    for line in range(2):
        original = batch.image[line].numpy()
        np.testing.assert_array_equal(cell(line, 0), original)
        hole = cell(line, 1)
        assert (hole[8:24, 8:24] == 255).all()
        np.testing.assert_array_equal(hole[:8], original[:8])
        if guided:
            assert (cell(line, 2)[8:24, 8:24] < 50).all()  # strokes everywhere in the hole
        assert (cell(line, columns - 2) == 255).all()  # coarse: white all over
        completed = cell(line, columns - 1)
        assert (completed[8:24, 8:24] == 255).all()
        np.testing.assert_array_equal(completed[24:], original[24:])


def test_a_sheet_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="needs images"):
        Evaluation([], [], CPU).sheet()


@pytest.mark.parametrize("guided", [False, True])
def test_the_real_generator_is_evaluated_without_gradients(guided: bool) -> None:
    torch.manual_seed(0)
    generator = Generator(guided=guided, width=4)
    evaluation = evaluate(generator, [batch_of(0, 1)], device=CPU, keep=1)
    means = evaluation.means()
    assert set(means) == set(METRICS)
    assert 5 < means["l1_percent"] < 60
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert evaluation.sheet().dtype == np.uint8


def test_an_image_that_is_not_finite_shows_in_rows_means_and_sheet() -> None:
    batch = batch_of(0, 3)

    class Broken(Gray):
        """Fills the hole of the second image with NaN."""

        def __call__(self, *given: Tensor | None) -> tuple[Tensor, Tensor]:
            coarse, _ = super().__call__(*given)  # type: ignore[arg-type]
            refined = coarse.clone()
            refined[1] = math.nan
            return coarse, refined

    evaluation = evaluate(Broken(0.0), [batch], device=CPU, keep=2)
    assert [math.isnan(row.values["psnr_db"]) for row in evaluation.rows] == [False, True, False]
    assert all(math.isnan(value) for value in evaluation.means().values())
    lines = list(csv.DictReader(io.StringIO(evaluation.csv())))
    assert [line["l1_percent"] == "nan" for line in lines] == [False, True, False]
    hole = evaluation.panels[1].completed[8:24, 8:24]
    assert (hole == (255, 0, 255)).all()
    assert evaluation.sheet().dtype == np.uint8
