"""FID, U-IDS, P-IDS and LPIPS equal plain numpy and scikit-learn on small networks."""

import io
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.evaluation.feature_metrics import (
    FeatureNetwork,
    InceptionFeatures,
    Lpips,
    frechet_distance,
    inception_discriminability,
    linear_svm,
)

CPU = torch.device("cpu")


class Means(nn.Module):
    """Means of 8-bit channels, in the interface of StyleGAN's Inception."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        if not return_features:
            raise ValueError("return_features is expected")
        return images.float().mean(dim=[2, 3]) / 255


class Halves(nn.Module):
    """Values over 255 of the upper left pixel, in the interface of StyleGAN's VGG16."""

    def forward(
        self, images: Tensor, resize_images: bool = True, return_lpips: bool = False
    ) -> Tensor:
        if resize_images or not return_lpips:
            raise ValueError("resize_images=False, return_lpips=True is expected")
        return images[:, :, :1, :1] / 255


def torchscript(module: nn.Module) -> bytes:
    data = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(module), data)
    return data.getvalue()


def inception() -> FeatureNetwork:
    return FeatureNetwork("inception", torchscript(Means()))


def vgg() -> FeatureNetwork:
    return FeatureNetwork("vgg", torchscript(Halves()))


def features(count: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((width, width))
    return (rng.standard_normal((count, width)) @ mixing + shift).astype(np.float32)


def test_the_frechet_distance_is_the_one_with_a_root_of_the_covariances_product() -> None:
    real, fake = features(200, 6, 0), features(150, 6, 1, shift=0.3) * 1.2
    a, b = (np.cov(each.astype(np.float64), rowvar=False) for each in (real, fake))
    values, vectors = np.linalg.eig(a @ b)  # not symmetric, yet with real positive eigenvalues
    root = (vectors * np.sqrt(values)) @ np.linalg.inv(vectors)
    np.testing.assert_allclose(root @ root, a @ b, atol=1e-8)
    apart = real.mean(axis=0, dtype=np.float64) - fake.mean(axis=0, dtype=np.float64)
    expected = apart @ apart + np.trace(a + b - 2 * root.real)
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-9)


def test_the_frechet_distance_of_one_feature_is_that_of_two_normal_distributions() -> None:
    real, fake = features(50, 1, 0), 3 * features(50, 1, 0) + 2
    mean, deviation = 2 + 2 * real.mean(dtype=np.float64), 2 * real.std(dtype=np.float64, ddof=1)
    assert frechet_distance(real, fake) == pytest.approx(mean**2 + deviation**2, rel=1e-5)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-9)


def test_fewer_images_than_features_still_have_a_frechet_distance() -> None:
    found = frechet_distance(features(5, 20, 0), features(5, 20, 1))
    assert math.isfinite(found)
    assert found > 0


def test_the_support_vector_machine_is_that_of_liblinear() -> None:
    svm = pytest.importorskip("sklearn.svm")
    real, fake = features(80, 5, 0), features(80, 5, 1, shift=0.8)
    both, labels = np.concatenate([real, fake]).astype(np.float64), [1.0] * 80 + [-1.0] * 80
    theirs = svm.LinearSVC(dual=False, tol=1e-10, max_iter=100_000).fit(both, labels)
    ours = linear_svm(both, labels)
    np.testing.assert_allclose(ours, theirs.decision_function(both), atol=1e-5)
    u_ids, p_ids = inception_discriminability(real, fake)
    assert u_ids == pytest.approx(100 * (1 - theirs.score(both, labels)))
    decisions = theirs.decision_function(both)
    assert p_ids == pytest.approx(100 * (decisions[80:] > decisions[:80]).mean())
    assert 0 < u_ids < 50


def test_images_that_cannot_be_told_apart_have_u_ids_of_half_and_obvious_ones_none() -> None:
    same = features(60, 3, 0)
    assert inception_discriminability(same, same) == (50, 0)
    assert inception_discriminability(same, same + 1000) == (0, 0)


def test_features_that_are_not_finite_have_no_distance() -> None:
    broken = features(20, 3, 0)
    broken[3, 1] = math.nan
    assert math.isnan(frechet_distance(features(20, 3, 1), broken))
    assert all(map(math.isnan, inception_discriminability(features(20, 3, 1), broken)))


def test_networks_get_8_bit_images_and_unrounded_ones_in_the_range_that_they_expect() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    np.testing.assert_allclose(
        InceptionFeatures(inception(), CPU)(image), image.mean(axis=(0, 1)) / 255, rtol=1e-5
    )
    first, second = (np.full((8, 8, 3), value, np.float32) for value in (0.25, 0.75))
    assert Lpips(vgg(), CPU)(first, second) == pytest.approx(3 * 0.5**2, rel=1e-6)
    assert math.isnan(Lpips(vgg(), CPU)(np.full((8, 8, 3), np.nan, np.float32), second))


def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--inception .* was not found"):
        FeatureNetwork.read("inception", str(tmp_path / "missing.pt"))
    (tmp_path / "text.pt").write_text("no network")
    network = FeatureNetwork.read("vgg", str(tmp_path / "text.pt"))
    with pytest.raises(ValueError, match="--vgg is not a TorchScript file"):
        Lpips(network, CPU)
    with pytest.raises(ValueError, match="--inception did not take an image"):
        InceptionFeatures(FeatureNetwork("inception", vgg().data), CPU)(
            np.zeros((8, 8, 3), np.uint8)
        )
