"""Whether two groups of runs differ: paired intervals over images and seeds, corrected p-values.

Numpy alone. Differences are always of the second group's mean minus the first's.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64

Values = Float64[np.ndarray, "runs images metrics"]
PerImage = Float64[np.ndarray, "images metrics"]

LEVEL = 0.95
"""Confidence of every interval."""
MIN_IMAGES = 10
"""Fewer images carry no interval: their spread is a guess."""
RESAMPLES = 4000
_MOST_COUNTS = 8_000_000  # of resamples times images; with more images the t interval is exact
PROBABILITIES = np.unique(np.append(np.geomspace(1e-12, 1, 2400), 1 - LEVEL))[::-1]
"""Two-sided, falling from 1: the grid on which p-values are found."""
_TAILS = (0.95, 0.99)  # where the bootstrap's tails are compared with those of t


@dataclass(frozen=True)
class Estimate:
    """One difference of means, with what is known about it."""

    difference: float
    low: float
    high: float
    """Ends of the interval; both infinite where there are too few images."""
    p: float
    """Probability of a difference so large without a real one, two-sided; below 0.05 if, and only
    if, the interval leaves out 0. Not corrected for the number of questions asked."""
    images: int
    over_seeds: bool
    """Whether the interval holds for further seeds; else for these runs' weights alone."""


def differences(first: Values, others: Sequence[Values], *, seed: int = 0) -> list[list[Estimate]]:
    """For each of ``others`` minus ``first``: one estimate for each metric.

    All hold the same images in the same order. Two or more runs on both sides: the runs are a
    sample of seeds, the images one of images, and the variances of both add up, each times the
    square of its own t (Cochran 1964). Seeds have the degrees of freedom of the smaller group,
    which holds for any two variances (Mickey and Brown 1966): resampling two or three seeds, or
    Welch's and Satterthwaite's degrees, claim too much. With a single run on one side the images
    alone are the sample. The images' variance is widened to the tails of a studentized bootstrap
    over images (Efron and Tibshirani 1993, chapter 12), drawn by ``seed``.
    """
    images = first.shape[1]
    by_image = [other.mean(axis=0) - first.mean(axis=0) for other in others]  # (images, metrics)
    if images < MIN_IMAGES:
        return [
            [_unknown(d, images, min(len(first), len(other)) > 1) for d in each.mean(axis=0)]
            for each, other in zip(by_image, others, strict=True)
        ]
    widening = np.split(_bootstrap_widening(np.hstack(by_image), seed), len(others))
    return [
        _estimates(first, other, each, widened)
        for other, each, widened in zip(others, by_image, widening, strict=True)
    ]


def _unknown(difference: float, images: int, over_seeds: bool) -> Estimate:
    return Estimate(float(difference), -math.inf, math.inf, 1.0, images, over_seeds)


def _estimates(
    first: Values, second: Values, by_image: PerImage, widening: Float64[np.ndarray, " metrics"]
) -> list[Estimate]:
    images = len(by_image)
    over_seeds = min(len(first), len(second)) > 1
    components = [(widening**2 * by_image.var(axis=0, ddof=1) / images, images - 1)]
    if over_seeds:
        runs = [group.mean(axis=1) for group in (first, second)]  # (runs, metrics) each
        of_seeds = sum(means.var(axis=0, ddof=1) / len(means) for means in runs)
        components.append((np.asarray(of_seeds), min(map(len, runs)) - 1))
    # Half the interval's width for each metric and each probability of missing.
    halves = np.sqrt(sum(np.outer(part, t_quantiles(free) ** 2) for part, free in components))
    estimates = []
    for d, half in zip(by_image.mean(axis=0).tolist(), halves, strict=True):
        if half[-1] == 0:  # every image differs by the same
            estimates.append(Estimate(d, d, d, float(d == 0), images, over_seeds))
            continue
        p = float(np.exp(np.interp(abs(d), half, np.log(PROBABILITIES))))
        width = float(half[PROBABILITIES == 1 - LEVEL][0])
        estimates.append(Estimate(d, d - width, d + width, p, images, over_seeds))
    return estimates


def _bootstrap_widening(by_image: PerImage, seed: int) -> Float64[np.ndarray, " metrics"]:
    """How much wider than t's the tails of the studentized bootstrap are, at least 1."""
    images, metrics = by_image.shape
    freedom = images - 1
    if images * RESAMPLES > _MOST_COUNTS:
        return np.ones(metrics)
    counts = _resampled(images, seed)
    spread = by_image.std(axis=0)
    centered = (by_image - by_image.mean(axis=0)) / np.where(spread > 0, spread, 1)
    drawn = counts @ np.hstack([centered, centered**2]).astype(np.float32) / images
    means, squares = np.split(drawn.astype(np.float64), 2, axis=1)  # (resamples, metrics)
    variances = np.maximum(squares - means**2, 0) / freedom
    with np.errstate(divide="ignore", invalid="ignore"):
        studentized = np.nan_to_num(np.abs(means) / np.sqrt(variances), nan=0.0, posinf=np.inf)
    studentized.sort(axis=0)
    wider = [
        studentized[int(level * (len(studentized) - 1)) + 1] / t_quantile(1 - level, freedom)
        for level in _TAILS
    ]
    widening: np.ndarray = np.maximum(1.0, np.max(wider, axis=0))
    return widening


@functools.lru_cache(maxsize=32)
def _resampled(images: int, seed: int) -> Float32[np.ndarray, "resamples images"]:
    """How often each image is drawn, in each of the resamples."""
    rng = np.random.default_rng([seed, images])
    drawn = rng.integers(images, size=(RESAMPLES, images))
    drawn += images * np.arange(RESAMPLES)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=RESAMPLES * images)
    return counts.reshape(RESAMPLES, images).astype(np.float32)


def corrected(p: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Holm's step-down correction with weights (Holm 1979, section 3) for a family of tests.

    Whatever the dependence between the tests, the probability of one false claim or more is at
    most 0.05 where claims are made below 0.05. A test with a greater share of ``weights`` pays less
    for the presence of the others; equal ones give the usual procedure.
    """
    left, worst = float(sum(weights)), 0.0
    adjusted = [1.0] * len(p)
    for index in sorted(range(len(p)), key=lambda index: p[index] / weights[index]):
        worst = max(worst, min(1.0, p[index] / weights[index] * left))
        adjusted[index] = worst
        left -= weights[index]
    return adjusted


@functools.lru_cache(maxsize=256)
def t_quantiles(freedom: int) -> Float64[np.ndarray, " probabilities"]:
    """Student's t that is exceeded on both sides together with each of ``PROBABILITIES``."""
    t = np.concatenate([[0.0], np.geomspace(1e-4, 1e13, 6000)])
    quantiles: np.ndarray = np.interp(
        -np.log(PROBABILITIES), -np.log(np.maximum(_beyond(t, freedom), 1e-300)), t
    )
    return quantiles


def t_quantile(probability: float, freedom: int) -> float:
    """Student's t that is exceeded on both sides together with ``probability``."""
    return float(np.interp(-probability, -PROBABILITIES, t_quantiles(freedom)))


def _beyond(t: Float64[np.ndarray, " values"], freedom: int) -> Float64[np.ndarray, " values"]:
    """Probability of Student's t beyond ``±t``: an incomplete beta function."""
    a, b = freedom / 2, 0.5
    x, rest = freedom / (freedom + t * t), t * t / (freedom + t * t)
    swapped = x > (a + 1) / (a + b + 2)
    direct = _incomplete_beta(a, b, np.where(swapped, 0.0, x), np.where(swapped, 1.0, rest))
    other = _incomplete_beta(b, a, np.where(swapped, rest, 0.0), np.where(swapped, x, 1.0))
    beyond: np.ndarray = np.where(swapped, 1 - other, direct)
    return beyond


def _incomplete_beta(a: float, b: float, x: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Regularized, by Lentz's continued fraction (Press et al., Numerical Recipes, 6.4).

    ``rest`` is 1 - x, whose digits the subtraction would lose.
    """
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    with np.errstate(divide="ignore"):
        front = np.exp(scale + a * np.log(x) + b * np.log(rest))
    c, d = np.ones_like(x), 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 1000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + term * d)
            c = 1 + term / c
            fraction = fraction * c * d
        if np.all(np.abs(c * d - 1) < 1e-14):
            break
    result: np.ndarray = front * fraction / a
    return result
