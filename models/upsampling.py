"""Convolution after nearest ×2 in phases: the same numbers with 4 products for 9."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def upsampled_conv3(
    features: Tensor, weight: Tensor, bias: Tensor | None, halves: int, zeros: int = 1
) -> Float[Tensor, "batch phases next_height next_width"]:
    """A zero-padded 3×3 convolution of ``features`` after nearest ×2, in phases.

    An output pixel sees only 2×2 different inputs, so with the weights added up for each of its
    four positions 4 products suffice instead of 9. The four positions come out as channels, in each
    of the ``halves`` separately; ``Interleave`` makes them neighbors. ``zeros`` pixels are padded
    on each side.
    """
    spread = F.pad(weight, [1, 1, 1, 1])
    spread = spread[:, :, 1:] + spread[:, :, :-1]
    spread = spread[:, :, :, 1:] + spread[:, :, :, :-1]  # (outputs, inputs, 4, 4)
    # (halves, channels, inputs, input row, position, input column, position)
    spread = spread.reshape(halves, -1, weight.shape[1], 2, 2, 2, 2)
    spread = spread.permute(0, 4, 6, 1, 2, 3, 5).flatten(0, 3)
    bias = bias if bias is None else for_phases(bias, halves)
    return F.conv2d(features, spread, bias, padding=zeros)


def for_phases(bias: Tensor, halves: int) -> Tensor:
    """``bias`` repeated for the four phases of every half."""
    return bias.view(halves, 1, -1).expand(-1, 4, -1).flatten()


class Interleave(torch.autograd.Function):
    """Four phases, as channels of windows that overlap, to an image of twice the size."""

    @staticmethod
    def forward(ctx: Any, phases: Tensor) -> Tensor:
        batch, channels, height, width = phases.shape
        image = phases.new_empty(batch, 2 * (height - 1), 2 * (width - 1), channels // 4)
        image = image.permute(0, 3, 1, 2)  # channels-last
        for part, pixels in zip(_parts(phases), _every_second(image), strict=True):
            pixels.copy_(part)
        return image

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        batch, channels, height, width = gradient.shape
        phases = gradient.new_zeros(batch, height // 2 + 1, width // 2 + 1, 4 * channels)
        phases = phases.permute(0, 3, 1, 2)
        for part, pixels in zip(_parts(phases), _every_second(gradient), strict=True):
            part.copy_(pixels)
        return phases


def _parts(phases: Tensor) -> list[Tensor]:
    """Top left, top right, bottom left and bottom right pixel of every four."""
    height, width = phases.shape[2] - 1, phases.shape[3] - 1
    parts = phases.chunk(4, dim=1)
    return [parts[2 * y + x][:, :, y:, x:][:, :, :height, :width] for y in (0, 1) for x in (0, 1)]


def _every_second(image: Tensor) -> list[Tensor]:
    return [image[:, :, y::2, x::2] for y in (0, 1) for x in (0, 1)]
