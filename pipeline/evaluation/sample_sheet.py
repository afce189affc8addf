"""The sheet of samples: images on their way through the generator, one to a row."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from data_prep.image_grid import image_grid
from data_prep.images import Pixels, Strokes
from data_prep.masks import MaskPixels
from pipeline.evaluation.metrics import UnitImage

WHITE, INK = 255, 20
NOT_FINITE = (255, 0, 255)  # magenta
MIN_CELL_PX = 160


@dataclass(frozen=True)
class SamplePanel:
    """One image on its way through the generator, as 8-bit RGB."""

    original: Pixels
    hole: Pixels
    """The original, white in the hole."""
    sketch: Pixels | None
    """The same with the strokes that guided it; None for an unguided generator."""
    coarse: Pixels | None
    """None where there is only one stage."""
    completed: Pixels


def sample_panel(
    original: UnitImage,
    mask: MaskPixels,
    strokes: Strokes | None,
    coarse: UnitImage | None,
    completed: UnitImage,
) -> SamplePanel:
    """The panel of one image; ``strokes`` are shown inside the hole only."""
    hole = _as_bytes(original)
    hole[mask > 0] = WHITE
    sketch = None
    if strokes is not None:
        sketch = hole.copy()
        sketch[(mask > 0) & (strokes > 0)] = INK
    first_stage = None if coarse is None else _as_bytes(coarse)
    return SamplePanel(_as_bytes(original), hole, sketch, first_stage, _as_bytes(completed))


def sample_sheet(panels: Sequence[SamplePanel], captions: Sequence[str]) -> Pixels:
    """The panels one below the other, each with its caption; all of one size.

    Columns are original, hole, sketch and coarse (where there are such), and completed. Small
    images are enlarged by whole numbers, so that the text fits. Raises ValueError without a panel.
    """
    titles = [
        field.name
        for field in fields(SamplePanel)
        if any(getattr(panel, field.name) is not None for panel in panels)
    ]
    rows = [[getattr(panel, title) for title in titles] for panel in panels]
    return image_grid(rows, titles=titles, row_captions=captions, min_cell_px=MIN_CELL_PX)


def _as_bytes(image: UnitImage) -> Pixels:
    """Rounded to 8 bits; pixels that are not finite are magenta."""
    finite = np.isfinite(image).all(axis=2)
    rounded: Pixels = np.rint(np.clip(np.nan_to_num(image), 0, 1) * 255).astype(np.uint8)
    rounded[~finite] = NOT_FINITE
    return rounded
