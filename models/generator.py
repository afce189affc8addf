"""The two-stage generator: a coarse fill, then a refinement with contextual attention."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attention import contextual_attention
from models.gated_conv import Activation, Conv, GatedConv
from models.masking import paste
from models.sampling import shrink
from models.types import Features, Image, Mask, Sketch

STRIDE = 8  # ÷4 in the encoders, ÷2 in the attention: both sides must be multiples of it


@dataclass(frozen=True)
class Layer:
    """One row of the layer tables: gated, unless it is the last."""

    number: int
    outputs: int  # feature channels, gates not counted
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    upsample: bool = False
    activation: Activation = "elu"


class Layers(nn.Module):
    """Gated convolutions under the names ``conv01``, ``conv02`` …"""

    def __init__(self, inputs: int, layers: Iterable[Layer]) -> None:
        super().__init__()
        for layer in layers:
            self.add_module(
                f"conv{layer.number:02d}",
                GatedConv(
                    inputs,
                    layer.outputs,
                    kernel=layer.kernel,
                    stride=layer.stride,
                    dilation=layer.dilation,
                    upsample=layer.upsample,
                    activation=layer.activation,
                ),
            )
            inputs = layer.outputs


class Chain(Layers):
    """Layers, one after the other."""

    def forward(self, features: Features) -> Tensor:
        for layer in self.children():
            features = layer(features)
        return features


class Coarse(Chain):
    """Stage one. Its last convolution is not gated."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(
            inputs,
            [
                Layer(1, width, kernel=5),
                Layer(2, 2 * width, stride=2),
                Layer(3, 2 * width),
                Layer(4, 4 * width, stride=2),
                Layer(5, 4 * width),
                Layer(6, 4 * width),
                Layer(7, 4 * width, dilation=2),
                Layer(8, 4 * width, dilation=4),
                Layer(9, 4 * width, dilation=8),
                Layer(10, 4 * width, dilation=16),
                Layer(11, 4 * width),
                Layer(12, 4 * width),
                *_decoder(13, width),
            ],
        )
        self.conv17 = Conv(width // 2, 3)


class Hallucination(Chain):
    """The branch of stage two that invents; it gains width later than the others."""

    def __init__(self, width: int) -> None:
        super().__init__(
            3,
            [
                Layer(1, width, kernel=5),
                Layer(2, width, stride=2),
                Layer(3, 2 * width),
                Layer(4, 2 * width, stride=2),
                Layer(5, 4 * width),
                Layer(6, 4 * width),
                Layer(7, 4 * width, dilation=2),
                Layer(8, 4 * width, dilation=4),
                Layer(9, 4 * width, dilation=8),
                Layer(10, 4 * width, dilation=16),
            ],
        )


class Attention(Layers):
    """The branch of stage two that copies: its attention sits between layers 6 and 9."""

    def __init__(self, width: int) -> None:
        super().__init__(
            3,
            [
                Layer(1, width, kernel=5),
                Layer(2, width, stride=2),
                Layer(3, 2 * width),
                Layer(4, 4 * width, stride=2),
                Layer(5, 4 * width),
                Layer(6, 4 * width, activation="relu"),
                Layer(9, 4 * width),
                Layer(10, 4 * width),
            ],
        )

    def forward(self, image: Image, mask: Mask) -> Tensor:
        features: Tensor = image
        for name, layer in self.named_children():
            if name == "conv09":
                features = contextual_attention(features, shrink(mask, 4))
            features = layer(features)
        return features


class Merge(Chain):
    """Both branches back to a picture. Its last convolution is not gated."""

    def __init__(self, width: int) -> None:
        layers = [Layer(11, 4 * width), Layer(12, 4 * width), *_decoder(13, width)]
        super().__init__(8 * width, layers)
        self.conv17 = Conv(width // 2, 3)


def _decoder(first: int, width: int) -> list[Layer]:
    return [
        Layer(first, 2 * width, upsample=True),
        Layer(first + 1, 2 * width),
        Layer(first + 2, width, upsample=True),
        Layer(first + 3, width // 2),
    ]


class Refine(nn.Module):
    """Stage two: sees the coarse fill pasted into the picture, and neither mask nor sketch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hallu = Hallucination(width)
        self.attn = Attention(width)
        self.merge = Merge(width)

    def forward(self, image: Image, mask: Mask) -> Tensor:
        branches = [self.hallu(image), self.attn(image, mask)]
        merged: Tensor = self.merge(torch.cat(branches, dim=1))
        return merged


class Generator(nn.Module):
    """The generator of the paper's figure 3; 4,052,478 parameters, guided 4,053,678.

    ``width`` is the number of features after the first layer: 24 in the release. ``guided`` adds a
    sketch to the inputs of stage one.
    """

    def __init__(self, guided: bool = False, *, width: int = 24) -> None:
        super().__init__()
        self.guided = guided
        self.coarse = Coarse(6 if guided else 5, width)
        self.refine = Refine(width)

    def forward(
        self, incomplete: Image, mask: Mask, sketch: Sketch | None = None
    ) -> tuple[Image, Image]:
        """Coarse and refined pictures, whole, in float32 [-1, 1].

        ``incomplete`` is 0 in the hole (``masking.erase``), ``sketch`` is 0 outside it
        (``masking.guide``); both sides are multiples of 8.
        """
        height, width = incomplete.shape[-2:]
        if height % STRIDE or width % STRIDE:
            raise ValueError(f"a picture of {height}×{width}: both sides must be multiples of 8")
        if self.guided != (sketch is not None):
            raise ValueError(
                "a guided generator needs a sketch" if self.guided else "this one takes no sketch"
            )
        guides = [] if sketch is None else [sketch]
        inputs = torch.cat([incomplete, *guides, torch.ones_like(mask), mask], dim=1)
        coarse = torch.tanh(self.coarse(inputs).float())
        refined = torch.tanh(self.refine(paste(coarse, into=incomplete, mask=mask), mask).float())
        return coarse, refined
