"""Which pixels of an image matter: spans of one axis, regions of two, and boxes around holes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

CLOSE = 16  # pixels between holes that are never worth a cut: far more around each is computed

Report: TypeAlias = Callable[[int], None]
"""Called with the multiplications done since the last call; may raise to stop the work."""


@dataclass(frozen=True)
class Span:
    """The pixels from ``start`` to ``stop``, exclusive, of an axis of ``size`` pixels."""

    start: int
    stop: int
    size: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def inside(self) -> slice:
        """The span as an index into its axis."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Region:
    """A rectangle of pixels of an image."""

    rows: Span
    columns: Span

    @property
    def area(self) -> int:
        return self.rows.length * self.columns.length

    def of(self, plane: Tensor) -> Tensor:
        """``plane`` (N, C, height, width) within the region; a view."""
        return plane[..., self.rows.inside, self.columns.inside]


@dataclass(frozen=True)
class Window:
    """What a layer computes of its outputs, and which of its inputs it is given for that."""

    given: Region
    wanted: Region


def mirrored(first: int, last: int, size: int) -> Tensor:
    """Indices ``first`` … ``last`` of an axis that is mirrored at its ends, which do not repeat."""
    index = torch.arange(first, last + 1).abs()
    return torch.minimum(index, (2 * size - 2 - index).abs())


def whole(height: int, width: int) -> Region:
    """All pixels of an image."""
    return Region(Span(0, height, height), Span(0, width, width))


def hole_regions(mask: Tensor, cost: Callable[[Region], float]) -> list[Region]:
    """Boxes that together hold every pixel of ``mask`` (N, 1, height, width) that is not 0.

    A box is cut at a wide gap, rather across its longer side, where both parts together cost less
    than it does. Holes of all samples count alike; without any hole the list is empty. ``cost``
    grows with a region.
    """
    return _boxes((mask > 0).any(dim=0)[0].cpu(), 0, 0, (mask.shape[-2], mask.shape[-1]), cost)


def _boxes(
    hole: Tensor, top: int, left: int, size: tuple[int, int], cost: Callable[[Region], float]
) -> list[Region]:
    """The boxes of a part of the image whose first pixel is at ``top`` and ``left``."""
    rows, columns = (hole.any(dim=1 - axis).nonzero().flatten() for axis in (0, 1))
    if not len(rows):
        return []
    y, x = int(rows[0]), int(columns[0])
    hole = hole[y : int(rows[-1]) + 1, x : int(columns[-1]) + 1]
    top, left = top + y, left + x
    box = Region(Span(top, top + hole.shape[0], size[0]), Span(left, left + hole.shape[1], size[1]))
    gaps = [marked.diff() for marked in (rows, columns)]
    widest = [int(gap.max()) if len(gap) else 0 for gap in gaps]
    axis = max((0, 1), key=lambda axis: (widest[axis] > CLOSE) * widest[axis] * hole.shape[axis])
    if widest[axis] <= CLOSE or 2 * _least(box, cost) >= cost(box):
        return [box]
    marked = (rows - y, columns - x)[axis]
    # Of gaps alike the middle one, or a row of dots would be cut dot by dot.
    alike = (gaps[axis] == widest[axis]).nonzero().flatten()
    cut = int(marked[int(alike[len(alike) // 2])]) + 1
    before, after = torch.split(hole, [cut, hole.shape[axis] - cut], dim=axis)
    parts = _boxes(before, top, left, size, cost)
    parts += _boxes(after, top + cut * (axis == 0), left + cut * (axis == 1), size, cost)
    return parts if sum(map(cost, parts)) < cost(box) else [box]


def _least(box: Region, cost: Callable[[Region], float]) -> float:
    """What the cheapest part of ``box`` costs at least: a pixel in one of its corners."""
    ends = [
        [Span(at, at + 1, span.size) for at in {span.start, span.stop - 1}]
        for span in (box.rows, box.columns)
    ]
    return float(min(cost(Region(row, column)) for row in ends[0] for column in ends[1]))
