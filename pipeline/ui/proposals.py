"""A sketch proposed from the image itself, for the user to edit."""

import threading
from functools import cache
from typing import Literal, get_args

from data_prep.hed import EdgeDetector, Hed, load_network, read_weights
from data_prep.images import Pixels, Strokes
from data_prep.landmarks import FaceDetector
from data_prep.masks import MaskPixels
from data_prep.settings import SketchSettings
from data_prep.sketches import edge_strokes, face_strokes

Detector = Literal["edges", "face"]
DETECTORS: tuple[Detector, ...] = get_args(Detector)

_one_at_a_time = threading.Lock()  # dlib's detectors keep state while they search


def propose_sketch(
    detector: Detector, image: Pixels, hole: MaskPixels, *, detect_px: int
) -> Strokes:
    """What ``detector`` finds in ``image``, inside ``hole``.

    "edges": HED above the threshold of the paper, found where the short side is at most
    ``detect_px``, since HED marks what is large in the image that it sees. "face": lines through 68
    landmarks. Raises ValueError where weights of the detector are missing or no face is found.
    """
    height, width = hole.shape
    smaller = min(height, width) > detect_px
    with _one_at_a_time:
        if detector == "face":
            face = _face_detector()(image)
            if face is None:
                raise ValueError("no face was found in this image: choose edges, or draw the lines")
            thick = round(min(height, width) / detect_px) if smaller else 1
            strokes = face_strokes(face.points, height, width, line_width=max(1, thick))
        else:
            find = EdgeDetector(_hed(), detect_px=detect_px if smaller else None)
            strokes = edge_strokes(find(image[None])[0], SketchSettings().threshold)
    inside: Strokes = strokes & hole
    return inside


@cache
def _hed() -> Hed:
    return load_network(read_weights(None))


@cache
def _face_detector() -> FaceDetector:
    return FaceDetector()
