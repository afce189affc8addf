"""The drawer of image sheets: a grid of equal cells, with titles and captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from data_prep.images import Pixels

Cell = Pixels | UInt8[np.ndarray, "height width"]
"""An RGB or a gray image."""

TEXT_LINE_PX, TEXT_PX = 20, 14
INK = (20, 20, 20)
WHITE = (255, 255, 255)


def image_grid(
    rows: Sequence[Sequence[Cell | None]],
    *,
    titles: Sequence[str] = (),
    row_captions: Sequence[str] = (),
    cell_captions: Sequence[Sequence[str]] = (),
    min_cell_px: int = 1,
    gap_px: int = 6,
    background: tuple[int, int, int] = WHITE,
) -> Pixels:
    """Draw ``rows`` of cells of one size; None leaves a cell empty, and rows may be short.

    ``titles`` stand above the columns. Captions stand below: one line for a whole row, or one for
    each cell. Images whose shorter side has fewer than ``min_cell_px`` pixels are enlarged by a
    whole number. ``gap_px`` lies around every cell. Raises ValueError without an image, or
    where sizes differ.
    """
    sizes = {cell.shape[:2] for row in rows for cell in row if cell is not None}
    if len(sizes) != 1:
        shown = ", ".join(f"{height}×{width}" for height, width in sorted(sizes)) or "no image"
        raise ValueError(f"a sheet needs images of one size, not {shown}")
    [(height, width)] = sizes
    scale = -(-min_cell_px // min(height, width))
    height, width = scale * height, scale * width
    caption_px = TEXT_LINE_PX if row_captions or cell_captions else 0
    top_px = gap_px + (TEXT_LINE_PX if titles else 0)
    line_px, column_px = height + caption_px + gap_px, width + gap_px

    columns = max(len(row) for row in rows)
    size = (columns * column_px + gap_px, top_px + len(rows) * line_px)
    sheet = Image.new("RGB", size, background)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT_PX)
    for column, title in enumerate(titles):
        pen.text((gap_px + column * column_px, gap_px), title, INK, font)
    for line, row in enumerate(rows):
        top = top_px + line * line_px
        for column, cell in enumerate(row):
            if cell is not None:
                image = Image.fromarray(cell).resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(image, (gap_px + column * column_px, top))
        captions = row_captions[line : line + 1] or cell_captions[line] if caption_px else ()
        for column, caption in enumerate(captions):
            pen.text((gap_px + column * column_px, top + height + 2), caption, INK, font)
    return np.asarray(sheet)
