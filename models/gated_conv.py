"""Gated convolution (paper, eq. 3), and the two kinds that the paper compares it with.

A new kind is a subclass of ``Convolution`` and a line in ``CONVOLUTIONS``.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.options import ConvolutionKind, Padding
from models.regions import Region, Span, Window, mirrored
from models.types import Features, Mask, at_least_float32
from models.upsampling import Interleave, for_phases, upsampled_conv3

Activation = Literal["elu", "relu"]
NewFeatures = Float[Tensor, "batch new_channels new_height new_width"]
NewMask = Float[Tensor, "batch 1 new_height new_width"]

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"elu": F.elu, "relu": F.relu}


def same_padding(size: int, kernel: int, stride: int = 1, dilation: int = 1) -> tuple[int, int]:
    """Zeros before and after one axis of ``size`` pixels, by TensorFlow's rule "SAME".

    ``ceil(size / stride)`` pixels come out. Of an odd total the larger half comes after: a strided
    convolution of an even size is padded (0, 1) for kernel 3 and (1, 2) for kernel 5. Padding both
    sides alike would sample a grid one pixel off, to which the authors' weights do not fit.
    """
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


class Convolution(nn.Module):
    """Weights and geometry: ``ceil(size / stride)`` pixels come out, after nearest ×2 if asked.

    ``padding``: "same" is the authors' (zeros, see ``same_padding``); "symmetric" puts equally many
    zeros on both sides; "reflect" mirrors equally many pixels on both sides.
    """

    raw_channels = 1  # channels of the convolution itself for each channel that comes out

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
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.dilation = kernel, stride, dilation
        self.upsample, self.padding, self.activation = upsample, padding, activation
        self.in_phases = upsample and kernel == 3 and padding != "reflect"
        raw = self.raw_channels * outputs
        self.weight = nn.Parameter(torch.empty(raw, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(raw))
        nn.init.xavier_uniform_(self.weight)  # for a gated one: over features and gates together

    def convolve(
        self,
        features: Features,
        weight: Tensor,
        bias: Tensor | None,
        halves: int = 1,
        window: Window | None = None,
    ) -> Tensor:
        """The bare convolution with this layer's geometry; ``placed`` puts its pixels in place.

        In between, every pixel may be changed alike, each of ``halves`` equal groups of channels in
        its own way. With ``window``, ``features`` are those that it gives.
        """
        if self.in_phases:
            if window is not None:
                return upsampled_conv3(self._cut(features, window), weight, bias, halves, 0)
            return upsampled_conv3(features, weight, bias, halves)
        if self.upsample:
            features = F.interpolate(features, scale_factor=2.0, mode="nearest")
        if window is not None:
            features, padding = self._cut(features, window), (0, 0)
        else:
            features, padding = self._pad(features)
        return F.conv2d(features, weight, bias, self.stride, padding, self.dilation)

    def placed(self, outputs: Tensor, window: Window | None = None) -> NewFeatures:
        """The result of ``convolve`` with its pixels in place."""
        if not self.in_phases:
            return outputs
        pixels: Tensor = Interleave.apply(outputs)  # type: ignore[no-untyped-call]
        if window is None:
            return pixels
        rows, columns = window.wanted.rows, window.wanted.columns
        top, left = rows.start % 2, columns.start % 2  # phases come in pairs
        return pixels[..., top : top + rows.length, left : left + columns.length]

    def propagate(
        self, features: Tensor, known: Tensor | None, window: Window | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """New features, and where they are known (1); None: everywhere, or nobody needs it."""
        return self(features, window), known

    def count_known(self, known: Mask, window: Window | None = None) -> NewMask:
        """How many pixels of each window are known; ``known`` is 1 there, unlike other masks."""
        ones = known.new_ones(1, 1, self.kernel, self.kernel)
        return self.placed(self.convolve(known, ones, None, window=window), window)

    def needed(self, wanted: Region) -> Region:
        """The pixels of the input that the outputs ``wanted`` are made from.

        Exact for inputs whose sides are multiples of the stride.
        """
        return Region(self._needed(wanted.rows), self._needed(wanted.columns))

    def _needed(self, wanted: Span) -> Span:
        first, last, size = self._reach(wanted)
        seen = range(max(first, 0), min(last + 1, size))
        low, high = seen[0], seen[-1]
        if self.padding == "reflect":
            both_ends = mirrored(first, last, size)
            low, high = int(both_ends.min()), int(both_ends.max())
        if self.upsample and not self.in_phases:
            low, high, size = low // 2, high // 2, size // 2
        return Span(low, high + 1, size)

    def _reach(self, wanted: Span) -> tuple[int, int, int]:
        """First and last pixel that go into ``wanted``, beyond the border as well, and the size.

        They are counted after nearest ×2, unless the layer works in phases.
        """
        if self.in_phases:
            return wanted.start // 2 - 1, (wanted.stop - 1) // 2 + 1, wanted.size // 2
        size = wanted.size * self.stride
        extent = self.dilation * (self.kernel - 1)
        before = extent // 2
        if self.padding == "same":
            before = same_padding(size, self.kernel, self.stride, self.dilation)[0]
        first, last = wanted.start * self.stride, (wanted.stop - 1) * self.stride
        return first - before, last - before + extent, size

    def _cut(self, features: Tensor, window: Window) -> Tensor:
        """What the outputs of ``window`` are made from, with the padding beyond the border."""
        scale = 2 if self.upsample and not self.in_phases else 1
        ends: list[int] = []
        for axis, wanted, given in (
            (2, window.wanted.rows, window.given.rows),
            (3, window.wanted.columns, window.given.columns),
        ):
            first, last, size = self._reach(wanted)
            start = given.start * scale
            if self.padding == "reflect":
                index = mirrored(first, last, size) - start
                features = features.index_select(axis, index.to(features.device))
                continue
            low, high = max(first, 0), min(last + 1, size)
            features = features.narrow(axis, low - start, high - low)
            ends = [low - first, last + 1 - high, *ends]
        return F.pad(features, ends) if any(ends) else features

    def _pad(self, features: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """``features``, padded where the convolution itself cannot, and the padding left to it."""
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
        raw, inputs = self.weight.shape[:2]
        return (
            f"{inputs}, {raw // self.raw_channels}, kernel={self.kernel}, stride={self.stride}, "
            f"dilation={self.dilation}, upsample={self.upsample}, padding={self.padding}"
        )


class Conv(Convolution):
    """A convolution with bias (paper, eq. 1), then an optional activation."""

    def forward(self, features: Features, window: Window | None = None) -> NewFeatures:
        raw = self.convolve(features, self.weight, self.bias, window=window)
        raw = self.placed(raw, window)
        return raw if self.activation is None else ACTIVATIONS[self.activation](raw)


class GatedConv(Convolution):
    """φ(feature) · σ(gate) of one convolution with twice the channels, features first (eq. 3)."""

    raw_channels = 2
    fused = False

    def forward(self, features: Features, window: Window | None = None) -> NewFeatures:
        if self.fused and not torch.compiler.is_compiling():
            raw = self.convolve(features, self.weight, None, 2, window)
            bias = for_phases(self.bias, 2) if self.in_phases else self.bias
            return self.placed(_fused(raw, bias, self.activation), window)
        raw = self.convolve(features, self.weight, self.bias, 2, window)
        return self.placed(gated(raw, self.activation), window)

    def gates(self, features: Features) -> NewFeatures:
        """σ(gate): how much of each feature passes, in [0, 1]."""
        raw = self.convolve(features, self.weight, self.bias, halves=2)
        return self.placed(torch.sigmoid(raw.chunk(2, dim=1)[1]))


class PartialConv(Convolution):
    """A convolution over known pixels alone (Liu et al. 2018; paper, eq. 2).

    Wᵀ(X ⊙ M) · (pixels of the window / known pixels in it) + b, and 0 where none is known. An
    output pixel is known if any pixel of its window was. One mask serves all channels; pixels
    beyond the border are unknown.
    """

    def propagate(
        self, features: Tensor, known: Tensor | None, window: Window | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if known is None:
            known = torch.ones_like(features[:, :1])
        return self(features, known, window)  # type: ignore[no-any-return]

    def forward(
        self, features: Features, known: Mask, window: Window | None = None
    ) -> tuple[NewFeatures, NewMask]:
        """New features, and where they are known."""
        raw = self.convolve(features * known, self.weight, None, window=window)
        raw = self.placed(raw, window)
        counts = at_least_float32(self.count_known(known, window))
        any_known = (counts > 0.5).to(known.dtype)
        scale = any_known * self.kernel**2 / counts.clamp_min(1)
        outputs = raw * scale + self.bias[:, None, None] * any_known
        if self.activation is not None:
            outputs = ACTIVATIONS[self.activation](outputs)
        return outputs, any_known


CONVOLUTIONS: dict[ConvolutionKind, type[Convolution]] = {
    "gated": GatedConv,
    "partial": PartialConv,
    "vanilla": Conv,
}
"""Every kind of convolution that a generator can be made of, by its name in a recipe."""


def gated(raw: Tensor, activation: Activation | None) -> Tensor:
    """φ of the first half of the channels, times σ of the second."""
    feature, gate = raw.chunk(2, dim=1)
    if activation is not None:
        feature = ACTIVATIONS[activation](feature)
    return feature * torch.sigmoid(gate)


def fuse_gates(module: nn.Module) -> None:
    """Let every gated convolution in ``module`` compute its gate in one kernel.

    Worth it for training: half the memory traffic, and the backward pass keeps the convolution's
    output alone. The first use compiles the kernels, which takes some seconds and, on a CPU,
    a C++ compiler. A network that is compiled as a whole does not need it.
    """
    # A kernel for every number of channels, activation and precision: dynamo allows 8 by default.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    for layer in module.modules():
        if isinstance(layer, GatedConv):
            layer.fused = True


def _fused(raw: Tensor, bias: Tensor, activation: Activation | None) -> Tensor:
    """``gated(raw + bias)`` in one kernel for each number of channels, at any size of image.

    Pixels become rows. With the number of channels fixed at compile time, the last, incomplete
    vector of a row costs no more than the others; otherwise it takes most of the time. Adding the
    bias here also makes its gradient faster than the convolution's own.
    """
    batch, channels, height, width = raw.shape
    rows = raw.permute(0, 2, 3, 1).flatten(0, 2)  # no copy if channels-last
    torch._dynamo.mark_dynamic(rows, 0)
    torch._dynamo.mark_static(rows, 1)
    outputs: Tensor = _compiled_gate()(rows, bias, activation)
    return outputs.view(batch, height, width, channels // 2).permute(0, 3, 1, 2)


@cache
def _compiled_gate() -> Callable[[Tensor, Tensor, Activation | None], Tensor]:
    def gate(rows: Tensor, bias: Tensor, activation: Activation | None) -> Tensor:
        return gated(rows + bias.to(rows.dtype), activation)

    def remember_rows_alone(*inputs: Any) -> Any:
        return checkpoint(gate, *inputs, use_reentrant=False, preserve_rng_state=False)

    return torch.compile(remember_rows_alone)
