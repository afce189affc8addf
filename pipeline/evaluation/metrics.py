"""How close a completed picture is to the original: L1, L2, PSNR and SSIM of single pictures."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, UInt8

Picture = Float32[np.ndarray, "height width 3"]  # RGB in [0, 1]
Plane = Float64[np.ndarray, "height width"]
Hole = UInt8[np.ndarray, "height width"]  # 1 in the hole

PSNR_LIMIT_DB = 100.0

_WINDOW, _SIGMA = 11, 1.5  # of SSIM's gaussian (Wang et al. 2004)
_C1, _C2 = 0.01**2, 0.03**2  # for pictures whose values span 1


@dataclass(frozen=True)
class Quality:
    """Metrics of one completed picture."""

    l1_percent: float
    l2_percent: float
    psnr_db: float
    ssim: float


def measure(completed: Picture, original: Picture, mask: Hole) -> Quality:
    """All metrics of one picture; values outside [0, 1] count as clipped, nothing is rounded."""
    completed = np.clip(completed, 0.0, 1.0)
    return Quality(
        l1_percent=hole_l1_percent(completed, original, mask),
        l2_percent=hole_l2_percent(completed, original, mask),
        psnr_db=psnr_db(completed, original),
        ssim=ssim(completed, original),
    )


def hole_l1_percent(completed: Picture, original: Picture, mask: Hole) -> float:
    """Mean absolute difference over the hole's pixels and channels, values 0 to 1, times 100.

    Lower is better, 0 ... 100. The paper's "mean l1 error" (table 1), as its figures suggest it is
    normalised. A picture without a hole has nothing to fill and no error: 0.
    """
    return 100 * _mean_in_hole(np.abs(completed - original), mask)


def hole_l2_percent(completed: Picture, original: Picture, mask: Hole) -> float:
    """Mean squared difference over the hole's pixels and channels, values 0 to 1, times 100.

    Lower is better, 0 ... 100. The paper's "mean l2 error" (table 1); 0 without a hole.
    """
    return 100 * _mean_in_hole(np.square(completed - original), mask)


def psnr_db(completed: Picture, original: Picture) -> float:
    """Peak signal-to-noise ratio over the whole picture, known pixels included, peak 1, in dB.

    Higher is better: -10 log10 of the mean squared difference, and at most 100, so that pictures
    filled without any error leave a mean finite.
    """
    squared = float(np.mean(np.square(completed - original), dtype=np.float64))
    return min(PSNR_LIMIT_DB, -10 * math.log10(max(squared, 1e-30)))


def ssim(completed: Picture, original: Picture) -> float:
    """Structural similarity over the whole picture, mean over pixels and the three channels.

    Higher is better, -1 ... 1. Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03,
    range 1, population variances, windows wholly inside the picture: scikit-image's
    ``gaussian_weights=True, use_sample_covariance=False``, and torchmetrics without the border.
    Both sides must be at least 11 pixels.
    """
    import cv2  # not at the top: GPU boxes without OpenCV measure the rest

    height, width = original.shape[:2]
    if min(height, width) < _WINDOW:
        raise ValueError(f"SSIM of a {height} x {width} picture: sides must be at least {_WINDOW}")
    kernel = cv2.getGaussianKernel(_WINDOW, _SIGMA, cv2.CV_64F)
    edge = _WINDOW // 2

    def blurred(values: Plane) -> Plane:
        whole = cv2.sepFilter2D(values, cv2.CV_64F, kernel, kernel)
        return whole[edge:-edge, edge:-edge]

    # Double precision, since flat regions cancel; by channel, so that the planes stay in the cache.
    means = []
    for channel in range(3):
        a = completed[..., channel].astype(np.float64)
        b = original[..., channel].astype(np.float64)
        mean_a, mean_b = blurred(a), blurred(b)
        product, squares = mean_a * mean_b, mean_a * mean_a + mean_b * mean_b
        variances = blurred(a * a + b * b) - squares  # of a plus of b
        covariance = blurred(a * b) - product
        luminance = (2 * product + _C1) / (squares + _C1)
        structure = (2 * covariance + _C2) / (variances + _C2)
        means.append(float(np.mean(luminance * structure)))
    return sum(means) / 3


def _mean_in_hole(difference: Picture, mask: Hole) -> float:
    inside = difference[mask > 0]  # (pixels, 3)
    return float(np.mean(inside, dtype=np.float64)) if inside.size else 0.0
