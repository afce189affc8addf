"""A batch: bytes on the host, floats for the networks on the device."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from models.masking import guide


@dataclass(frozen=True)
class DeviceBatch:
    """What one update sees; the image has channels-last strides."""

    image: Float[Tensor, "batch 3 height width"]
    """RGB in [-1, 1]."""
    mask: Float[Tensor, "batch 1 height width"]
    """1 in the hole, 0 where pixels are known."""
    sketch: Float[Tensor, "batch 1 height width"]
    """1 on a stroke inside the hole, 0 elsewhere."""
    keys: tuple[str, ...]

    def split(self, parts: int) -> "list[DeviceBatch]":
        """Nearly equal parts in order, at most one for each image, without a copy."""
        if parts == 1:
            return [self]
        count = min(parts, len(self.keys))
        bounds = [number * len(self.keys) // count for number in range(count + 1)]
        return [
            DeviceBatch(self.image[a:b], self.mask[a:b], self.sketch[a:b], self.keys[a:b])
            for a, b in pairwise(bounds)
        ]


@dataclass(frozen=True)
class Batch:
    """Samples as the loader makes them, in bytes: four to six times smaller than floats."""

    image: UInt8[Tensor, "batch height width 3"]
    """RGB, 0 to 255."""
    mask: UInt8[Tensor, "batch height width"]
    """1 in the hole, 0 where pixels are known."""
    sketch: UInt8[Tensor, "batch height width"]
    """1 on a stroke, anywhere in the image."""
    keys: tuple[str, ...]

    def to(self, device: torch.device) -> DeviceBatch:
        """Copy the bytes and convert them there; does not block if the memory is pinned."""
        image, mask, sketch = (
            tensor.to(device, non_blocking=True) for tensor in (self.image, self.mask, self.sketch)
        )
        hole = mask[:, None].float()
        return DeviceBatch(
            # Permuted, not copied: the bytes already lie channels-last, and stay so as floats.
            image=image.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0),
            mask=hole,
            sketch=guide(sketch[:, None].float(), hole),
            keys=self.keys,
        )

    def pinned(self) -> "Batch":
        """A copy in page-locked memory, from which a GPU copies in the background."""
        return Batch(
            self.image.pin_memory(), self.mask.pin_memory(), self.sketch.pin_memory(), self.keys
        )
