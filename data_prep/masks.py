"""Masks: the authors' kind, a corrected one, the paper's brush, boxes, LaMa's, your own images.

Training draws them, yet they are here: they are data, drawn with OpenCV in loader threads, and
``pipeline`` and the benchmarks use them without torch.
"""

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import PurePosixPath
from statistics import NormalDist
from typing import TypeAlias

import cv2
import numpy as np
from jaxtyping import UInt8

from cluster.storage import StorageError, one_line, open_store
from data_prep.files import walk_files
from data_prep.image_grid import image_grid
from data_prep.images import IMAGE_SUFFIXES, ImageError, Pixels, read_mask

MaskPixels: TypeAlias = UInt8[np.ndarray, "height width"]  # 1 in the hole, 0 where pixels are known

# Of the square of 256 pixels that the authors' constants, and ours, are made for.
_REFERENCE_DIAGONAL_PX = math.hypot(256, 256)
_LENGTH_BITS = 10  # random bits that choose the length of a segment, whose ends are whole pixels
GRAY = (128, 128, 128)
SHOWN_FAULTS = 20


@dataclass(frozen=True)
class BrushSettings:
    """The paper's Algorithm 1; it gives no numbers, these are for images of 256 px.

    Lengths scale with the diagonal of the image.
    """

    max_vertex: int = 12
    """Most segments in a stroke; uniform from 1."""
    max_length: float = 60.0
    """Longest segment, in pixels at 256 px; uniform below it."""
    max_brush_width: float = 40.0
    """Widest stroke, in pixels at 256 px; uniform below it, at least one pixel."""
    max_angle: float = 2.0
    """Largest turn at a vertex, in radians; uniform below it, reversed at even vertices."""
    max_strokes: int = 4
    """Most strokes in a mask; uniform from 1."""

    def __post_init__(self) -> None:
        faults = [
            f"{name} {value} should be above 0" for name, value in vars(self).items() if value <= 0
        ]
        if faults:
            raise ValueError("; ".join(faults))


@dataclass(frozen=True)
class BoxSettings:
    """One rectangle, each side uniform between two fractions of the image's side."""

    min_side: float = 0.25
    """Smallest side as a fraction of the image's."""
    max_side: float = 0.5
    """Largest side as a fraction of the image's."""

    def __post_init__(self) -> None:
        faults = [
            f"{name} {value} should be 0 to 1"
            for name, value in vars(self).items()
            if not 0 <= value <= 1
        ]
        if self.min_side > self.max_side:
            faults.append(f"min_side {self.min_side} should be at most max_side {self.max_side}")
        if faults:
            raise ValueError("; ".join(faults))


@dataclass(frozen=True)
class MaskSettings:
    """Which holes training and validation draw."""

    mixture: Mapping[str, float] = field(default_factory=lambda: {"corrected": 1.0})
    """Kinds of holes (keys of ``MASK_KINDS``: ``official``, ``corrected``, ``brush``, ``box``,
    ``thin``, ``medium``, ``thick``, ``folder``) and their weights; the share of a kind is its
    weight over their sum."""
    per_sample: bool = True
    """One mask per image; false: one per global batch (the authors' release draws one for every GPU
    and for each of the two updates)."""
    brush: BrushSettings = field(default_factory=BrushSettings)
    """Strokes of the kind ``brush``."""
    box: BoxSettings = field(default_factory=BoxSettings)
    """Rectangles of the kind ``box``."""
    folder: str | None = None
    """Path or URL of the mask images for the kind ``folder``, drawn equally often."""
    white_is_hole: bool = True
    """False for masks as MAT has them, with the hole in black."""
    drawing: int = 2
    """How strokes of ``official`` are drawn: 2 covers what the authors' code covers, 1 (of runs
    that began before version 1.0, which keep it) 2 to 4 % more."""

    def __post_init__(self) -> None:
        faults = [
            f"mixture has a kind {kind!r}: it should be one of {', '.join(MASK_KINDS)}"
            for kind in self.mixture
            if kind not in MASK_KINDS
        ]
        faults += [
            f"mixture has {kind}: {weight}, which should be 0 or more"
            for kind, weight in self.mixture.items()
            if not weight >= 0
        ]
        if not any(weight > 0 for weight in self.mixture.values()):
            faults.append(f"mixture should name at least one kind of {', '.join(MASK_KINDS)}")
        if self.mixture.get("folder", 0) > 0 and self.folder is None:
            faults.append("mixture has folder, which needs masks.folder: where the masks are")
        if self.drawing not in (1, 2):
            faults.append(f"drawing {self.drawing} should be 1 or 2")
        if faults:
            raise ValueError("; ".join(faults))


def official_mask(height: int, width: int, rng: random.Random, drawing: int = 2) -> MaskPixels:
    """A rectangle and 1 to 3 strokes, as the authors' release draws them (v2, inpaint_ops.py).

    Kept with its peculiarities: strokes are never flipped, so the pen always drifts to the right
    and 35 % of their area falls in the left half; height and width are swapped for the pen, so on
    a wide image strokes end at ``x = height``; brush widths do not scale.
    At 256 x 256 a mask covers 0.31 of the image on average. ``drawing`` is that of
    ``MaskSettings``.
    """
    mask = np.zeros((height, width), np.uint8)
    draw = _draw_stroke if drawing == 1 else _draw_stroke_as_pillow
    _draw_zigzags(mask, rng, limit_x=height, limit_y=width, right=1, down=1, scale=1.0, draw=draw)
    _draw_rectangle(mask, rng)
    return mask


def corrected_mask(height: int, width: int, rng: random.Random) -> MaskPixels:
    """``official_mask`` without its peculiarities, at any size and aspect ratio.

    Strokes start anywhere, reach every side, are flipped left-right and top-bottom at random, and
    their width scales with the image, so coverage (0.31 on average) does not depend on its size.
    """
    mask = np.zeros((height, width), np.uint8)
    _draw_zigzags(
        mask,
        rng,
        limit_x=width,
        limit_y=height,
        right=1 if rng.random() < 0.5 else -1,
        down=1 if rng.random() < 0.5 else -1,
        scale=_scale(height, width),
        draw=_draw_stroke,
    )
    _draw_rectangle(mask, rng)
    return mask


def brush_mask(height: int, width: int, rng: random.Random, brush: BrushSettings) -> MaskPixels:
    """Several strokes of the paper's Algorithm 1, each flipped at random; never empty."""
    mask = np.zeros((height, width), np.uint8)
    scale = _scale(height, width)
    for _ in range(_below(brush.max_strokes, rng) + 1):
        # Drawing mirrored steps from a uniform start is flipping the drawn stroke.
        right = 1 if rng.random() < 0.5 else -1
        down = 1 if rng.random() < 0.5 else -1
        x, y = float(_below(width, rng)), float(_below(height, rng))
        vertices = [int(x), int(y)]
        for i in range(_below(brush.max_vertex, rng) + 1):
            angle = brush.max_angle * rng.random()
            if i % 2 == 0:
                angle = 2 * math.pi - angle
            length = brush.max_length * scale * rng.random()
            x = min(max(x + right * length * math.sin(angle), 0.0), width - 1.0)
            y = min(max(y + down * length * math.cos(angle), 0.0), height - 1.0)
            vertices += int(x), int(y)
        _draw_stroke(mask, vertices, brush.max_brush_width * scale * rng.random())
    return mask


def box_mask(height: int, width: int, rng: random.Random, box: BoxSettings) -> MaskPixels:
    """One rectangular hole inside the image."""
    box_height = max(1, round(rng.uniform(box.min_side, box.max_side) * height))
    box_width = max(1, round(rng.uniform(box.min_side, box.max_side) * width))
    top = _below(height - box_height + 1, rng)
    left = _below(width - box_width + 1, rng)
    mask = np.zeros((height, width), np.uint8)
    mask[top : top + box_height, left : left + box_width] = 1
    return mask


@dataclass(frozen=True)
class LamaSettings:
    """One of LaMa's sets of evaluation masks: strokes in some, boxes in others; pixels at 256 px.

    Lengths scale with the diagonal of the image. Segments are ``10`` pixels and more long, strokes
    ``5`` and more wide, as in LaMa's ``make_random_irregular_mask``.
    """

    min_strokes: int
    max_strokes: int
    max_length: int
    """Length of a segment beyond the least one of 10 pixels."""
    max_width: int
    """Width of a stroke beyond the least one of 5 pixels."""
    box_share: float = 0.0
    """Share of masks made of boxes instead of strokes."""
    max_boxes: int = 0
    min_box: int = 0
    max_box: int = 0
    margin: int = 0
    """Around boxes, free of them."""


LAMA: Mapping[str, LamaSettings] = {
    # configs/data_gen/random_{thin,medium,thick}_256.yaml of advimman/lama. Its code draws up to
    # one stroke more than max_times, and strokes and boxes in shares of 1 and 0.3.
    "thin": LamaSettings(4, 51, max_length=40, max_width=10),
    "medium": LamaSettings(
        4, 6, max_length=100, max_width=50, box_share=0.3 / 1.3, max_boxes=5, min_box=10, max_box=50
    ),
    "thick": LamaSettings(
        1,
        6,
        max_length=200,
        max_width=100,
        box_share=0.3 / 1.3,
        max_boxes=3,
        min_box=30,
        max_box=150,
        margin=10,
    ),
}
"""LaMa's narrow, medium and wide masks (Suvorov et al. 2022), as its repository generates them."""


def lama_mask(height: int, width: int, rng: random.Random, lama: LamaSettings) -> MaskPixels:
    """Strokes or boxes as LaMa draws them: turns of 0 to 3 radians, a new width at each vertex."""
    mask = np.zeros((height, width), np.uint8)
    scale = _scale(height, width)
    if rng.random() < lama.box_share:
        margin = min(int(lama.margin * scale), (min(height, width) - 1) // 2)
        for _ in range(1 + _below(lama.max_boxes, rng)):
            box_height, box_width = (
                max(1, round(scale * (lama.min_box + _below(lama.max_box - lama.min_box + 1, rng))))
                for _ in range(2)
            )
            box_height = min(box_height, height - 2 * margin)
            box_width = min(box_width, width - 2 * margin)
            top = margin + _below(height - 2 * margin - box_height + 1, rng)
            left = margin + _below(width - 2 * margin - box_width + 1, rng)
            mask[top : top + box_height, left : left + box_width] = 1
        return mask
    strokes = lama.min_strokes + _below(lama.max_strokes - lama.min_strokes + 1, rng)
    for stroke in range(strokes):
        x, y = _below(width, rng), _below(height, rng)
        for _ in range(1 + _below(5, rng)):
            angle = 0.01 + _below(4, rng)
            if stroke % 2 == 0:
                angle = 2 * math.pi - angle
            length = scale * (10 + _below(lama.max_length, rng))
            brush_width = scale * (5 + _below(lama.max_width, rng))
            end_x = min(max(int(x + length * math.sin(angle)), 0), width)
            end_y = min(max(int(y + length * math.cos(angle)), 0), height)
            _draw_stroke(mask, [x, y, end_x, end_y], brush_width)
            x, y = end_x, end_y
    return mask


class FolderMasks:
    """Masks from a folder of images, each drawn equally often. Can be pickled.

    Hidden files and folders, and those of thumbnails and trash, are left out.
    """

    def __init__(self, settings: MaskSettings) -> None:
        assert settings.folder is not None  # MaskSettings asks for it
        self._store = open_store(settings.folder)
        self._white_is_hole = settings.white_is_hole
        self._files = [
            name
            for name in sorted(walk_files(settings.folder))
            if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
        ]
        self._contents: dict[str, bytes] = {}
        if not self._files:
            raise ValueError(
                f"{settings.folder} holds no mask images ({' '.join(sorted(IMAGE_SUFFIXES))})"
            )

    def __call__(self, height: int, width: int, rng: random.Random) -> MaskPixels:
        name = self._files[_below(len(self._files), rng)]
        if name not in self._contents:  # kept as files: a few KB, and decoded 64 KB or more
            self._contents[name] = self._store.get(name)
        return self._read(name, self._contents[name], height, width)

    def check(self, height: int, width: int) -> None:
        """Read every mask at this size. Raises one ValueError that names all unusable ones."""

        def fault(name: str) -> str | None:
            try:
                self._read(name, self._store.get(name), height, width)
            except (ValueError, StorageError) as error:
                return str(error)
            return None

        with ThreadPoolExecutor(16) as pool:
            faults = [found for found in pool.map(fault, self._files) if found]
        if faults:
            more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
            raise ValueError(
                one_line(
                    f"{len(faults)} of {len(self._files)} masks of {self._store.url} cannot be "
                    f"used, repair or remove them: {'; '.join(faults[:SHOWN_FAULTS])}{more}"
                )
            )

    def _read(self, name: str, data: bytes, height: int, width: int) -> MaskPixels:
        try:
            mask = read_mask(data, size=(height, width), white_is_hole=self._white_is_hole)
        except ImageError as error:
            raise ValueError(f"mask {name}: {error}") from error
        if not mask.any():
            hole = "white" if self._white_is_hole else "black"
            raise ValueError(
                f"mask {name} has no hole at {height} x {width}: {hole} pixels mark it"
            )
        return mask


DrawStroke = Callable[[MaskPixels, list[int], float], None]
DrawMask = Callable[[int, int, random.Random], MaskPixels]
"""Draws one mask of this height and width; equal states of the generator give equal masks."""


@dataclass(frozen=True)
class MaskKind:
    """One kind of hole that a mixture can name."""

    about: str
    """What it draws, in a line."""
    drawer: Callable[[MaskSettings], DrawMask]
    """What draws it under these settings. The result can be pickled."""


def _draws_lama(settings: MaskSettings, *, lama: LamaSettings) -> DrawMask:
    return partial(lama_mask, lama=lama)


MASK_KINDS = {
    "official": MaskKind(
        "the released generator with its drift to the right",
        lambda settings: partial(official_mask, drawing=settings.drawing),
    ),
    "corrected": MaskKind(
        "official with working flips, any aspect ratio and a scaled brush",
        lambda settings: corrected_mask,
    ),
    "brush": MaskKind(
        "strokes of the paper's Algorithm 1",
        lambda settings: partial(brush_mask, brush=settings.brush),
    ),
    "thin": MaskKind("LaMa's narrow strokes", partial(_draws_lama, lama=LAMA["thin"])),
    "medium": MaskKind("LaMa's medium strokes", partial(_draws_lama, lama=LAMA["medium"])),
    "thick": MaskKind("LaMa's wide strokes", partial(_draws_lama, lama=LAMA["thick"])),
    "box": MaskKind("one rectangle", lambda settings: partial(box_mask, box=settings.box)),
    "folder": MaskKind("images of your own masks", FolderMasks),
}
"""Every kind of hole by the name that a recipe gives it; add an entry for another one."""


class MaskSampler:
    """Draws masks from the mixture of kinds in ``settings``. Can be pickled.

    Equal states of ``rng`` give equal masks. Raises ValueError for a folder without masks.
    """

    def __init__(self, settings: MaskSettings) -> None:
        used = sorted(kind for kind, weight in settings.mixture.items() if weight > 0)
        self._drawers = [MASK_KINDS[kind].drawer(settings) for kind in used]
        self._weights = list(accumulate(settings.mixture[kind] for kind in used))

    def check(self, height: int, width: int) -> None:
        """Read the whole folder of masks, if there is one, at this size.

        Raises one ValueError that names all its unusable files.
        """
        for drawer in self._drawers:
            if isinstance(drawer, FolderMasks):
                drawer.check(height, width)

    def __call__(self, height: int, width: int, rng: random.Random) -> MaskPixels:
        """One mask; which kind is the first draw from ``rng``."""
        drawn = bisect_right(self._weights, self._weights[-1] * rng.random())
        return self._drawers[drawn](height, width, rng)


def mask_sheet(
    sampler: MaskSampler, *, height: int, width: int, rows: int, columns: int, seed: int
) -> Pixels:
    """A grid of drawn masks, white in the hole, each with the share of the image it covers."""
    masks = [
        sampler(height, width, random.Random(f"sheet/{seed}/{index}"))
        for index in range(rows * columns)
    ]
    lines = [masks[first : first + columns] for first in range(0, len(masks), columns)]
    return image_grid(
        [[mask * 255 for mask in line] for line in lines],
        cell_captions=[[f"{mask.mean():.0%}" for mask in line] for line in lines],
        gap_px=8,
        background=GRAY,
    )


def _draw_zigzags(
    mask: MaskPixels,
    rng: random.Random,
    *,
    limit_x: int,
    limit_y: int,
    right: int,
    down: int,
    scale: float,
    draw: DrawStroke,
) -> None:
    """Draw the authors' 1 to 3 strokes; ``right`` and ``down`` of -1 mirror their directions.

    Starting uniformly in [0, limit) and walking mirrored steps is mirroring the drawn strokes.
    """
    lengths = _segment_lengths(math.hypot(*mask.shape) / 8)
    uniform, bits, cos, sin = rng.random, rng.getrandbits, math.cos, math.sin  # looked up once
    for _ in range(1 + int(3 * uniform())):
        segments = 4 + int(8 * uniform())
        low = math.radians(72 - 24 * uniform())
        spread = math.radians(72 + 24 * uniform()) - low
        x, y = int(limit_x * uniform()), int(limit_y * uniform())
        vertices = [x, y]
        vertical = -down  # the first segment of a stroke goes up
        for _ in range(segments):
            angle = low + spread * uniform()
            length = lengths[bits(_LENGTH_BITS)]
            x = int(x + right * length * cos(angle))
            y = int(y + vertical * length * sin(angle))
            x = 0 if x < 0 else limit_x if x > limit_x else x
            y = 0 if y < 0 else limit_y if y > limit_y else y
            vertices += x, y
            vertical = -vertical
        draw(mask, vertices, (12 + 28 * uniform()) * scale)


@lru_cache(16)
def _segment_lengths(radius: float) -> list[float]:
    """Equally likely values of the authors' normal distribution, clipped to 0 ... 2 radius.

    Drawing one of them takes a third of the time of ``rng.gauss``.
    """
    count = 1 << _LENGTH_BITS
    quantiles = [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    return [min(max(radius + radius // 2 * z, 0.0), 2 * radius) for z in quantiles]


def _draw_stroke(mask: MaskPixels, vertices: list[int], brush_width: float) -> None:
    """Draw a line of round ends and joints through ``vertices``, which are x, y, x, y ...

    The authors draw a line and a disc at every vertex; OpenCV does it in one call. A flat list and
    arguments by position halve what Python adds to the drawing.
    """
    points = np.array(vertices, np.int32).reshape(-1, 1, 2)
    cv2.polylines(mask, [points], False, 1, max(1, int(brush_width)))


def _draw_stroke_as_pillow(mask: MaskPixels, vertices: list[int], brush_width: float) -> None:
    """``_draw_stroke`` with the area of Pillow's lines and discs, which the authors draw with.

    OpenCV's lines are an odd number of pixels wide, and its discs a pixel smaller or larger than
    Pillow's. So every second segment of an even width, and every second disc, takes the next size.
    Per stroke the area differs by 0.6 %, on average by less than 0.5 %.
    """
    half = int(brush_width) // 2
    points = np.array(vertices, np.int32).reshape(-1, 1, 1, 2)
    if int(brush_width) % 2:
        cv2.polylines(mask, [points[:, 0]], False, 1, 2 * half)
    else:
        segments = np.concatenate([points[:-1, 0], points[1:, 0]], axis=1)
        cv2.polylines(mask, list(segments[::2]), False, 1, 2 * half)
        cv2.polylines(mask, list(segments[1::2]), False, 1, 2 * half - 2)
    cv2.polylines(mask, list(points[1::2]), True, 1, 2 * half + 2)


def _draw_rectangle(mask: MaskPixels, rng: random.Random) -> None:
    """Fill the authors' rectangle: half the image's sides, less up to an eighth at either end."""
    height, width = mask.shape
    box_height, box_width = height // 2, width // 2
    top, left = _below(height - box_height, rng), _below(width - box_width, rng)
    less_y, less_x = _below(box_height // 8 + 1, rng), _below(box_width // 8 + 1, rng)
    mask[top + less_y : top + box_height - less_y, left + less_x : left + box_width - less_x] = 1


def _scale(height: int, width: int) -> float:
    return math.hypot(height, width) / _REFERENCE_DIAGONAL_PX


def _below(limit: int, rng: random.Random) -> int:
    """A uniform integer in [0, limit); four times as fast as ``rng.randrange``."""
    return int(limit * rng.random())
