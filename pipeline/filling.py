"""Fill the holes of images in memory: for commands, and for programs that use us as a library.

A strategy decides what of an image the network sees, and at which scale: ``full`` all of it as it
is, ``resize`` all of it made smaller, ``crop`` the surroundings of each hole made smaller. What the
network sees at a time is a piece. docs/inpainting.md says when which is better.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

import cv2
import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from data_prep.images import Pixels
from data_prep.masks import MaskPixels
from models import Generator
from models.inference import Progress, memory_bytes
from models.inference import fill as fill_tensors
from models.masking import guide
from models.regions import Region, Span, hole_regions, whole
from pipeline.memory import available_bytes

Strategy = Literal["full", "crop", "resize"]
Cancel: TypeAlias = Callable[[], bool]
"""Asked several times a second whether to stop."""

PER_CALL = 100  # units of progress for each call of the network
CROP_MARGIN = 0.5  # of the longer side of a hole: it takes a quarter of its square crop


class FillCancelledError(Exception):
    """Filling was stopped on request; nothing was filled."""


@dataclass(frozen=True)
class FillOptions:
    """How holes are filled. ValueError names the option, its value and what would be right."""

    strategy: Strategy = "full"
    """``full``: the network sees the image as it is. ``crop``: it sees the surroundings of each
    hole, at most ``size_limit_px`` large. ``resize``: it sees the image at that size."""
    crop_margin_px: int | None = None
    """Pixels around a hole that ``crop`` shows at least; None: half of the hole's longer side."""
    size_limit_px: int | None = None
    """Longest side of what the network sees, for ``crop`` and ``resize``; None: the size that it
    was trained at."""
    dilate_px: int = 0
    """Grow the holes by so many pixels first."""
    feather_px: int = 0
    """Blend the fill into so many known pixels around the holes, which then change; 0: none."""
    batch: int = 1
    """Pieces of one size that the network fills at a time, as far as memory allows."""
    max_memory_bytes: int | None = None
    """Limit of the activations; None: most of the memory that is free."""

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            names = ", ".join(get_args(Strategy))
            raise ValueError(f"strategy is {self.strategy!r}: give one of {names}")
        least = {"crop_margin_px": 0, "size_limit_px": 8, "dilate_px": 0, "feather_px": 0}
        for name, smallest in {**least, "batch": 1, "max_memory_bytes": 1}.items():
            if (value := getattr(self, name)) is not None and value < smallest:
                raise ValueError(f"{name} is {value}: give at least {smallest}")


class FillTask(NamedTuple):
    """An image with its hole; where mask and sketch are not 0, there is hole, and stroke."""

    image: Pixels
    mask: np.ndarray  # (height, width)
    sketch: np.ndarray | None = None


@dataclass(frozen=True)
class FillResult:
    """What the network gives for an image, and how much of it each pixel takes."""

    colors: Float32[np.ndarray, "height width 3"]
    """In [0, 1]; of use where ``weight`` is above 0."""
    weight: Float32[np.ndarray, "height width"]
    """1 in the hole, 0 where the known pixel stays, between them where both are blended."""

    def over(self, image: Pixels) -> Pixels:
        """``image`` with its hole filled, a new array; pixels of weight 0 stay as they are."""
        return blended(255 * self.colors, image, self.weight[..., None])


def blended(new: np.ndarray, old: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """``new`` mixed into the integers ``old`` by ``weight``; where that is 0, ``old`` stays."""
    inside = weight.reshape(old.shape[:2]) > 0
    share = weight[inside]
    result: np.ndarray = old.copy()
    result[inside] = np.rint(share * new[inside] + (1 - share) * old[inside])
    return result


def inpaint_image(
    generator: Generator,
    image: Pixels,
    mask: np.ndarray,
    sketch: np.ndarray | None = None,
    *,
    strategy: Strategy = "full",
    crop_margin_px: int | None = None,
    size_limit_px: int | None = None,
    dilate_px: int = 0,
    feather_px: int = 0,
    max_memory_bytes: int | None = None,
) -> Pixels:
    """``image`` with its hole filled, a new array; known pixels stay as they are.

    ``image`` is RGB of 8 bits, (height, width, 3). ``mask`` and ``sketch`` are (height, width):
    what is not 0 is hole, and stroke; strokes outside the hole do not count. The generator computes
    where it is, after ``generator.cuda()`` on a GPU. The other arguments are ``FillOptions``.
    Raises ValueError for arrays of other shapes, a sketch for an unguided generator, and an image
    that does not fit in memory.
    """
    options = FillOptions(
        strategy=strategy,
        crop_margin_px=crop_margin_px,
        size_limit_px=size_limit_px,
        dilate_px=dilate_px,
        feather_px=feather_px,
        max_memory_bytes=max_memory_bytes,
    )
    return fill(generator, image, mask, sketch, options).over(image)


def fill(
    generator: Generator,
    image: Pixels,
    mask: np.ndarray,
    sketch: np.ndarray | None,
    options: FillOptions,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> FillResult:
    """What fills the hole of ``image``; arrays and errors as for ``inpaint_image``.

    ``progress`` is called with what is done and all that is to be done, several times a second.
    Where ``cancel`` answers True, FillCancelledError is raised.
    """
    (filled,) = fill_batch(generator, [FillTask(image, mask, sketch)], options, progress, cancel)
    return filled


def fill_batch(
    generator: Generator,
    tasks: Sequence[FillTask],
    options: FillOptions,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> list[FillResult]:
    """``fill`` for several images, equal to filling each by itself but for rounding.

    Pieces of one size share calls of the network, of ``options.batch`` at most.
    """
    for task in tasks:
        _refuse_wrong_arrays(generator, task)
    holes = [_grown(task.mask, options.dilate_px) for task in tasks]
    weights = [_weight(hole, options.feather_px) for hole in holes]
    limit = options.size_limit_px or generator.trained_px
    pieces = [
        piece
        for number, weight in enumerate(weights)
        for piece in _pieces(number, weight > 0, options, limit)
    ]
    device = next(generator.parameters()).device
    allowed = options.max_memory_bytes or available_bytes(device)
    calls = list(_calls(generator, pieces, options.batch, allowed))
    colors = [np.zeros((*weight.shape, 3), np.float32) for weight in weights]
    for done, call in enumerate(calls):

        def report(part: int, whole: int, done: int = done) -> None:
            if cancel is not None and cancel():
                raise FillCancelledError("filling was stopped")
            if progress is not None:
                share = PER_CALL * min(part, whole) // max(whole, 1)
                progress(PER_CALL * done + share, PER_CALL * len(calls))

        report(0, 1)
        seen = [piece.seen(tasks[piece.number], holes[piece.number], weights) for piece in call]
        for piece, filled in zip(call, _network(generator, seen, allowed, report), strict=True):
            piece.put(filled, colors[piece.number])
        report(1, 1)
    return [FillResult(*each) for each in zip(colors, weights, strict=True)]


def needed_bytes(generator: Generator, height: int, width: int, options: FillOptions) -> int:
    """The least memory that filling an image of ``height`` × ``width`` pixels takes."""
    size = height, width
    if options.strategy != "full":
        limit = options.size_limit_px or generator.trained_px
        size = _size_within(whole(height, width), limit)
    return memory_bytes(generator.options, 1, *size)


class _Seen(NamedTuple):
    """What the network is given of a piece; all of one size."""

    image: Pixels
    hole: MaskPixels
    wanted: MaskPixels
    sketch: MaskPixels


@dataclass(frozen=True)
class _Piece:
    """A part of an image as the network sees it."""

    number: int
    """Which image."""
    box: Region
    """What of the image is seen."""
    wanted: Region
    """What of the image is taken from it."""
    size: tuple[int, int]
    """Height and width as seen."""

    def seen(self, task: FillTask, hole: MaskPixels, weights: Sequence[np.ndarray]) -> _Seen:
        rows, columns = self.box.rows.inside, self.box.columns.inside
        taken = np.zeros_like(hole)
        inside = self.wanted.rows.inside, self.wanted.columns.inside
        taken[inside] = weights[self.number][inside] > 0
        sketch = np.zeros_like(hole) if task.sketch is None else task.sketch
        planes = [marked_at(plane[rows, columns], self.size) for plane in (hole, taken, sketch)]
        return _Seen(_shrunk(task.image[rows, columns], self.size), *planes)

    def put(self, filled: np.ndarray, colors: np.ndarray) -> None:
        """Write ``filled``, in [0, 1], at the size seen, to its place in ``colors``."""
        box, wanted = self.box, self.wanted
        size = box.rows.length, box.columns.length
        if size != self.size:
            filled = cv2.resize(filled, size[::-1], interpolation=cv2.INTER_CUBIC)
        top, left = wanted.rows.start - box.rows.start, wanted.columns.start - box.columns.start
        part = filled[top : top + wanted.rows.length, left : left + wanted.columns.length]
        colors[wanted.rows.inside, wanted.columns.inside] = part.clip(0, 1)


def _pieces(number: int, wanted: np.ndarray, options: FillOptions, limit: int) -> Iterator[_Piece]:
    """The pieces of an image whose pixels ``wanted`` are to be computed."""
    everything = whole(*wanted.shape)
    if options.strategy == "crop":

        def around(part: Region) -> Region:
            return crop_around(part, options.crop_margin_px, limit)

        mask = torch.from_numpy(wanted)[None, None]
        for part in hole_regions(mask, lambda part: around(part).area):
            yield _Piece(number, around(part), part, _size_within(around(part), limit))
        return
    size = wanted.shape if options.strategy == "full" else _size_within(everything, limit)
    yield _Piece(number, everything, everything, (size[0], size[1]))


def crop_around(part: Region, margin: int | None, limit: int) -> Region:
    """A square around ``part`` with ``margin`` on each side, as far as the image has it.

    At least ``limit`` large: what the network takes without being made smaller.
    """
    longer = max(part.rows.length, part.columns.length)
    margin = round(CROP_MARGIN * longer) if margin is None else margin
    side = max(longer + 2 * margin, limit)
    return Region(_around(part.rows, side), _around(part.columns, side))


def _around(span: Span, length: int) -> Span:
    """A span of ``length`` in whose middle ``span`` is, moved inside of the axis."""
    length = min(length, span.size)
    start = span.start + (span.length - length) // 2
    start = min(max(start, 0), span.size - length)
    return Span(start, start + length, span.size)


def _size_within(box: Region, limit: int) -> tuple[int, int]:
    """Height and width of ``box`` made as small as ``limit`` wants it."""
    height, width = box.rows.length, box.columns.length
    scale = min(1.0, limit / max(height, width))
    return max(round(scale * height), 1), max(round(scale * width), 1)


def marked_at(plane: np.ndarray, size: tuple[int, int]) -> MaskPixels:
    """``plane`` at ``size`` (height, width): 1 where it has a pixel above 0, so none is lost."""
    marked = (plane != 0).astype(np.uint8)
    larger = max(size[0], plane.shape[0]), max(size[1], plane.shape[1])
    if plane.shape != larger:
        marked = cv2.resize(marked, larger[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(_shrunk(marked.astype(np.float32), size) > 0, np.uint8)


def _shrunk(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``pixels`` averaged down to ``size``; themselves where they have it."""
    if pixels.shape[:2] == size:
        return pixels
    result: np.ndarray = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA)
    return result


def _calls(
    generator: Generator, pieces: Sequence[_Piece], batch: int, allowed: int
) -> Iterator[list[_Piece]]:
    """Pieces that the network fills together: of one size, and no more than fit in memory."""
    by_size: dict[tuple[int, int], list[_Piece]] = {}
    for piece in pieces:
        by_size.setdefault(piece.size, []).append(piece)
    for size, alike in by_size.items():
        together = batch
        while together > 1 and memory_bytes(generator.options, together, *size) > allowed:
            together -= 1
        for first in range(0, len(alike), together):
            yield alike[first : first + together]


def _network(
    generator: Generator, seen: Sequence[_Seen], allowed: int, progress: Progress
) -> list[np.ndarray]:
    """The filled pieces in [0, 1]. Raises ValueError where the output is not finite."""
    device = next(generator.parameters()).device

    def planes(marked: Sequence[MaskPixels]) -> Tensor:
        return torch.tensor(np.stack(marked), dtype=torch.float32, device=device)[:, None]

    pixels = torch.tensor(np.stack([each.image for each in seen]), device=device)
    hole = planes([each.hole for each in seen])
    sketch = planes([each.sketch for each in seen])
    completed = fill_tensors(
        generator,
        pixels.permute(0, 3, 1, 2) / 127.5 - 1,
        hole,
        guide(sketch, hole) if generator.guided else None,
        wanted=planes([each.wanted for each in seen]),
        max_memory_bytes=allowed,
        progress=progress,
    )
    if not torch.isfinite(completed).all():
        raise ValueError("the network's output is not finite: use other weights")
    filled = (completed.permute(0, 2, 3, 1).float() + 1) / 2
    return list(filled.clamp(0, 1).cpu().numpy())


def _grown(mask: np.ndarray, pixels: int) -> MaskPixels:
    """The hole, grown by ``pixels`` in every direction."""
    if pixels == 0:
        return np.asarray(mask != 0, np.uint8)
    return np.asarray(_distance(mask != 0) <= pixels, np.uint8)


def _weight(hole: MaskPixels, feather: int) -> Float32[np.ndarray, "height width"]:
    """1 in the hole, falling to 0 at ``feather`` + 1 pixels from it."""
    if feather == 0:
        return hole.astype(np.float32)
    result: np.ndarray = (1 - _distance(hole) / (feather + 1)).clip(0, 1)
    return result.astype(np.float32)


def _distance(hole: np.ndarray) -> np.ndarray:
    """Pixels from the nearest one of the hole; infinite without any."""
    if not hole.any():
        return np.full(hole.shape, np.inf, np.float32)
    known = (hole == 0).astype(np.uint8)
    result: np.ndarray = cv2.distanceTransform(known, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return result


def _refuse_wrong_arrays(generator: Generator, task: FillTask) -> None:
    image = task.image
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"an image of {image.dtype} {image.shape}: give uint8 (height, width, 3), RGB"
        )
    for name, plane in (("mask", task.mask), ("sketch", task.sketch)):
        if plane is not None and plane.shape != image.shape[:2]:
            raise ValueError(f"a {name} of {plane.shape}: give {image.shape[:2]}, as the image is")
    if task.sketch is not None and not generator.guided:
        raise ValueError("this generator takes no sketch: leave it out, or use guided weights")
