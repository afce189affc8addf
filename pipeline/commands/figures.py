"""Sheets to look at: the gates of a generator at work, and the masks that a recipe draws."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data_prep.image_grid import Cell, image_grid
from data_prep.images import Pixels
from data_prep.masks import MaskPixels, MaskSampler, mask_sheet
from models import Generator
from models.inspection import gate_activations, partial_masks
from models.masking import erase, guide
from models.options import STRIDE
from pipeline.commands.image_files import (
    as_plane,
    existing_file,
    read_image,
    read_mask_of,
    refuse_to_write,
)
from pipeline.networks import load_generator

LONGEST_PX = 512  # of the image that the network sees: a sheet needs no more
CHANNELS = 6  # drawn of every layer, beside the mean of all
CELL_PX = 104  # the shorter side of a cell
GRAY = (160, 160, 160)  # so that white gates stand out
TITLES = ("partial mask", "mean gate", "gates that vary most")
# Stage one and the merged end on the left, the two branches of stage two on the right.
LEFT_PARTS = ("coarse", "refine.merge")


@dataclass(frozen=True)
class LayerGates:
    """One layer's gates for one image."""

    name: str
    """Name of the layer in the state dict."""
    mean: Tensor
    """(h, w), over all channels, in [0, 1]."""
    channels: Tensor
    """(CHANNELS, h, w): those that vary most over the image."""
    known: Tensor
    """(h, w), 1 where partial convolution counts pixels as known after this layer."""


def show_gates(
    weights: str, image: Path, mask: Path, out: Path, *, sketch: Path | None = None
) -> Path:
    """Draw σ(gate) of every gated layer (paper, section 3.1), white where it is 1.

    Of every layer it shows the mask of partial convolution after the same layers (equation 2), the
    mean of all channels, and the channels that vary most over the image. The inputs come last.
    ``weights`` is what ``load_generator`` takes; white is the hole in ``mask``. Images above 512
    pixels are scaled down. Returns ``out``. Raises ValueError for a network without gates.
    """
    refuse_to_write(out, {path.resolve() for path in (image, mask, sketch) if path})
    generator = load_generator(weights)
    if generator.options.convolution != "gated":
        raise ValueError(
            f"{weights} has no gates to show: its convolutions are {generator.options.convolution}"
        )
    if sketch is not None and not generator.guided:
        raise ValueError(f"{weights} takes no sketch: leave out --sketch, or use guided weights")
    pixels = read_image(existing_file(image))
    hole = read_mask_of(image, pixels.shape, existing_file(mask))
    strokes = np.zeros_like(hole)
    if sketch is not None:
        strokes = read_mask_of(image, pixels.shape, existing_file(sketch))
    size = _shown_size(*hole.shape, smallest=generator.min_side_px)
    pixels, hole, strokes = _resized(pixels, hole, strokes, size)
    layers = layer_gates(generator, pixels, hole, strokes)
    inputs = {"image": pixels, "hole": 255 * hole}
    if generator.guided:
        inputs["sketch"] = 255 * (strokes & hole)
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_gate_sheet(layers, inputs)).save(out)
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
    """Write a sheet of drawn masks, white in the hole, each with its share of the image.

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
def layer_gates(
    generator: Generator, pixels: Pixels, hole: MaskPixels, strokes: MaskPixels
) -> list[LayerGates]:
    """Gates of every gated layer while ``generator`` fills ``pixels``, in the layers' order.

    Sides are multiples of 8; ``strokes`` count where they lie in the hole of a guided generator.
    """
    device = torch.device("cpu")
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    mask = as_plane(hole, device)
    sketch = guide(as_plane(strokes, device), mask) if generator.guided else None
    # Stage two gets an image without a hole, so there partial convolution knows every pixel.
    masks = partial_masks(generator, mask)
    shown = []
    for name, (values,) in gate_activations(generator, erase(image, mask), mask, sketch).items():
        varied = values.flatten(1).var(dim=1).topk(min(CHANNELS, len(values))).indices.sort().values
        mean = values.mean(dim=0)
        known = masks[name][0, 0] if name in masks else torch.ones_like(mean)
        shown.append(LayerGates(name, mean, values[varied], known))
    return shown


def _shown_size(height: int, width: int, *, smallest: int) -> tuple[int, int]:
    """Height and width, multiples of 8, of at most ``LONGEST_PX``."""
    scale = min(1.0, LONGEST_PX / max(height, width))
    rows, columns = (round(side * scale / STRIDE) * STRIDE for side in (height, width))
    return max(rows, smallest), max(columns, smallest)


def _resized(
    pixels: Pixels, hole: MaskPixels, strokes: MaskPixels, size: tuple[int, int]
) -> tuple[Pixels, MaskPixels, MaskPixels]:
    shape = size[1], size[0]  # Pillow's order
    image = np.asarray(Image.fromarray(pixels).resize(shape, Image.Resampling.LANCZOS))
    planes = []
    for values in (hole, strokes):  # a pixel belongs to the hole if any of its old ones does
        shrunk = F.adaptive_max_pool2d(torch.from_numpy(values)[None].float(), size)[0]
        planes.append(shrunk.numpy().astype(np.uint8))
    return image, planes[0], planes[1]


def _gate_sheet(layers: Sequence[LayerGates], inputs: Mapping[str, np.ndarray]) -> Pixels:
    """A layer in each half of a row, and the inputs in the last row."""
    height, width = next(iter(inputs.values())).shape[:2]
    scale = CELL_PX / min(height, width)
    size = min(round(width * scale), 3 * CELL_PX), min(round(height * scale), 3 * CELL_PX)
    rows: list[list[Cell | None]] = []
    captions: list[list[str]] = []
    left = [layer for layer in layers if layer.name.startswith(LEFT_PARTS)]
    right = [layer for layer in layers if not layer.name.startswith(LEFT_PARTS)]
    for pair in itertools.zip_longest(left, right):
        row: list[Cell | None] = []
        texts: list[str] = []
        for layer in pair:
            if layer is not None:
                maps = [layer.known, layer.mean, *layer.channels]
                row += [_resized_cell((255 * values).byte().numpy(), size) for values in maps]
                rows_and_columns = " x ".join(map(str, layer.mean.shape))
                texts.append(f"{layer.name}   {rows_and_columns}   mean {layer.mean.mean():.2f}")
                texts += [""] * (len(maps) - 1)
        rows.append(row)
        captions.append(texts)
    rows.append([_resized_cell(pixels, size) for pixels in inputs.values()])
    captions.append(list(inputs))
    titles = [*TITLES, *[""] * (CHANNELS - 1)]
    return image_grid(rows, titles=[*titles, *titles], cell_captions=captions, background=GRAY)


def _resized_cell(pixels: np.ndarray, size: tuple[int, int]) -> Cell:
    """``pixels`` at ``size`` (width, height); small maps keep their squares."""
    larger = pixels.shape[0] < size[1]
    how = Image.Resampling.NEAREST if larger else Image.Resampling.BOX
    return np.asarray(Image.fromarray(pixels).resize(size, how))
