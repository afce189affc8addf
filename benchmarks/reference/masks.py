"""The authors' free-form training mask, drawn with Pillow as they draw it (paper, Algorithm 1)."""

import math

import numpy as np
from PIL import Image, ImageDraw


def random_mask(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A rectangle and strokes, float32 (1, 1, height, width), 1 in the hole."""
    union = np.maximum(rectangle(height, width, rng), strokes(height, width, rng))
    mask: np.ndarray = union[None, None].astype(np.float32)
    return mask


def rectangle(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Half the image each way, shrunk by up to a sixteenth at every end."""
    tall, wide = height // 2, width // 2
    top, left = rng.integers(0, height - tall), rng.integers(0, width - wide)
    inset_y, inset_x = rng.integers(0, tall // 8 + 1), rng.integers(0, wide // 8 + 1)
    mask = np.zeros((height, width), np.float32)
    mask[top + inset_y : top + tall - inset_y, left + inset_x : left + wide - inset_x] = 1
    return mask


def strokes(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """One to three strokes of four to eleven segments; lengths follow the image's diagonal."""
    radius = math.hypot(height, width) / 8
    canvas = Image.new("L", (width, height), 0)
    for _ in range(rng.integers(1, 4)):
        low = 2 * math.pi / 5 - rng.uniform(0, 2 * math.pi / 15)
        high = 2 * math.pi / 5 + rng.uniform(0, 2 * math.pi / 15)
        segments = rng.integers(4, 12)
        points = [(int(rng.integers(0, width)), int(rng.integers(0, height)))]
        for index in range(segments):
            angle = rng.uniform(low, high)
            if index % 2 == 0:
                angle = 2 * math.pi - angle
            length = float(np.clip(rng.normal(radius, radius // 2), 0, 2 * radius))
            x = np.clip(points[-1][0] + length * math.cos(angle), 0, width)
            y = np.clip(points[-1][1] + length * math.sin(angle), 0, height)
            points.append((int(x), int(y)))
        brush = int(rng.uniform(12, 40))
        draw = ImageDraw.Draw(canvas)
        draw.line(points, fill=1, width=brush)
        for x, y in points:
            half = brush // 2
            draw.ellipse((x - half, y - half, x + half, y + half), fill=1)
    return np.asarray(canvas, np.float32)
