"""The sheet of samples: images on their way through the generator, one to a row."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_prep.images import Pixels, Strokes
from data_prep.masks import Mask
from pipeline.evaluation.metrics import UnitImage

_WHITE, _INK = 255, 20
_NOT_FINITE = (255, 0, 255)
_GAP_PX, _CAPTION_PX, _TEXT_PX, _MIN_CELL_PX = 6, 22, 14, 160


@dataclass(frozen=True)
class SamplePanel:
    """One image on its way through the generator, as 8-bit RGB."""

    original: Pixels
    hole: Pixels
    """The original, white in the hole."""
    sketch: Pixels | None
    """The same with the strokes that guided it; None for an unguided generator."""
    coarse: Pixels
    completed: Pixels


def sample_panel(
    original: UnitImage,
    mask: Mask,
    strokes: Strokes | None,
    coarse: UnitImage,
    completed: UnitImage,
) -> SamplePanel:
    """The panel of one image; ``strokes`` are shown inside the hole only."""
    hole = _as_bytes(original)
    hole[mask > 0] = _WHITE
    sketch = None
    if strokes is not None:
        sketch = hole.copy()
        sketch[(mask > 0) & (strokes > 0)] = _INK
    return SamplePanel(_as_bytes(original), hole, sketch, _as_bytes(coarse), _as_bytes(completed))


def sample_sheet(panels: Sequence[SamplePanel], captions: Sequence[str]) -> Pixels:
    """The panels one below the other, each with its caption; all of one size.

    Columns are original, hole, sketch (where there are sketches), coarse and completed. Small
    images are enlarged by whole numbers, so that the text fits.
    """
    if not panels:
        raise ValueError("a sheet needs at least one sample: keep some")
    columns = {
        "original": [panel.original for panel in panels],
        "hole": [panel.hole for panel in panels],
        "sketch": [panel.sketch for panel in panels if panel.sketch is not None],
        "coarse": [panel.coarse for panel in panels],
        "completed": [panel.completed for panel in panels],
    }
    columns = {name: cells for name, cells in columns.items() if cells}
    height, width = panels[0].original.shape[:2]
    scale = -(-_MIN_CELL_PX // min(height, width))
    height, width = scale * height, scale * width
    line_px = height + _CAPTION_PX
    sheet = Image.new(
        "RGB",
        (
            len(columns) * (width + _GAP_PX) + _GAP_PX,
            _CAPTION_PX + len(captions) * line_px,
        ),
        (_WHITE, _WHITE, _WHITE),
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_TEXT_PX)
    ink = (_INK, _INK, _INK)
    for column, (title, cells) in enumerate(columns.items()):
        left = _GAP_PX + column * (width + _GAP_PX)
        draw.text((left, 2), title, ink, font)
        for line, cell in enumerate(cells):
            image = Image.fromarray(cell).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (left, _CAPTION_PX + line * line_px))
    for line, caption in enumerate(captions):
        draw.text((_GAP_PX, _CAPTION_PX + line * line_px + height + 2), caption, ink, font)
    return np.asarray(sheet)


def _as_bytes(image: UnitImage) -> Pixels:
    """Rounded to 8 bits; pixels that are not finite are magenta."""
    finite = np.isfinite(image).all(axis=2)
    rounded: Pixels = np.rint(np.clip(np.nan_to_num(image), 0, 1) * 255).astype(np.uint8)
    rounded[~finite] = _NOT_FINITE
    return rounded
