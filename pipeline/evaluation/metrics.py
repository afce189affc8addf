"""How close a completed image is to the original. The table METRICS is all there is to extend."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64, UInt8

UnitImage = Float32[np.ndarray, "height width 3"]  # RGB in [0, 1]
UnitPlane = Float64[np.ndarray, "height width"]
Hole = UInt8[np.ndarray, "height width"]  # 1 in the hole

PSNR_LIMIT_DB = 100.0

_WINDOW, _SIGMA = 11, 1.5  # of SSIM's gaussian (Wang et al. 2004)
_C1, _C2 = 0.01**2, 0.03**2  # for images whose values span 1


@dataclass(frozen=True)
class Metric:
    """One number about one completed image."""

    function: Callable[..., float]
    """Takes the completed and the original image, and the mask where ``region`` is the hole."""
    label: str
    """Its name on sheets and pages."""
    unit: str
    """``%``, ``dB``, or empty where the value is a plain number."""
    better: Literal["lower", "higher"]
    region: Literal["hole", "image"]
    """The pixels that it measures: those of the hole, or all, known pixels included."""
    definition: str
    """What it is, in one sentence."""

    def of(self, completed: UnitImage, original: UnitImage, mask: Hole) -> float:
        if self.region == "hole":
            return self.function(completed, original, mask)
        return self.function(completed, original)

    def text(self, value: float) -> str:
        """Label, value and unit, as in ``PSNR 24.1 dB``."""
        return f"{self.label} {value:.3g} {self.unit}".rstrip()


def measure(completed: UnitImage, original: UnitImage, mask: Hole) -> dict[str, float]:
    """Every metric of METRICS for one image, by name.

    Values outside [0, 1] are clipped and nothing is rounded. A pixel that is not finite makes the
    metrics of its region NaN.
    """
    clipped = np.clip(completed, 0.0, 1.0)
    clipped[~np.isfinite(completed)] = np.nan  # an infinite value is not a white pixel
    return {name: metric.of(clipped, original, mask) for name, metric in METRICS.items()}


def hole_l1_percent(completed: UnitImage, original: UnitImage, mask: Hole) -> float:
    """The paper's "mean l1 error" (table 1), normalized as its values suggest; 0 without a hole."""
    return 100 * _mean_in_hole(np.abs(completed - original), mask)


def hole_l2_percent(completed: UnitImage, original: UnitImage, mask: Hole) -> float:
    """The paper's "mean l2 error" (table 1); 0 without a hole."""
    return 100 * _mean_in_hole(np.square(completed - original), mask)


def psnr_db(completed: UnitImage, original: UnitImage) -> float:
    """-10 log10 of the mean squared difference, peak 1; NaN where that is NaN.

    At most 100, so that a mean stays finite where some images have no error at all.
    """
    squared = float(np.mean(np.square(completed - original), dtype=np.float64))
    if math.isnan(squared):  # min and max would hide it
        return math.nan
    return min(PSNR_LIMIT_DB, -10 * math.log10(max(squared, 1e-30)))


def ssim(completed: UnitImage, original: UnitImage) -> float:
    """Mean of the SSIM map over pixels and channels (Wang et al. 2004).

    Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, range 1, population variances,
    windows inside the image only: as scikit-image's ``gaussian_weights=True,
    use_sample_covariance=False``, and torchmetrics without the border. Raises ValueError where a
    side is shorter than 11 pixels.
    """
    import cv2  # not at the top: GPU boxes without OpenCV measure the rest

    height, width = original.shape[:2]
    if min(height, width) < _WINDOW:
        raise ValueError(f"SSIM of a {height} x {width} image: sides must be at least {_WINDOW}")
    kernel = cv2.getGaussianKernel(_WINDOW, _SIGMA, cv2.CV_64F)
    edge = _WINDOW // 2

    def blurred(values: UnitPlane) -> UnitPlane:
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


def tv_percent(completed: UnitImage, original: UnitImage) -> float:
    """The anisotropic total variation of ``completed``, for each value of the image.

    DeepFill v1 reports a "TV loss" of this kind without its formula. ``original`` is not used.
    """
    down = np.abs(np.diff(completed, axis=0)).sum(dtype=np.float64)
    right = np.abs(np.diff(completed, axis=1)).sum(dtype=np.float64)
    return 100 * float(down + right) / completed.size


def _mean_in_hole(difference: UnitImage, mask: Hole) -> float:
    inside = difference[mask > 0]  # (pixels, 3)
    return float(np.mean(inside, dtype=np.float64)) if inside.size else 0.0


METRICS: dict[str, Metric] = {
    "l1_percent": Metric(
        hole_l1_percent,
        label="L1",
        unit="%",
        better="lower",
        region="hole",
        definition="Mean absolute difference over pixels and channels, as a percentage of the "
        "range of values; 0 is perfect, 100 the worst.",
    ),
    "l2_percent": Metric(
        hole_l2_percent,
        label="L2",
        unit="%",
        better="lower",
        region="hole",
        definition="Mean squared difference over pixels and channels, values from 0 to 1, times "
        "100; 0 is perfect, 100 the worst.",
    ),
    "psnr_db": Metric(
        psnr_db,
        label="PSNR",
        unit="dB",
        better="higher",
        region="image",
        definition="Peak signal-to-noise ratio: how far the mean squared difference is below the "
        "peak value, in decibels, 100 at most.",
    ),
    "ssim": Metric(
        ssim,
        label="SSIM",
        unit="",
        better="higher",
        region="image",
        definition="Structural similarity in gaussian windows of 11 pixels, mean over pixels and "
        "channels; 1 is perfect, -1 the worst.",
    ),
    "tv_percent": Metric(
        tv_percent,
        label="TV",
        unit="%",
        better="lower",
        region="image",
        definition="Total variation: absolute differences of neighbors below and to the right, "
        "their sum over the number of values, as a percentage of the range; blur lowers it too.",
    ),
}
"""Every metric of an evaluation, by the name that logs, files and checkpoints give it."""
