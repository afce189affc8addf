"""Filling images in memory: strategies, what they keep, and how they are stopped."""

from typing import Any

import cv2
import numpy as np
import pytest

import pipeline
from models import Generator
from models.regions import Region, Span
from pipeline import inpaint_image
from pipeline.filling import (
    FillCancelledError,
    FillOptions,
    FillTask,
    Strategy,
    crop_around,
    fill,
    fill_batch,
)
from tests.models.golden import fill_generator

IMAGE = np.random.default_rng(0).integers(256, size=(37, 50, 3), dtype=np.uint8)
HOLE = np.zeros((37, 50), bool)
HOLE[5:20, 8:30] = True
STRATEGIES: list[Strategy] = ["full", "crop", "resize"]


@pytest.fixture(scope="module")
def generator() -> Generator:
    generator = Generator(width=4)
    fill_generator(generator)
    return generator.eval()


def large(*holes: tuple[slice, slice]) -> tuple[np.ndarray, np.ndarray]:
    """A smooth image of 120 × 200 with noise, and its mask."""
    rng = np.random.default_rng(1)
    coarse = rng.integers(256, size=(6, 10, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (200, 120), interpolation=cv2.INTER_CUBIC)
    mask = np.zeros((120, 200), np.uint8)
    for hole in holes:
        mask[hole] = 1
    return np.bitwise_xor(image, rng.integers(8, size=image.shape, dtype=np.uint8)), mask


APART = (slice(10, 30), slice(12, 30)), (slice(90, 112), slice(170, 200))


@pytest.mark.parametrize("white", [True, 1, 255])
def test_known_pixels_stay_and_any_white_marks_the_hole(white: int) -> None:
    filled = inpaint_image(Generator(width=4).eval(), IMAGE, HOLE * np.uint8(white))
    np.testing.assert_array_equal(filled[~HOLE], IMAGE[~HOLE])
    assert (filled[HOLE] != IMAGE[HOLE]).mean() > 0.9
    assert filled.dtype == np.uint8


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_fills_all_holes_and_keeps_known_pixels(
    generator: Generator, strategy: Strategy
) -> None:
    image, mask = large(*APART)
    filled = inpaint_image(generator, image, mask, strategy=strategy, size_limit_px=64)
    np.testing.assert_array_equal(filled[mask == 0], image[mask == 0])
    for hole in APART:
        assert (filled[hole] != image[hole]).mean() > 0.9


@pytest.mark.parametrize("strategy", ["crop", "resize"])
def test_a_limit_above_the_image_changes_nothing(generator: Generator, strategy: Strategy) -> None:
    image, mask = large(*APART)
    whole = inpaint_image(generator, image, mask)
    limited = inpaint_image(generator, image, mask, strategy=strategy, size_limit_px=200)
    np.testing.assert_array_equal(limited, whole)


def test_the_size_of_training_is_the_limit_where_none_is_given(generator: Generator) -> None:
    image, mask = large(APART[0])
    generator.trained_px = 64
    own = inpaint_image(generator, image, mask, strategy="resize")
    del generator.trained_px
    generator.trained_px = 256
    np.testing.assert_array_equal(
        own, inpaint_image(generator, image, mask, strategy="resize", size_limit_px=64)
    )
    assert (own != inpaint_image(generator, image, mask, strategy="resize")).any()


def test_a_crop_depends_on_its_surroundings_alone(generator: Generator) -> None:
    image, mask = large(*APART)
    other = image.copy()
    other[60:, :90] = 0
    first, second = (
        inpaint_image(generator, each, mask, strategy="crop", size_limit_px=48)
        for each in (image, other)
    )
    np.testing.assert_array_equal(first[mask > 0], second[mask > 0])
    whole = [inpaint_image(generator, each, mask) for each in (image, other)]
    assert (whole[0][mask > 0] != whole[1][mask > 0]).any()


@pytest.mark.parametrize(
    ("hole", "margin", "expected"),
    [
        ((50, 60, 90, 110), None, (5, 105, 50, 150)),  # smaller than the limit of 100
        ((20, 100, 60, 140), None, (0, 120, 20, 180)),  # half of 80 around, the image has 120 rows
        ((20, 100, 60, 140), 20, (0, 120, 40, 160)),
        ((0, 10, 190, 200), 0, (0, 100, 100, 200)),  # moved inside
    ],
)
def test_crops_are_squares_around_holes_inside_the_image(
    hole: tuple[int, int, int, int], margin: int | None, expected: tuple[int, int, int, int]
) -> None:
    def region(top: int, bottom: int, left: int, right: int) -> Region:
        return Region(Span(top, bottom, 120), Span(left, right, 200))

    assert crop_around(region(*hole), margin, 100) == region(*expected)


def test_what_a_hole_holds_never_reaches_the_fill(generator: Generator) -> None:
    image, mask = large(*APART)
    other = np.where(mask[..., None] > 0, 255 - image, image).astype(np.uint8)
    for strategy in STRATEGIES:
        first, second = (
            inpaint_image(generator, each, mask, strategy=strategy, size_limit_px=50)
            for each in (image, other)
        )
        np.testing.assert_array_equal(first, second)


def test_dilating_grows_the_hole_by_so_many_pixels(generator: Generator) -> None:
    image, mask = large(APART[0])
    changed = fill(generator, image, mask, None, FillOptions(dilate_px=3)).weight
    rows, columns = changed.nonzero()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (7, 32, 9, 32)
    assert set(np.unique(changed)) == {0, 1}
    assert changed[7, 9] == 0, "corners are round"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_feathering_blends_into_so_many_known_pixels(
    generator: Generator, strategy: Strategy
) -> None:
    image, mask = large(*APART)
    options = FillOptions(strategy=strategy, size_limit_px=64, feather_px=4)
    filled = fill(generator, image, mask, None, options)
    np.testing.assert_array_equal(filled.weight == 1, mask > 0)
    np.testing.assert_allclose(filled.weight[20, 30:36], [0.8, 0.6, 0.4, 0.2, 0, 0], atol=1e-6)
    result = filled.over(image)
    np.testing.assert_array_equal(result[filled.weight == 0], image[filled.weight == 0])
    expected = 0.6 * 255 * filled.colors[20, 31] + 0.4 * image[20, 31]
    np.testing.assert_allclose(result[20, 31], expected, atol=0.51)
    plain = fill(generator, image, mask, None, FillOptions(strategy=strategy, size_limit_px=64))
    if strategy == "full":  # the hole itself is filled alike
        inside = mask > 0
        np.testing.assert_allclose(filled.colors[inside], plain.colors[inside], atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_batch_gives_what_its_images_give_one_by_one_but_for_rounding(
    generator: Generator, strategy: Strategy
) -> None:
    image, mask = large(*APART)
    small = FillTask(IMAGE, HOLE)
    other = FillTask(image[::-1].copy(), mask[:, ::-1].copy())
    tasks = [FillTask(image, mask), small, other, FillTask(image, 0 * mask)]
    options = FillOptions(strategy=strategy, size_limit_px=64, batch=3)
    for task, filled in zip(tasks, fill_batch(generator, tasks, options), strict=True):
        alone = fill(generator, *task, FillOptions(strategy=strategy, size_limit_px=64))
        together, apart = (each.over(task.image).astype(int) for each in (filled, alone))
        np.testing.assert_allclose(together, apart, atol=1)


def test_progress_counts_up_to_all_and_stops_where_it_is_asked_to(generator: Generator) -> None:
    image, mask = large(*APART)
    options = FillOptions(strategy="crop", size_limit_px=64)
    calls: list[tuple[int, int]] = []
    fill(generator, image, mask, None, options, lambda *call: calls.append(call))
    assert calls[0] == (0, 200)
    assert calls[-1] == (200, 200)
    assert calls == sorted(calls)
    assert len(set(calls)) > 50
    asked: list[bool] = []

    def cancel() -> bool:
        asked.append(True)
        return len(asked) > 20

    with pytest.raises(FillCancelledError):
        fill(generator, image, mask, None, options, cancel=cancel)
    assert len(asked) == 21


def test_wrong_arrays_are_refused_by_name() -> None:
    generator = Generator(width=4)
    with pytest.raises(ValueError, match=r"float64 \(37, 50, 3\): give uint8"):
        inpaint_image(generator, IMAGE / 255, HOLE)
    with pytest.raises(ValueError, match=r"a mask of \(50, 37\): give \(37, 50\)"):
        inpaint_image(generator, IMAGE, HOLE.T)
    with pytest.raises(ValueError, match="takes no sketch"):
        inpaint_image(generator, IMAGE, HOLE, HOLE)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"strategy": "tiles"}, "strategy is 'tiles': give one of full, crop, resize"),
        ({"size_limit_px": 4}, "size_limit_px is 4: give at least 8"),
        ({"feather_px": -1}, "feather_px is -1: give at least 0"),
    ],
)
def test_wrong_options_are_refused_by_name(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FillOptions(**option)


def test_the_package_names_what_programs_use() -> None:
    assert pipeline.load_generator.__module__ == "pipeline.networks"
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        getattr(pipeline, "absent")  # noqa: B009
