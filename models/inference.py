"""Fill images of any size with a trained generator, within a bounded amount of memory."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from models.attention import STEP, window_bytes
from models.gated_conv import NewFeatures
from models.generator import Generator
from models.masking import erase, paste
from models.options import STRIDE, ModelOptions
from models.regions import Report, hole_regions, whole
from models.types import Features, Image, Mask, Sketch

Progress: TypeAlias = Callable[[int, int], None]
"""Called with what is done, and with all that is to be done; may raise to stop the work."""

# Per pixel, and per pixel and feature of the first layer; measured. At the widest layer the release
# takes 700 in float32 and the greediest of the options 870, beside the attention's matrices 140.
LAYER_BYTES, LAYER_BYTES_PER_FEATURE = 132, 32
KEPT_BYTES, KEPT_BYTES_PER_FEATURE = 80, 16

# Up to so many pixels a GPU computes a whole pass while its host starts the kernels, of which
# regions have more: 256² took 5.6 ms whole and 8.6 in regions, 512² 12.5 and 10.2 (docs/gpu.md).
HOST_BOUND_PIXELS = 384 * 384


@torch.no_grad()
def fill(
    generator: Generator,
    image: Image,
    mask: Mask,
    sketch: Sketch | None = None,
    *,
    wanted: Mask | None = None,
    max_memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> Image:
    """``image`` with its hole filled; known pixels keep their values, bit for bit.

    Any size from one pixel on: sides are mirrored up to a multiple of 8 and cut off afterwards.
    What cannot reach a pixel of the hole is not computed, but for small images on a GPU, which wait
    for the host alone; holes far apart are filled one by one.
    ``wanted`` is 1 in the hole and where known pixels are to be what the network makes of them.
    ``progress`` receives the multiplications done and all; what it raises stops the work.
    With ``max_memory_bytes`` attention works in bands, so that activations stay below it;
    ``ValueError`` before anything is computed if they cannot. None: no bound.
    """
    height, width = image.shape[-2:]
    rows = _mirrored(height, generator.min_side_px).to(image.device)
    columns = _mirrored(width, generator.min_side_px).to(image.device)
    max_attention_bytes = None
    if max_memory_bytes is not None:
        needed = memory_bytes(generator.options, len(image), len(rows), len(columns))
        if needed > max_memory_bytes:
            raise ValueError(
                f"filling {len(image)} × {height}×{width} pixels takes {needed / 2**30:.2f} GiB, "
                f"but {max_memory_bytes / 2**30:.2f} GiB are allowed: fill fewer or smaller images "
                "at a time, or allow more"
            )
        kept = kept_bytes(generator.options) * len(image) * len(rows) * len(columns)
        max_attention_bytes = max_memory_bytes - kept

    def pad(plane: Features) -> NewFeatures:
        return plane.index_select(2, rows).index_select(3, columns)

    padded = pad(mask)
    wanted = mask if wanted is None else wanted
    regions, report = None, None
    if not _waits_for_its_host(padded):
        # With the mirrored pixels of the hole: stage two sees them too, filled by stage one.
        regions = hole_regions(pad(wanted), generator.products)
        if progress is not None:
            report = _counting(progress, generator.products_in(regions))
    _, refined = generator(
        erase(pad(image), padded),
        padded,
        None if sketch is None else pad(sketch),
        max_attention_bytes=max_attention_bytes,
        regions=regions,
        report=report,
    )
    if regions is None and progress is not None:
        all_of_it = generator.products_in([whole(len(rows), len(columns))])
        progress(all_of_it, all_of_it)
    return paste(refined[..., :height, :width], into=image, mask=wanted)


def _waits_for_its_host(mask: Mask) -> bool:
    """Whether the device is done with the whole images before the host has started all of it."""
    return mask.is_cuda and mask.numel() <= HOST_BOUND_PIXELS


def _counting(progress: Progress, products: int) -> Report:
    done = 0

    def report(more: int) -> None:
        nonlocal done
        done += more
        progress(done, products)

    return report


def memory_bytes(options: ModelOptions, batch: int, height: int, width: int) -> int:
    """The least memory that ``fill`` needs for images of ``height`` × ``width`` pixels.

    Sides are rounded up to multiples of 8. Weights and the program itself come on top.
    """
    rows, columns = -(-height // STRIDE), -(-width // STRIDE)
    pixels = batch * rows * columns * STRIDE**2
    band = window_bytes(pixels // batch // (4 * STEP) ** 2, 1)
    widest = (LAYER_BYTES + LAYER_BYTES_PER_FEATURE * options.width) * pixels
    return max(widest, kept_bytes(options) * pixels + band)


def kept_bytes(options: ModelOptions) -> int:
    """What is kept for each pixel while attention works, beside its matrices."""
    return KEPT_BYTES + KEPT_BYTES_PER_FEATURE * options.width


def _mirrored(size: int, smallest: int) -> Int[Tensor, " padded"]:
    """Indices 0 1 … ``size`` − 1, then back and forth, up to a multiple of 8."""
    padded = max(-(-size // STRIDE) * STRIDE, smallest)
    there_and_back = torch.arange(padded) % max(2 * size - 2, 1)
    return torch.minimum(there_and_back, (2 * size - 2 - there_and_back).abs())
