"""Metrics equal those of scikit-image and torchmetrics, and mean what their docstrings say."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.image import structural_similarity_index_measure

from pipeline.evaluation import metrics

skimage_metrics = pytest.importorskip("skimage.metrics")
skimage_data = pytest.importorskip("skimage.data")


@pytest.fixture(scope="module")
def original() -> np.ndarray:
    photograph: np.ndarray = skimage_data.astronaut()[40:168, 150:310]
    return (photograph / 255).astype(np.float32)


def disturbed(original: np.ndarray, noise: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    noisy = original + noise * rng.standard_normal(original.shape)
    return np.clip(noisy, 0, 1).astype(np.float32)


def skimage_ssim(completed: np.ndarray, original: np.ndarray) -> float:
    value = skimage_metrics.structural_similarity(
        completed.astype(np.float64),
        original.astype(np.float64),
        data_range=1.0,
        channel_axis=-1,
        gaussian_weights=True,
        use_sample_covariance=False,
    )
    return float(value)


@pytest.mark.parametrize("noise", [0.001, 0.01, 0.1, 0.5])
def test_ssim_equals_scikit_image_and_torchmetrics(original: np.ndarray, noise: float) -> None:
    completed = disturbed(original, noise)
    ours = metrics.ssim(completed, original)
    assert ours == pytest.approx(skimage_ssim(completed, original), abs=1e-6)
    a, b = (torch.from_numpy(p).double().permute(2, 0, 1)[None] for p in (completed, original))
    _, whole = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    # torchmetrics also has windows that reach over the border, into a reflection of the image
    assert ours == pytest.approx(float(whole[..., 5:-5, 5:-5].mean()), abs=1e-5)


def test_ssim_of_flat_images_does_not_suffer_from_cancellation() -> None:
    flat = np.full((64, 64, 3), 0.9, np.float32)
    flat[:32] = 0.1
    brighter = flat + np.float32(1e-3)
    ours = metrics.ssim(brighter, flat)
    assert ours == pytest.approx(skimage_ssim(brighter, flat), abs=1e-7)


@pytest.mark.parametrize("noise", [0.001, 0.1])
def test_psnr_equals_scikit_image(original: np.ndarray, noise: float) -> None:
    completed = disturbed(original, noise)
    theirs = skimage_metrics.peak_signal_noise_ratio(original, completed, data_range=1.0)
    assert metrics.psnr_db(completed, original) == pytest.approx(float(theirs), abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(height=st.integers(11, 40), width=st.integers(11, 40), seed=st.integers(0, 2**32 - 1))
def test_l1_and_l2_are_means_over_the_hole_alone(height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    original, completed = rng.random((2, height, width, 3), np.float32)
    mask = rng.integers(0, 2, (height, width), np.uint8)
    mask[0, 0] = 1
    differences = [
        float(completed[y, x, c]) - float(original[y, x, c])
        for y in range(height)
        for x in range(width)
        for c in range(3)
        if mask[y, x]
    ]
    l1 = 100 * sum(abs(d) for d in differences) / len(differences)
    l2 = 100 * sum(d * d for d in differences) / len(differences)
    quality = metrics.measure(completed, original, mask)
    assert quality["l1_percent"] == pytest.approx(l1, rel=1e-5)
    assert quality["l2_percent"] == pytest.approx(l2, rel=1e-5)
    assert 0 <= quality["l2_percent"] <= quality["l1_percent"] <= 100


def test_a_perfect_completion_has_no_error_and_finite_metrics(original: np.ndarray) -> None:
    mask = np.ones(original.shape[:2], np.uint8)
    quality = metrics.measure(original, original, mask)
    assert quality.pop("tv_percent") > 0
    assert quality == {"l1_percent": 0, "l2_percent": 0, "psnr_db": 100, "ssim": 1}


def test_total_variation_is_the_sum_over_neighbors_below_and_to_the_right() -> None:
    image = np.random.default_rng(0).random((3, 4, 3)).astype(np.float32)
    expected = 0.0
    for y in range(3):
        for x in range(4):
            for c in range(3):
                if y < 2:
                    expected += abs(float(image[y + 1, x, c]) - float(image[y, x, c]))
                if x < 3:
                    expected += abs(float(image[y, x + 1, c]) - float(image[y, x, c]))
    assert metrics.tv_percent(image, image) == pytest.approx(100 * expected / 36)
    assert metrics.tv_percent(np.full((3, 4, 3), 0.3, np.float32), image) == 0


def test_a_image_without_a_hole_has_no_error(original: np.ndarray) -> None:
    mask = np.zeros(original.shape[:2], np.uint8)
    quality = metrics.measure(original, original, mask)
    assert quality["l1_percent"] == quality["l2_percent"] == 0


def test_a_black_hole_in_white_is_the_greatest_error() -> None:
    original = np.ones((16, 16, 3), np.float32)
    mask = np.zeros((16, 16), np.uint8)
    mask[:8, :8] = 1
    completed = original * (1 - mask[..., None]).astype(np.float32)
    quality = metrics.measure(completed, original, mask)
    assert quality["l1_percent"] == quality["l2_percent"] == 100
    assert quality["psnr_db"] == pytest.approx(-10 * math.log10(1 / 4))


def test_values_outside_the_range_count_as_clipped(original: np.ndarray) -> None:
    mask = np.ones(original.shape[:2], np.uint8)
    beyond = np.where(original > 0.5, original + 1, original - 1).astype(np.float32)
    ends = (original > 0.5).astype(np.float32)
    assert metrics.measure(beyond, original, mask) == metrics.measure(ends, original, mask)


def test_ssim_of_too_small_a_image_is_refused() -> None:
    small = np.zeros((10, 64, 3), np.float32)
    with pytest.raises(ValueError, match="SSIM of a 10 x 64 image"):
        metrics.ssim(small, small)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_pixel_that_is_not_finite_makes_every_metric_nan(
    original: np.ndarray, value: float
) -> None:
    completed = original.copy()
    completed[60, 70, 1] = value
    values = metrics.measure(completed, original, np.ones(original.shape[:2], np.uint8))
    assert set(values) == set(metrics.METRICS)
    assert all(math.isnan(each) for each in values.values())


def test_a_metric_of_the_hole_ignores_pixels_outside_it(original: np.ndarray) -> None:
    mask = np.zeros(original.shape[:2], np.uint8)
    mask[:10] = 1
    completed = original.copy()
    completed[20:] = 0.5
    values = metrics.measure(completed, original, mask)
    for name, metric in metrics.METRICS.items():
        best = {"lower": 0.0, "higher": 100.0 if metric.unit == "dB" else 1.0}[metric.better]
        assert (values[name] == best) == (metric.region == "hole")


def test_every_metric_is_best_for_a_perfect_completion(original: np.ndarray) -> None:
    mask = np.ones(original.shape[:2], np.uint8)
    perfect = metrics.measure(original, original, mask)
    worse = metrics.measure(disturbed(original, 0.1), original, mask)
    for name, metric in metrics.METRICS.items():
        assert (perfect[name] < worse[name]) == (metric.better == "lower")
