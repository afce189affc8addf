"""Intervals and p-values keep what they promise, also for few seeds and skewed values."""

import math

import numpy as np
import pytest

from pipeline.evaluation.statistics import (
    MIN_IMAGES,
    PROBABILITIES,
    corrected,
    differences,
    t_quantile,
    t_quantiles,
)

SIMULATIONS = 500
MOST_FALSE = 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / SIMULATIONS)  # 99.5 % of honest ones are below


def simulated(
    seeds: tuple[int, int], images: int, spread: tuple[float, float], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Two groups without a real difference: (runs, images, simulations) each.

    Images are skewed as L1 is; each run adds its seed's luck and noise for each image, and each
    group's recipe suits some images better than others.
    """
    hard = rng.lognormal(2, 0.6, (1, images, SIMULATIONS))
    groups = []
    for runs, sd in zip(seeds, spread, strict=True):
        luck = rng.normal(0, sd, (runs, 1, SIMULATIONS))
        suits = 0.2 * hard * (rng.lognormal(0, 0.8, hard.shape) - math.exp(0.32))
        noise = 0.1 * hard * (rng.lognormal(0, 0.8, (runs, *hard.shape[1:])) - math.exp(0.32))
        groups.append(hard + luck + suits + noise)
    return groups[0], groups[1]


@pytest.mark.parametrize(
    ("seeds", "images", "spread"),
    [
        ((1, 1), 12, (0, 0)),
        ((1, 1), 100, (0, 0)),
        ((2, 2), 40, (0, 0)),
        ((2, 2), 40, (3, 3)),
        ((2, 2), 40, (0.2, 5)),
        ((2, 5), 40, (5, 0.2)),
        ((3, 3), 40, (1, 1)),
        ((3, 4), 40, (5, 0.2)),
        ((6, 6), 40, (3, 3)),
    ],
)
def test_at_most_5_in_100_intervals_miss_a_difference_of_zero(
    seeds: tuple[int, int], images: int, spread: tuple[float, float]
) -> None:
    rng = np.random.default_rng([*seeds, images])
    first, second = simulated(seeds, images, spread, rng)
    (estimates,) = differences(first, [second])
    missing = sum(not each.low <= 0 <= each.high for each in estimates) / SIMULATIONS
    assert missing == sum(each.p < 0.05 for each in estimates) / SIMULATIONS
    assert missing <= MOST_FALSE
    assert all(each.over_seeds == (min(seeds) > 1) for each in estimates)


@pytest.mark.parametrize(("seeds", "shift"), [((1, 1), 1.0), ((3, 3), 4.0), ((5, 5), 3.0)])
def test_a_real_difference_is_found_with_its_size(seeds: tuple[int, int], shift: float) -> None:
    first, second = simulated(seeds, 200, (0.5, 0.5), np.random.default_rng(0))
    if seeds == (1, 1):
        first, second = simulated(seeds, 200, (0, 0), np.random.default_rng(0))
    (estimates,) = differences(first, [second + shift])
    assert np.mean([each.p < 0.05 for each in estimates]) > 0.8
    assert np.mean([each.low <= shift <= each.high for each in estimates]) > 0.94


def test_pairing_by_image_finds_what_the_spread_of_images_would_hide() -> None:
    rng = np.random.default_rng(0)
    hard = rng.lognormal(2, 1, (1, 50, 1))
    first, second = hard + rng.normal(0, 0.1, hard.shape), hard + 0.2
    assert differences(first, [second])[0][0].p < 1e-6


def test_equal_weights_have_no_difference_and_a_constant_one_is_certain() -> None:
    same = np.random.default_rng(0).random((1, 20, 1))
    ((none,), (constant,)) = differences(same, [same, np.ones_like(same) + same])
    assert (none.difference, none.low, none.high, none.p) == (0, 0, 0, 1)
    assert constant.p < 1e-9
    assert constant.difference == pytest.approx(1)


def test_few_images_carry_no_interval() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 1, MIN_IMAGES - 1, 1))
    (estimate,) = differences(first, [second])[0]
    assert (estimate.low, estimate.high, estimate.p) == (-math.inf, math.inf, 1)


def test_estimates_are_the_same_every_time_and_whoever_else_is_compared() -> None:
    rng = np.random.default_rng(0)
    first, second, third = rng.lognormal(0, 1, (3, 1, 30, 2))
    alone, together = differences(first, [second])[0], differences(first, [third, second])[1]
    for one, other in zip(alone, together, strict=True):
        assert (one.low, one.high, one.p) == pytest.approx(
            (other.low, other.high, other.p), rel=1e-3
        )


@pytest.mark.parametrize(
    ("freedom", "beyond", "t"),
    [
        (1, 0.05, 12.7062),  # of published tables
        (2, 0.05, 4.30265),
        (5, 0.01, 4.03214),
        (30, 0.05, 2.04227),
        (499, 0.05, 1.96473),
        (1, 1.0, 0.0),
    ],
)
def test_students_t_is_that_of_the_tables(freedom: int, beyond: float, t: float) -> None:
    assert t_quantile(beyond, freedom) == pytest.approx(t, rel=1e-4)


def test_students_t_with_two_degrees_of_freedom_is_its_closed_form() -> None:
    exact = np.sqrt(2 / (PROBABILITIES * (2 - PROBABILITIES)) - 2)
    np.testing.assert_allclose(t_quantiles(2)[5:], exact[5:], rtol=1e-4)


def test_holm_with_equal_weights_is_the_usual_procedure() -> None:
    assert corrected([0.01, 0.04, 0.03, 0.005], [1, 1, 1, 1]) == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )


def test_a_heavy_test_pays_little_and_passes_its_weight_on() -> None:
    assert corrected([0.03, 0.002], [0.8, 0.2]) == pytest.approx([0.03, 0.01])
    assert corrected([0.045, 0.5], [0.8, 0.2])[0] == pytest.approx(0.05625)


def test_one_false_claim_or_more_comes_in_at_most_5_of_100_families() -> None:
    rng = np.random.default_rng(0)
    weights = [0.8, *[0.2 / 39] * 39]
    false = [min(corrected(rng.random(40).tolist(), weights)) < 0.05 for _ in range(2000)]
    assert np.mean(false) < 0.062
