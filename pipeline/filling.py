"""Fill the hole of an image in memory: for commands, and for programs that use us as a library."""

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from data_prep.images import Pixels
from models import Generator
from models.inference import fill
from models.masking import guide
from pipeline.memory import available_bytes


def inpaint_image(
    generator: Generator,
    image: Pixels,
    mask: np.ndarray,
    sketch: np.ndarray | None = None,
    *,
    max_memory_bytes: int | None = None,
) -> Pixels:
    """``image`` with its hole filled, a new array; known pixels stay as they are.

    ``image`` is RGB of 8 bits, (height, width, 3). ``mask`` and ``sketch`` are (height, width):
    what is not 0 is hole, and stroke; strokes outside the hole do not count. The generator computes
    where it is, after ``generator.cuda()`` on a GPU. ``max_memory_bytes`` bounds the activations,
    by default to most of the memory that is free. Raises ValueError for arrays of other shapes, a
    sketch for an unguided generator, and an image that does not fit in memory.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"an image of {image.dtype} {image.shape}: give uint8 (height, width, 3), RGB"
        )
    for name, plane in (("mask", mask), ("sketch", sketch)):
        if plane is not None and plane.shape != image.shape[:2]:
            raise ValueError(f"a {name} of {plane.shape}: give {image.shape[:2]}, as the image is")
    if sketch is not None and not generator.guided:
        raise ValueError("this generator takes no sketch: leave it out, or use guided weights")
    drawn = np.zeros_like(mask) if sketch is None else sketch
    filled = fill_pixels(generator, image, mask, drawn, max_memory_bytes)
    in_bytes: Pixels = (filled * 255).round().astype(np.uint8)
    result: Pixels = np.where(mask[..., None] != 0, in_bytes, image)
    return result


def fill_pixels(
    generator: Generator,
    image: Pixels,
    mask: np.ndarray,
    sketch: np.ndarray,
    max_memory_bytes: int | None = None,
) -> Float32[np.ndarray, "height width 3"]:
    """The filled image in [0, 1]; outside of the hole it is of no use.

    An unguided generator ignores ``sketch``. Raises ValueError where the output is not finite.
    """
    device = next(generator.parameters()).device

    def plane(marked: np.ndarray) -> Tensor:
        return torch.tensor(marked != 0, dtype=torch.float32, device=device)[None, None]

    pixels = torch.tensor(image, device=device).permute(2, 0, 1)[None] / 127.5 - 1
    hole = plane(mask)
    strokes = guide(plane(sketch), hole) if generator.guided else None
    allowed = max_memory_bytes or available_bytes(device)
    completed = fill(generator, pixels, hole, strokes, max_memory_bytes=allowed)
    if not torch.isfinite(completed).all():
        raise ValueError("the network's output is not finite: use other weights")
    filled = (completed[0].permute(1, 2, 0).float() + 1) / 2
    result: np.ndarray = filled.clamp(0, 1).cpu().numpy()
    return result
