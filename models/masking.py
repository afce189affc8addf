"""All computations with a mask, which is 1 in the hole and 0 where pixels are known."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from models.types import Image, Mask, Sketch


def erase(image: Image, mask: Mask) -> Image:
    """``image`` with its hole filled by 0, mid-gray: the generator's input."""
    return image.masked_fill(mask > 0, 0.0)


def paste(refined: Image, *, into: Image, mask: Mask) -> Image:
    """``refined`` inside the hole, ``into`` elsewhere.

    Selects rather than multiplies: known pixels equal those of ``into`` bit for bit, whatever
    ``refined`` holds there.
    """
    return torch.where(mask > 0, refined.to(into.dtype), into)


def guide(sketch: Sketch, mask: Mask) -> Sketch:
    """The strokes inside the hole: the authors use those alone, in training and afterwards."""
    return sketch * mask


def known(mask: Mask) -> Mask:
    """The opposite polarity, for partial convolution: 1 where pixels are known."""
    return 1 - mask


def valid_keys(mask: Mask) -> Bool[Tensor, "batch height*width"]:
    """Where attention may copy from: no hole in the 3×3 around; known beyond the border."""
    return F.max_pool2d(mask, 3, stride=1, padding=1).flatten(1) == 0
