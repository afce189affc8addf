"""Gated convolution (paper, eq. 3), and under it plain convolution with TensorFlow's padding."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.types import Features

Padding = Literal["same", "symmetric", "reflect"]
Activation = Literal["elu", "relu"]
NewFeatures = Float[Tensor, "batch new_channels new_height new_width"]

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"elu": F.elu, "relu": F.relu}


def same_padding(size: int, kernel: int, stride: int = 1, dilation: int = 1) -> tuple[int, int]:
    """Zeros before and after one axis of ``size`` pixels, by TensorFlow's rule "SAME".

    ``ceil(size / stride)`` pixels come out. An odd total leaves the larger half behind: a strided
    convolution of an even size is padded (0, 1) for kernel 3 and (1, 2) for kernel 5. Padding both
    sides alike would sample a grid one pixel off, and so not run the authors' weights.
    """
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


class Conv(nn.Module):
    """A convolution with bias and ``ceil(size / stride)`` pixels out, after nearest ×2 if asked.

    ``padding``: "same" is the authors' (zeros, see ``same_padding``); "symmetric" puts equally many
    zeros on both sides; "reflect" mirrors equally many pixels on both sides.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        dilation: int = 1,
        upsample: bool = False,
        padding: Padding = "same",
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.dilation = kernel, stride, dilation
        self.upsample, self.padding = upsample, padding
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.weight)  # for a gated one: over features and gates together

    def forward(self, features: Features) -> NewFeatures:
        if self.upsample:
            features = F.interpolate(features, scale_factor=2.0, mode="nearest")
        features, padding = self._pad(features)
        return F.conv2d(features, self.weight, self.bias, self.stride, padding, self.dilation)

    def _pad(self, features: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """``features``, padded where the convolution itself cannot; what is left for it to pad."""
        symmetric = self.dilation * (self.kernel - 1) // 2
        if self.padding == "reflect":
            return F.pad(features, [symmetric] * 4, mode="reflect"), (0, 0)
        if self.padding == "symmetric" or self.stride == 1:
            return features, (symmetric, symmetric)
        top, bottom = same_padding(features.shape[-2], self.kernel, self.stride, self.dilation)
        left, right = same_padding(features.shape[-1], self.kernel, self.stride, self.dilation)
        if top == bottom and left == right:
            return features, (top, left)
        return F.pad(features, [left, right, top, bottom]), (0, 0)

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape[:2]
        return (
            f"{inputs}, {outputs}, kernel={self.kernel}, stride={self.stride}, "
            f"dilation={self.dilation}, upsample={self.upsample}, padding={self.padding}"
        )


class GatedConv(Conv):
    """φ(feature) · σ(gate) of one convolution with twice ``outputs`` channels, features first."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        dilation: int = 1,
        upsample: bool = False,
        padding: Padding = "same",
        activation: Activation = "elu",
    ) -> None:
        super().__init__(
            inputs,
            2 * outputs,
            kernel=kernel,
            stride=stride,
            dilation=dilation,
            upsample=upsample,
            padding=padding,
        )
        self.activation = activation

    def forward(self, features: Features) -> NewFeatures:
        feature, gate = super().forward(features).chunk(2, dim=1)
        return ACTIVATIONS[self.activation](feature) * torch.sigmoid(gate)
