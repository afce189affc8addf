"""What fills holes in an evaluation: a generator, its first stage, methods without training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from models import Generator
from models.masking import erase, paste
from pipeline.data.batch import Batch
from pipeline.evaluation.metrics import UnitImage
from pipeline.evaluation.packs import PackContent

RADIUS_PX = 3  # of OpenCV's inpainting, as in its documentation


class Filled(NamedTuple):
    """A filled image."""

    completed: UnitImage
    """Known pixels are those of the image."""
    coarse: UnitImage | None
    """The first stage's output; None where there is only one stage."""


class Filler(Protocol):
    """Fills the hole of one image of a pack."""

    guided: bool

    def __call__(self, content: PackContent) -> Filled: ...


@dataclass(frozen=True)
class Baseline:
    """A simple way to fill holes, which a trained network should beat."""

    about: str
    fill: Callable[[PackContent], UnitImage] | None
    """None for the coarse stage, which is a part of the evaluated weights."""


def _flat(content: PackContent, color: np.ndarray) -> UnitImage:
    completed: UnitImage = content.image.astype(np.float32) / 255
    completed[content.mask > 0] = color
    return completed


def _gray(content: PackContent) -> UnitImage:
    return _flat(content, np.full(3, 0.5, np.float32))


def _mean_color(content: PackContent) -> UnitImage:
    known = content.image[content.mask == 0]  # (pixels, 3)
    return _flat(content, known.mean(axis=0, dtype=np.float64).astype(np.float32) / 255)


def _opencv(content: PackContent, method: int) -> UnitImage:
    filled = cv2.inpaint(content.image, content.mask, RADIUS_PX, method)
    inside = content.mask[..., None] > 0
    completed: UnitImage = np.where(inside, filled, content.image).astype(np.float32) / 255
    return completed


BASELINES: Mapping[str, Baseline] = {
    "gray": Baseline("middle gray", _gray),
    "mean-color": Baseline("the mean of the known pixels", _mean_color),
    "telea": Baseline(
        f"OpenCV's inpainting by Telea (2004), radius {RADIUS_PX} px",
        lambda content: _opencv(content, cv2.INPAINT_TELEA),
    ),
    "navier-stokes": Baseline(
        f"OpenCV's inpainting by Bertalmio et al. (2001), radius {RADIUS_PX} px",
        lambda content: _opencv(content, cv2.INPAINT_NS),
    ),
    "coarse": Baseline("the generator's first stage alone", None),
}
"""Every baseline by the name that ``evaluate --baseline`` takes."""


class UntrainedFiller:
    """Fills by a baseline."""

    guided = False

    def __init__(self, fill: Callable[[PackContent], UnitImage]) -> None:
        self._fill = fill

    def __call__(self, content: PackContent) -> Filled:
        return Filled(self._fill(content), None)


class GeneratorFiller:
    """Fills by a generator, or by its coarse stage alone; one image at a time.

    So the batch size cannot change a bit of the result.
    """

    def __init__(self, generator: Generator, device: torch.device, *, coarse_only: bool) -> None:
        self.guided = generator.guided
        self._generator, self._device = generator.to(device), device
        self._coarse_only = coarse_only

    @torch.inference_mode()
    def __call__(self, content: PackContent) -> Filled:
        image, mask, sketch = (torch.from_numpy(np.array(part))[None] for part in content)
        ready = Batch(image, mask, sketch, ("",)).to(self._device)
        coarse, refined = self._generator(
            erase(ready.image, ready.mask), ready.mask, ready.sketch if self.guided else None
        )
        chosen = coarse if self._coarse_only else refined
        completed = paste(chosen, into=ready.image, mask=ready.mask)
        return Filled(_zero_to_one(completed), None if self._coarse_only else _zero_to_one(coarse))


def _zero_to_one(image: Tensor) -> UnitImage:
    unit: UnitImage = ((image[0].float() + 1) / 2).permute(1, 2, 0).contiguous().cpu().numpy()
    return unit
