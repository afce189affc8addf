"""FID, U-IDS, P-IDS and LPIPS on feature networks that the user gives as TorchScript.

The mathematics is numpy alone. The networks are those that StyleGAN's authors publish.
"""

import hashlib
import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8

from cluster.storage import MissingKeyError, folder_and_name, open_store
from pipeline.evaluation.metrics import UnitImage

FeatureRows = Float[np.ndarray, "images features"]
FEW_IMAGES = 10_000  # below, FID is biased upwards, and U-IDS and P-IDS jump
_NEWTON_STEPS = 100
NetworkKind = Literal["inception", "vgg"]


@dataclass(frozen=True)
class FeatureNetwork:
    """A TorchScript file. Picklable, as it travels to other machines."""

    kind: NetworkKind
    data: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @classmethod
    def read(cls, kind: NetworkKind, source: str) -> "FeatureNetwork":
        """The file at a path or URL. Raises FileNotFoundError, StorageError."""
        folder, name = folder_and_name(source)
        try:
            return cls(kind, open_store(folder).get(name))
        except MissingKeyError as error:
            raise FileNotFoundError(
                f"--{kind} {source} was not found: give the TorchScript file that StyleGAN's "
                "authors publish"
            ) from error


class InceptionFeatures:
    """Features of 8-bit images by ``inception-2015-12-05.pt``, which resizes them itself."""

    def __init__(self, network: FeatureNetwork, device: torch.device) -> None:
        self._network, self._device = _load(network, device), device

    @torch.inference_mode()
    def __call__(self, image: UInt8[np.ndarray, "height width 3"]) -> np.ndarray:
        batch = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(self._device)
        features = _called(self._network, "inception", batch, return_features=True)
        return features.reshape(-1).float().cpu().numpy()


class Lpips:
    """The perceptual distance of two images by ``vgg16.pt``, at their own size."""

    def __init__(self, network: FeatureNetwork, device: torch.device) -> None:
        self._network, self._device = _load(network, device), device

    @torch.inference_mode()
    def __call__(self, completed: UnitImage, original: UnitImage) -> float:
        """NaN where ``completed`` has a pixel that is not finite."""
        if not np.isfinite(completed).all():
            return math.nan
        both = torch.from_numpy(np.stack([completed, original])).clamp(0, 1) * 255
        features = _called(
            self._network,
            "vgg",
            both.permute(0, 3, 1, 2).contiguous().to(self._device),
            resize_images=False,
            return_lpips=True,
        )
        first, second = features.double().flatten(1)
        return float((first - second).square().sum())


def _load(network: FeatureNetwork, device: torch.device) -> torch.nn.Module:
    try:
        with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated, and published
            loaded: torch.nn.Module = torch.jit.load(  # type: ignore[no-untyped-call]
                io.BytesIO(network.data), map_location=device
            )
    except RuntimeError as error:
        raise ValueError(
            f"--{network.kind} is not a TorchScript file: give the one of StyleGAN's authors"
        ) from error
    return loaded.eval()


def _called(
    network: torch.nn.Module, kind: str, batch: torch.Tensor, **options: bool
) -> torch.Tensor:
    try:
        with warnings.catch_warnings(action="ignore"):
            features: torch.Tensor = network(batch, **options)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"--{kind} did not take an image with {', '.join(options)}: {reason}"
        ) from error
    return features


def frechet_distance(real: FeatureRows, fake: FeatureRows) -> float:
    """Between normal distributions fitted to both (Heusel et al. 2017); NaN where one holds NaN.

    The trace of the root of the covariances' product is the sum of the roots of the eigenvalues of
    ``A B A`` with ``A`` the root of the first one: symmetric, so numpy is enough.
    """
    if not (np.isfinite(real).all() and np.isfinite(fake).all()):
        return math.nan
    means, covariances = [], []
    for features in (real, fake):
        double = features.astype(np.float64)
        means.append(double.mean(axis=0))
        covariances.append(np.atleast_2d(np.cov(double, rowvar=False)))
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = root @ covariances[1] @ root
    trace = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0, None)).sum()
    apart = np.square(means[0] - means[1]).sum()
    return float(apart + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * trace)


def inception_discriminability(real: FeatureRows, fake: FeatureRows) -> tuple[float, float]:
    """U-IDS and P-IDS in percent (Zhao et al. 2021, section 4); row i of both is the same image.

    U-IDS is the share of images that a linear support vector machine takes for the other kind,
    P-IDS that of the pairs whose filled image seems the more real one. NaN where there is NaN.
    """
    if not (np.isfinite(real).all() and np.isfinite(fake).all()):
        return math.nan, math.nan
    decisions = linear_svm(np.concatenate([real, fake]), [1.0] * len(real) + [-1.0] * len(fake))
    of_real, of_fake = decisions[: len(real)], decisions[len(real) :]
    wrong = (of_real <= 0).sum() + (of_fake > 0).sum()
    return 100 * float(wrong) / len(decisions), 100 * float((of_fake > of_real).mean())


def linear_svm(
    features: FeatureRows, labels: Sequence[float], *, weight: float = 1.0
) -> Float64[np.ndarray, " images"]:
    """Decisions about its own training set, labels 1 and -1; ``weight`` is liblinear's C.

    Minimizes half the squared norm of the weights, bias included, plus C times the squared hinges:
    liblinear's L2-regularized L2-loss machine, that of the published numbers. By Newton's method
    with the step halved until it descends (Keerthi and DeCoste 2005).
    """
    inputs = np.column_stack([features.astype(np.float64), np.ones(len(features))])
    signs = np.asarray(labels, np.float64)
    solution = np.zeros(inputs.shape[1])

    def objective(weights: np.ndarray) -> float:
        hinges = np.maximum(1 - signs * (inputs @ weights), 0)
        return float(weights @ weights / 2 + weight * hinges @ hinges)

    value = objective(solution)
    for _ in range(_NEWTON_STEPS):
        margins = 1 - signs * (inputs @ solution)
        active = inputs[margins > 0]
        gradient = solution - 2 * weight * (active.T @ (signs * margins)[margins > 0])
        if np.abs(gradient).max() < 1e-9 * max(1.0, weight * len(inputs)):
            break
        hessian = np.eye(len(solution)) + 2 * weight * (active.T @ active)
        direction = np.linalg.solve(hessian, gradient)
        step = 1.0
        while (found := objective(solution - step * direction)) > value and step > 1e-10:
            step /= 2
        if found >= value:
            break
        solution, value = solution - step * direction, found
    return inputs @ solution
