"""Sheets to look at: what the gates of a generator let through, and what masks a recipe draws."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data_prep.images import Pixels
from data_prep.masks import Mask, MaskSampler, mask_sheet
from models import Generator
from models.generator import STRIDE
from models.inspection import gate_activations, partial_masks
from models.masking import erase, guide
from pipeline.commands.inpaint import existing, plane, read_image, read_mask_image, refuse_to_write
from pipeline.networks import load_generator

LONGEST_PX = 512  # of the picture that the network is shown: a figure needs no more
CHANNELS = 6  # drawn of every layer, beside the mean of all
TILE_PX, GAP_PX, CAPTION_PX, LABEL_PX = 104, 6, 26, 90  # a tile's shorter side
# Two columns of about equal height; in each, parts of the network with what they are.
COLUMNS = (
    {"coarse": "coarse: stage one", "refine.merge": "merge: both branches, to the picture"},
    {"refine.hallu": "hallu: branch that invents", "refine.attn": "attn: branch that copies"},
)


@dataclass(frozen=True)
class Gates:
    """One layer's gates for one picture."""

    name: str  # of the layer in the state dict
    mean: Tensor  # (h, w), over all channels, in [0, 1]
    channels: Tensor  # (CHANNELS, h, w): those that vary most over the picture
    known: Tensor  # (h, w): what partial convolution takes for known after this layer


def show_gates(
    weights: str, image: Path, mask: Path, out: Path, *, sketch: Path | None = None
) -> Path:
    """Draw σ(gate) of every gated layer (paper, section 3.1), white where it is 1.

    A row is a layer: first the mask of partial convolution after the same layers (equation 2), then
    the mean of all channels, then the channels that vary most over the picture. ``weights`` is what
    ``load_generator`` takes; white is the hole in ``mask``. Pictures above 512 pixels are shrunk.
    Returns ``out``. ValueError for a network without gates.
    """
    refuse_to_write(out, {path.resolve() for path in (image, mask, sketch) if path})
    generator = load_generator(weights)
    if generator.options.convolution != "gated":
        raise ValueError(
            f"{weights} has no gates to show: its convolutions are {generator.options.convolution}"
        )
    if sketch is not None and not generator.guided:
        raise ValueError(f"{weights} takes no sketch: leave out --sketch, or use guided weights")
    picture = read_image(existing(image))
    hole = read_mask_image(existing(mask), picture.shape, image)
    strokes = np.zeros_like(hole)
    if sketch is not None:
        strokes = read_mask_image(existing(sketch), picture.shape, image)
    size = _shown_size(*hole.shape, smallest=generator.min_side_px)
    picture, hole, strokes = _resized(picture, hole, strokes, size)
    rows = gates(generator, picture, hole, strokes)
    out.parent.mkdir(parents=True, exist_ok=True)
    _draw(rows, picture, hole, strokes if generator.guided else None).save(out)
    return out


def show_masks(
    sampler: MaskSampler,
    out: Path,
    *,
    size_px: int = 256,
    rows: int = 6,
    columns: int = 8,
    seed: int = 0,
) -> Path:
    """Write a sheet of drawn masks, white in the hole, each with its share of the picture.

    Equal arguments give equal sheets. Returns ``out``.
    """
    refuse_to_write(out)
    sheet = mask_sheet(
        sampler, height=size_px, width=size_px, rows=rows, columns=columns, seed=seed
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(out)
    return out


@torch.no_grad()
def gates(generator: Generator, picture: Pixels, hole: Mask, strokes: Mask) -> list[Gates]:
    """Gates of every gated layer while ``generator`` fills ``picture``, in the layers' order.

    Sides are multiples of 8; ``strokes`` count where they lie in the hole of a guided generator.
    """
    device = torch.device("cpu")
    image = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    mask = plane(hole, device)
    sketch = guide(plane(strokes, device), mask) if generator.guided else None
    # Stage two is given a picture without a hole, so there partial convolution knows all.
    masks = partial_masks(generator, mask)
    shown = []
    for name, (values,) in gate_activations(generator, erase(image, mask), mask, sketch).items():
        varied = values.flatten(1).var(dim=1).topk(min(CHANNELS, len(values))).indices.sort().values
        mean = values.mean(dim=0)
        known = masks[name][0, 0] if name in masks else torch.ones_like(mean)
        shown.append(Gates(name, mean, values[varied], known))
    return shown


def _shown_size(height: int, width: int, *, smallest: int) -> tuple[int, int]:
    """Height and width, multiples of 8, of at most ``LONGEST_PX``."""
    scale = min(1.0, LONGEST_PX / max(height, width))
    rows, columns = (round(side * scale / STRIDE) * STRIDE for side in (height, width))
    return max(rows, smallest), max(columns, smallest)


def _resized(
    picture: Pixels, hole: Mask, strokes: Mask, size: tuple[int, int]
) -> tuple[Pixels, Mask, Mask]:
    shape = size[1], size[0]  # Pillow's order
    image = np.asarray(Image.fromarray(picture).resize(shape, Image.Resampling.LANCZOS))
    planes = []
    for values in (hole, strokes):  # a pixel belongs to the hole if any of its old ones does
        shrunk = F.adaptive_max_pool2d(torch.from_numpy(values)[None].float(), size)[0]
        planes.append(shrunk.numpy().astype(np.uint8))
    return image, planes[0], planes[1]


def _draw(rows: list[Gates], picture: Pixels, hole: Mask, strokes: Mask | None) -> Image.Image:
    """The whole sheet: what went in on top, below it the layers in two columns."""
    scale = TILE_PX / min(hole.shape)
    height_px, width_px = (min(round(side * scale), 3 * TILE_PX) for side in hole.shape)
    column_px = LABEL_PX + (2 + CHANNELS) * (width_px + GAP_PX) + 4 * GAP_PX
    top = CAPTION_PX + height_px + 2 * GAP_PX
    parts = {row.name: row.name.rpartition(".")[0] for row in rows}
    heights = [
        CAPTION_PX * 2 * len(column)
        + (height_px + GAP_PX) * sum(parts[row.name] in column for row in rows)
        for column in COLUMNS
    ]
    size = GAP_PX + len(COLUMNS) * column_px, top + max(heights) + GAP_PX
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=15)

    inputs = {"picture": picture, "hole": 255 * hole}
    if strokes is not None:
        inputs["sketch"] = 255 * (strokes & hole)
    for index, (title, pixels) in enumerate(inputs.items()):
        left = GAP_PX + LABEL_PX + index * (width_px + GAP_PX)
        pen.text((left, 4), title, "black", font)
        sheet.paste(_tile(pixels, width_px, height_px), (left, CAPTION_PX))

    for index, column in enumerate(COLUMNS):
        left, y = GAP_PX + index * column_px, top
        for part, title in column.items():
            pen.text((left, y + 4), title, "black", ImageFont.load_default(size=19))
            y += CAPTION_PX
            x = left + LABEL_PX
            for text in ("partial mask", "mean gate", "gates that vary most"):
                pen.text((x, y + 4), text, "black", font)
                x += width_px + GAP_PX
            y += CAPTION_PX
            for row in rows:
                if parts[row.name] == part:
                    _draw_row(sheet, row, (left, y), (width_px, height_px))
                    y += height_px + GAP_PX
    return sheet


def _draw_row(
    sheet: Image.Image, row: Gates, corner: tuple[int, int], tile: tuple[int, int]
) -> None:
    pen, (left, top), (width_px, height_px) = ImageDraw.Draw(sheet), corner, tile
    height, width = row.mean.shape
    label = f"{row.name.rpartition('.')[2]}\n{height} x {width}\nmean {row.mean.mean():.2f}"
    pen.multiline_text((left, top + 4), label, "black", ImageFont.load_default(size=15))
    for index, values in enumerate([row.known, row.mean, *row.channels]):
        x = left + LABEL_PX + index * (width_px + GAP_PX)
        sheet.paste(_tile((255 * values).byte().numpy(), width_px, height_px), (x, top))
        pen.rectangle((x - 1, top - 1, x + width_px, top + height_px), outline="gray")


def _tile(pixels: np.ndarray, width_px: int, height_px: int) -> Image.Image:
    """``pixels`` at the size of a tile; small maps keep their squares."""
    larger = pixels.shape[0] < height_px
    how = Image.Resampling.NEAREST if larger else Image.Resampling.BOX
    return Image.fromarray(pixels).resize((width_px, height_px), how)
