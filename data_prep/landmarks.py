"""The 68 landmarks of the largest whole face in an image, by dlib."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8

DETECTION_PX = 512
# A HOG score below dlib's own threshold of 0. With it and doubling, 98 of 99 annotated images
# have a face instead of 87, and 9 of 150 images of scenes instead of 4.
DOUBTFUL = -0.25
SEARCH = "HOG at 512 px, then doubled; whole faces first"  # part of a dataset's digest
# The file inside the package face_recognition_models 0.3.0.
PACKAGED_SHA256 = "fbdc2cb80eb9aa7a758672cbfdda32ba6300efe9b6e6c7a299ff7e736b11b92f"
INSTALL = "faces need landmarks: pip install 'deepfill-pipeline[faces]'"


@dataclass(frozen=True)
class Face:
    """Positions are (x, y) in pixels of the image that was searched."""

    points: Float[np.ndarray, "68 2"]
    box: tuple[float, float, float, float]
    """Left, top, right, bottom."""


class FaceDetector:
    """Finds faces with HOG features, then the 68 points in iBUG order."""

    def __init__(self) -> None:
        try:
            import dlib  # an optional extra, and scenes do without
        except ModuleNotFoundError:
            raise ValueError(INSTALL) from None
        path = packaged_model()
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != PACKAGED_SHA256:
            raise ValueError(f"{path} has SHA-256 {found} instead of {PACKAGED_SHA256}")
        self._find = dlib.get_frontal_face_detector()
        self._predict = dlib.shape_predictor(str(path))

    def __call__(self, pixels: UInt8[np.ndarray, "height width 3"]) -> Face | None:
        """The largest face of an RGB image that its border does not cut, or None.

        Searches at no more than 512 pixels, and at twice that where it finds none; the points are
        scaled back. A cut face counts where no whole one is at least half as large.
        """
        height, width = pixels.shape[:2]
        scale = max(1.0, max(height, width) / DETECTION_PX)
        size = (round(width / scale), round(height / scale))
        small = pixels if scale == 1 else cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        small = np.ascontiguousarray(small)  # dlib misreads other arrays silently
        boxes = self._boxes(small)
        if not boxes:
            return None
        box = _largest_whole(boxes, *small.shape[:2])
        shape = self._predict(small, box)
        points = np.array([[point.x, point.y] for point in shape.parts()], np.float64)
        corners = np.array([[box.left(), box.top()], [box.right(), box.bottom()]], np.float64)
        return Face(
            rescaled(points, small.shape[:2], (height, width)),
            tuple(rescaled(corners, small.shape[:2], (height, width)).ravel().tolist()),
        )

    def _boxes(self, small: UInt8[np.ndarray, "height width 3"]) -> Sequence[Any]:
        # Small images are doubled at once, since the detector needs faces of 80 pixels.
        doublings = 1 if 2 * max(small.shape[:2]) <= DETECTION_PX else 0
        boxes: Sequence[Any] = self._find(small, doublings)
        if boxes:
            return boxes
        boxes, scores, _ = self._find.run(small, doublings + 1, DOUBTFUL)
        return [box for box, score in zip(boxes, scores, strict=True) if score >= 0] or boxes


def _largest_whole(boxes: Sequence[Any], height: int, width: int) -> Any:
    def rank(box: Any) -> tuple[bool, int, int, int]:
        whole = min(box.left(), box.top()) >= 0 and box.right() < width and box.bottom() < height
        return whole, box.area(), -box.left(), -box.top()

    largest = max(box.area() for box in boxes)
    return max((box for box in boxes if 2 * box.area() >= largest), key=rank)


def rescaled(
    points: Float[np.ndarray, "points 2"], old: tuple[int, ...], new: tuple[int, ...]
) -> Float[np.ndarray, "points 2"]:
    """(x, y) in an image of (height, width) ``old``, after scaling it to ``new``."""
    ratio = np.array([new[1] / old[1], new[0] / old[0]])
    moved: np.ndarray = (points + 0.5) * ratio - 0.5  # whole numbers are centers of pixels
    return moved


def packaged_model() -> Path:
    """The file in face_recognition_models, found without importing it (needs pkg_resources)."""
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(INSTALL)
    folder = spec.submodule_search_locations[0]
    return Path(folder, "models", "shape_predictor_68_face_landmarks.dat")
