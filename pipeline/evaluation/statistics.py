"""Whether two groups of runs differ: paired intervals over images and seeds, corrected p-values.

Numpy alone. Differences are always of the second group's mean minus the first's.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

Values = Float64[np.ndarray, "runs images metrics"]
PerImage = Float64[np.ndarray, "images metrics"]

LEVEL = 0.95
"""Of every interval."""
MIN_IMAGES = 10
"""Fewer images carry no interval: their spread is a guess."""
RESAMPLES = 4000
_MOST_COUNTS = 8_000_000  # of resamples times images; with more images the t interval is exact
_TAILS = (0.95, 0.99)  # where the bootstrap's tails are compared with those of t


@dataclass(frozen=True)
class Estimate:
    """One difference of means, with what is known about it."""

    difference: float
    low: float
    high: float
    """Ends of the interval; both infinite where there are too few images."""
    p: float
    """Of a difference so large without a real one, two-sided; below 0.05 if, and only if, the
    interval leaves out 0. Not corrected for the number of questions asked."""
    images: int
    over_seeds: bool
    """Whether the interval holds for further seeds; else for these runs' weights alone."""


def differences(first: Values, second: Values, *, seed: int = 0) -> list[Estimate]:
    """One estimate for each metric; both groups hold the same images in the same order.

    Two or more runs on both sides: the runs are a sample of seeds and the images one of images.
    Variances of both add up. Seeds have the degrees of freedom of the smaller group, which holds
    for any two variances (Mickey and Brown 1966); resampling two or three seeds, or Welch's
    degrees, would claim too much. Satterthwaite's formula joins them with the images'. With a
    single run on one side the images alone are the sample. The images' part has the tails of a
    studentized bootstrap over images (Efron and Tibshirani 1993, chapter 12), drawn by ``seed``.
    """
    images = first.shape[1]
    by_image = second.mean(axis=0) - first.mean(axis=0)  # (images, metrics)
    over_seeds = min(len(first), len(second)) > 1
    difference = by_image.mean(axis=0)
    if images < MIN_IMAGES:
        return [Estimate(d, -math.inf, math.inf, 1.0, images, over_seeds) for d in difference]

    widening = _bootstrap_widening(by_image, seed)
    components = [(widening**2 * by_image.var(axis=0, ddof=1) / images, images - 1)]
    if over_seeds:
        runs = [group.mean(axis=1) for group in (first, second)]  # (runs, metrics) each
        variance = sum(means.var(axis=0, ddof=1) / len(means) for means in runs)
        components.append((variance, min(map(len, runs)) - 1))
    variance = sum(component for component, _ in components)
    pooled = sum(component**2 / freedom for component, freedom in components)
    estimates = []
    for d, v, w in zip(difference, variance, pooled, strict=True):
        if v == 0:  # every image differs by the same
            estimates.append(Estimate(d, d, d, float(d == 0), images, over_seeds))
            continue
        freedom = float(f"{v**2 / w:.4g}")  # few different ones, which t_quantile remembers
        half = t_quantile((1 + LEVEL) / 2, freedom) * math.sqrt(v)
        p = t_two_sided(d / math.sqrt(v), freedom)
        estimates.append(Estimate(float(d), d - half, d + half, p, images, over_seeds))
    return estimates


def _bootstrap_widening(by_image: PerImage, seed: int) -> Float64[np.ndarray, " metrics"]:
    """How much wider than t's the tails of the studentized bootstrap are, at least 1."""
    images, metrics = by_image.shape
    freedom = images - 1
    if images * RESAMPLES > _MOST_COUNTS:
        return np.ones(metrics)
    counts = _resampled(images, seed)
    centered = by_image - by_image.mean(axis=0)
    means = counts @ centered / images  # (resamples, metrics)
    variances = (counts @ centered**2 / images - means**2) / freedom
    with np.errstate(divide="ignore", invalid="ignore"):
        studentized = np.abs(means) / np.sqrt(np.maximum(variances, 0))
    studentized = np.nan_to_num(studentized, nan=0.0, posinf=np.inf)
    wider = [
        np.quantile(studentized, level, axis=0, method="higher")
        / t_quantile((1 + level) / 2, freedom)
        for level in _TAILS
    ]
    return np.maximum(1.0, np.max(wider, axis=0))


@functools.lru_cache(maxsize=32)
def _resampled(images: int, seed: int) -> Float64[np.ndarray, "resamples images"]:
    """How often each image is drawn, in each of the resamples."""
    rng = np.random.default_rng([seed, images])
    drawn = rng.integers(images, size=(RESAMPLES, images))
    drawn += images * np.arange(RESAMPLES)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=RESAMPLES * images)
    return counts.reshape(RESAMPLES, images).astype(np.float64)


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


def not_numbers(values: Values) -> Bool[np.ndarray, "images metrics"]:
    """Where any run has NaN or infinity."""
    return ~np.isfinite(values).all(axis=0)


def t_two_sided(t: float, freedom: float) -> float:
    """Probability of a value of Student's t beyond ``±t``."""
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


@functools.lru_cache(maxsize=4096)
def t_quantile(probability: float, freedom: float) -> float:
    """Student's t below which ``probability`` lies, for 0.5 ≤ ``probability`` < 1."""
    beyond = 2 * (1 - probability)
    low, high = 0.0, 1.0
    while t_two_sided(high, freedom) > beyond:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, freedom) > beyond else (low, middle)
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularized, by Lentz's continued fraction (Press et al., Numerical Recipes, 6.4)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 500):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + term * d)
            c = 1 + term / c
            fraction *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return front * fraction / a
