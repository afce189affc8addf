"""Sketches that guide the fill: edges above a threshold, or facial landmarks joined by lines."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from data_prep.images import Strokes

# First and last point in the order of iBUG's 68, and whether the line returns to its start.
FACE_LINES = (
    (0, 16, False),  # jaw
    (17, 21, False),  # right brow, as the person sees it
    (22, 26, False),  # left brow
    (27, 30, False),  # bridge of the nose
    (31, 35, False),  # nostrils
    (36, 41, True),  # right eye
    (42, 47, True),  # left eye
    (48, 59, True),  # outer lips
    (60, 67, True),  # inner lips
)


def edge_strokes(
    edges: Float[np.ndarray, "*batch height width"], threshold: float
) -> UInt8[np.ndarray, "*batch height width"]:
    """1 where edges in [0, 1] are strictly above ``threshold`` (paper, section 3.5)."""
    return (edges > threshold).astype(np.uint8)


def face_strokes(
    points: Float[np.ndarray, "68 2"], height: int, width: int, *, line_width: int
) -> Strokes:
    """Landmarks joined by lines of ``line_width`` pixels, without anti-aliasing.

    ``points`` are (x, y) in pixels of the image; they may lie outside it.
    """
    canvas = np.zeros((height, width), np.uint8)
    whole = np.rint(points).astype(np.int32)
    for first, last, closed in FACE_LINES:
        line = whole[first : last + 1]
        cv2.polylines(canvas, [line], closed, 1, thickness=line_width, lineType=cv2.LINE_8)
    return canvas
