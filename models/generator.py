"""The two-stage generator (paper, section 3.3): a coarse fill, then contextual attention."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import contextual_attention
from models.gated_conv import CONVOLUTIONS, Activation, Conv, Convolution, PartialConv
from models.masking import known, paste
from models.options import AttentionPreset, ConvolutionKind, Padding
from models.sampling import shrink
from models.types import Features, Image, Mask, Sketch

SEGMENT = 6  # layers between kept activations where the others are computed again
STRIDE = 8  # ÷4 in the encoders, ÷2 in the attention: both sides must be multiples of it


@dataclass(frozen=True)
class Style:
    """What all layers have in common."""

    convolution: ConvolutionKind = "gated"
    padding: Padding = "same"
    attention: AttentionPreset = "official"
    recompute: bool = False


@dataclass(frozen=True)
class Layer:
    """One row of the layer tables."""

    number: int
    outputs: int  # features, gates not counted
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    upsample: bool = False
    activation: Activation = "elu"

    def build(self, inputs: int, style: Style) -> Convolution:
        return CONVOLUTIONS[style.convolution](
            inputs,
            self.outputs,
            kernel=self.kernel,
            stride=self.stride,
            dilation=self.dilation,
            upsample=self.upsample,
            padding=style.padding,
            activation=self.activation,
        )


class Layers(nn.Module):
    """Convolutions under the names ``conv01``, ``conv02`` …

    ``picture`` is one more, which gives colours: never gated, and without activation.
    """

    def __init__(
        self, inputs: int, layers: Iterable[Layer], style: Style, picture: Layer | None = None
    ) -> None:
        super().__init__()
        self.recompute = style.recompute
        for layer in layers:
            self.add_module(f"conv{layer.number:02d}", layer.build(inputs, style))
            inputs = layer.outputs
        if picture is not None:
            conv = Conv(inputs, picture.outputs, padding=style.padding)
            self.add_module(f"conv{picture.number:02d}", conv)

    def run(self, part: slice, features: Features, known: Mask | None = None) -> Tensor:
        """``features`` through ``part`` of the layers."""
        layers = list(self.children())[part]
        if not (self.recompute and torch.is_grad_enabled()):
            return _run(layers, features, known)[0]
        for first in range(0, len(layers), SEGMENT):
            segment = layers[first : first + SEGMENT]
            features, known = checkpoint(
                _run, segment, features, known, use_reentrant=False, preserve_rng_state=False
            )
        return features


class Chain(Layers):
    """Layers, one after the other."""

    def forward(self, features: Features, known: Mask | None = None) -> Tensor:
        return self.run(slice(None), features, known)


def _run(
    layers: Iterable[nn.Module], features: Tensor, known: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """New features; partial convolutions ask and say which pixels are known, by default all."""
    for layer in layers:
        if isinstance(layer, PartialConv):
            if known is None:
                known = torch.ones_like(features[:, :1])
            features, known = layer(features, known)
        else:
            features = layer(features)
    return features, known


def coarse(inputs: int, width: int, colours: int, style: Style) -> Chain:
    """Stage one."""
    layers = [
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
        Layer(13, 2 * width, upsample=True),
        Layer(14, 2 * width),
        Layer(15, width, upsample=True),
        Layer(16, width // 2),
    ]
    return Chain(inputs, layers, style, picture=Layer(17, colours))


def hallucination(inputs: int, width: int, style: Style) -> Chain:
    """The branch of stage two that invents; it gains width later than the others."""
    layers = [
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
    ]
    return Chain(inputs, layers, style)


def merge(width: int, colours: int, style: Style) -> Chain:
    """Both branches of stage two back to a picture."""
    layers = [
        Layer(11, 4 * width),
        Layer(12, 4 * width),
        Layer(13, 2 * width, upsample=True),
        Layer(14, 2 * width),
        Layer(15, width, upsample=True),
        Layer(16, width // 2),
    ]
    return Chain(8 * width, layers, style, picture=Layer(17, colours))


class AttentionBranch(Layers):
    """The branch of stage two that copies: attention sits between layers 6 and 9."""

    def __init__(self, inputs: int, width: int, style: Style) -> None:
        layers = [
            Layer(1, width, kernel=5),
            Layer(2, width, stride=2),
            Layer(3, 2 * width),
            Layer(4, 4 * width, stride=2),
            Layer(5, 4 * width),
            Layer(6, 4 * width, activation="relu"),
            Layer(9, 4 * width),
            Layer(10, 4 * width),
        ]
        super().__init__(inputs, layers, style)
        self.preset = style.attention

    def forward(self, inputs: Features, mask: Mask, max_bytes: int | None = None) -> Tensor:
        features = self.run(slice(0, 6), inputs)
        features = contextual_attention(
            features, shrink(mask, 4), preset=self.preset, max_bytes=max_bytes
        )
        return self.run(slice(6, 8), features)


class Refine(nn.Module):
    """Stage two: sees the coarse fill pasted into the picture, never the sketch.

    With ``sees_mask`` it is given ones and the mask as well, as stage one is.
    """

    def __init__(self, width: int, colours: int, style: Style, sees_mask: bool) -> None:
        super().__init__()
        self.sees_mask = sees_mask
        inputs = colours + 2 if sees_mask else colours
        self.hallu = hallucination(inputs, width, style)
        self.attn = AttentionBranch(inputs, width, style)
        self.merge = merge(width, colours, style)

    def forward(self, image: Image, mask: Mask, max_bytes: int | None = None) -> Tensor:
        inputs = torch.cat([image, torch.ones_like(mask), mask], dim=1) if self.sees_mask else image
        branches = [self.hallu(inputs), self.attn(inputs, mask, max_bytes)]
        merged: Tensor = self.merge(torch.cat(branches, dim=1))
        return merged


class Generator(nn.Module):
    """The generator of the paper's figure 3: 4,052,478 parameters, guided 4,053,678.

    ``guided`` adds a sketch to the inputs of stage one (section 3.5). ``width`` is the number of
    features after the first layer, 24 in the release: three quarters of the 32 of DeepFill v1
    ("slim by 25 %"). ``image_channels`` is 1 for grey pictures (4,044,842 parameters).
    ``refine_mask`` shows stage two the mask, as DeepFill v1 did (4,057,278); released weights are
    without. ``convolution``: "partial" and "vanilla" have no gates, and with the same width of
    features half the parameters (2,026,566; guided 2,027,166). The refinement knows every pixel of
    what it is given, so there partial convolution renormalises the border alone. ``padding`` and
    ``attention`` as in ``Conv`` and ``contextual_attention``. ``recompute`` keeps the activations
    of every sixth layer alone and computes the others a second time: training in less memory.
    """

    def __init__(
        self,
        guided: bool = False,
        *,
        width: int = 24,
        image_channels: int = 3,
        refine_mask: bool = False,
        convolution: ConvolutionKind = "gated",
        padding: Padding = "same",
        attention: AttentionPreset = "official",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.guided, self.width = guided, width
        self.image_channels, self.refine_mask = image_channels, refine_mask
        self.style = Style(convolution, padding, attention, recompute)
        self.smallest = 72 if padding == "reflect" else STRIDE  # 16 mirrored pixels at a quarter
        inputs = image_channels + (3 if guided else 2)  # ones and the mask beside the picture
        self.coarse = coarse(inputs, width, image_channels, self.style)
        self.refine = Refine(width, image_channels, self.style, refine_mask)

    def forward(
        self,
        incomplete: Image,
        mask: Mask,
        sketch: Sketch | None = None,
        *,
        max_attention_bytes: int | None = None,
    ) -> tuple[Image, Image]:
        """Coarse and refined pictures, whole, in float32 [-1, 1].

        ``incomplete`` is 0 in the hole (``masking.erase``), ``sketch`` is 0 outside it
        (``masking.guide``); both sides are multiples of 8.
        """
        height, width = incomplete.shape[-2:]
        if height % STRIDE or width % STRIDE or min(height, width) < self.smallest:
            raise ValueError(
                f"a picture of {height}×{width}: both sides must be multiples of {STRIDE} and at "
                f"least {self.smallest}"
            )
        if self.guided != (sketch is not None):
            raise ValueError(
                "a guided generator needs a sketch" if self.guided else "this one takes no sketch"
            )
        guides = [] if sketch is None else [sketch]
        inputs = torch.cat([incomplete, *guides, torch.ones_like(mask), mask], dim=1)
        coarse = torch.tanh(self.coarse(inputs, known(mask)).float())
        composite = paste(coarse, into=incomplete, mask=mask)
        refined = torch.tanh(self.refine(composite, mask, max_attention_bytes).float())
        return coarse, refined

    @classmethod
    def guided_from(cls, unguided: "Generator") -> "Generator":
        """A guided generator with the weights of ``unguided``, and zeros for the sketch.

        Until training teaches it otherwise it fills as ``unguided`` does, whatever the sketch.
        """
        if unguided.guided:
            raise ValueError("this generator is guided already: start from its weights as they are")
        channels = unguided.image_channels
        guided = cls(
            True,
            width=unguided.width,
            image_channels=channels,
            refine_mask=unguided.refine_mask,
            **asdict(unguided.style),
        )
        weights = unguided.state_dict()
        image, rest = weights["coarse.conv01.weight"].split([channels, 2], dim=1)
        weights["coarse.conv01.weight"] = torch.cat([image, 0 * rest[:, :1], rest], dim=1)
        guided.load_state_dict(weights)
        return guided.to(image.device)
