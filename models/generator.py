"""The two-stage generator (paper, section 3.3): a coarse fill, then contextual attention.

The layer tables are those of docs/model.md, section 1.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import attend, attend_within, key_mask, window_products
from models.gated_conv import CONVOLUTIONS, Activation, Conv, Convolution
from models.masking import known, paste
from models.options import ATTENTION_PRESETS, STRIDE, ModelOptions
from models.regions import Region, Report, Window, whole
from models.types import Features, Image, Mask, Sketch, at_least_float32

SEGMENT = 6  # layers between kept activations under activation checkpointing
COLORS = 3
BEFORE, BEHIND = slice(0, 6), slice(6, 8)  # convolutions around attention


@dataclass(frozen=True)
class ConvSpec:
    """One row of the layer tables."""

    number: int
    outputs: int  # features, gates not counted
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    upsample: bool = False
    activation: Activation = "elu"

    def build(self, inputs: int, options: ModelOptions) -> Convolution:
        return CONVOLUTIONS[options.convolution](
            inputs,
            self.outputs,
            kernel=self.kernel,
            stride=self.stride,
            dilation=self.dilation,
            upsample=self.upsample,
            padding=options.padding,
            activation=self.activation,
        )


class ConvStack(nn.Module):
    """Convolutions under the names ``conv01``, ``conv02`` …

    ``to_rgb`` is the number of one more, which gives colors: never gated, and without activation.
    """

    activation_checkpointing = False

    def __init__(
        self,
        inputs: int,
        specs: Iterable[ConvSpec],
        options: ModelOptions,
        to_rgb: int | None = None,
    ) -> None:
        super().__init__()
        for spec in specs:
            self.add_module(f"conv{spec.number:02d}", spec.build(inputs, options))
            inputs = spec.outputs
        if to_rgb is not None:
            self.add_module(f"conv{to_rgb:02d}", Conv(inputs, COLORS, padding=options.padding))

    def windows(self, part: slice, wanted: Region) -> list[Window]:
        """What each convolution of ``part`` is given and computes so that ``wanted`` comes out."""
        windows: list[Window] = []
        for convolution in reversed(list(self.children())[part]):
            assert isinstance(convolution, Convolution)
            windows.insert(0, Window(convolution.needed(wanted), wanted))
            wanted = windows[0].given
        return windows

    def products(self, part: slice, windows: Sequence[Window]) -> int:
        """Multiplications of the convolutions of ``part`` for what ``windows`` want."""
        layers = list(self.children())[part]
        return sum(_products(*each) for each in zip(layers, windows, strict=True))

    def run(
        self,
        part: slice,
        features: Features,
        known: Mask | None = None,
        windows: Sequence[Window] | None = None,
        report: Report | None = None,
    ) -> Tensor:
        """``features`` through ``part`` of the convolutions.

        With ``windows``, they are those that the first one gives; ``report`` goes with them.
        """
        convolutions = list(self.children())[part]
        if windows is not None or not (self.activation_checkpointing and torch.is_grad_enabled()):
            return _run(convolutions, features, known, windows, report)[0]
        for first in range(0, len(convolutions), SEGMENT):
            segment = convolutions[first : first + SEGMENT]
            features, known = checkpoint(
                _run, segment, features, known, use_reentrant=False, preserve_rng_state=False
            )
        return features


class ConvSequence(ConvStack):
    """Convolutions, one after the other."""

    def forward(self, features: Features, known: Mask | None = None) -> Tensor:
        return self.run(slice(None), features, known)

    def within(
        self,
        wanted: Region,
        features: Features,
        known: Mask | None = None,
        report: Report | None = None,
    ) -> Tensor:
        """``wanted`` of the outputs for the whole ``features``, and no more computed than that."""
        windows = self.windows(slice(None), wanted)
        given = windows[0].given
        known = None if known is None else given.of(known)
        return self.run(slice(None), given.of(features), known, windows, report)

    def products_within(self, wanted: Region) -> int:
        """Multiplications that ``within`` takes."""
        return self.products(slice(None), self.windows(slice(None), wanted))


def _run(
    convolutions: Sequence[nn.Module],
    features: Tensor,
    known: Tensor | None,
    windows: Sequence[Window] | None = None,
    report: Report | None = None,
) -> tuple[Tensor, Tensor | None]:
    for number, convolution in enumerate(convolutions):
        assert isinstance(convolution, Convolution)
        window = None if windows is None else windows[number]
        features, known = convolution.propagate(features, known, window)
        if window is not None and report is not None:
            report(_products(convolution, window))
    return features, known


def _products(layer: nn.Module, window: Window) -> int:
    return sum(parameter.numel() for parameter in layer.parameters()) * window.wanted.area


def coarse(inputs: int, options: ModelOptions) -> ConvSequence:
    """Stage one."""
    width = options.width
    specs = [
        ConvSpec(1, width, kernel=5),
        ConvSpec(2, 2 * width, stride=2),
        ConvSpec(3, 2 * width),
        ConvSpec(4, 4 * width, stride=2),
        ConvSpec(5, 4 * width),
        ConvSpec(6, 4 * width),
        ConvSpec(7, 4 * width, dilation=2),
        ConvSpec(8, 4 * width, dilation=4),
        ConvSpec(9, 4 * width, dilation=8),
        ConvSpec(10, 4 * width, dilation=16),
        ConvSpec(11, 4 * width),
        ConvSpec(12, 4 * width),
        ConvSpec(13, 2 * width, upsample=True),
        ConvSpec(14, 2 * width),
        ConvSpec(15, width, upsample=True),
        ConvSpec(16, width // 2),
    ]
    return ConvSequence(inputs, specs, options, to_rgb=17)


def hallucination(inputs: int, options: ModelOptions) -> ConvSequence:
    """The branch of stage two that invents content; it widens later than the other branches."""
    width = options.width
    specs = [
        ConvSpec(1, width, kernel=5),
        ConvSpec(2, width, stride=2),
        ConvSpec(3, 2 * width),
        ConvSpec(4, 2 * width, stride=2),
        ConvSpec(5, 4 * width),
        ConvSpec(6, 4 * width),
        ConvSpec(7, 4 * width, dilation=2),
        ConvSpec(8, 4 * width, dilation=4),
        ConvSpec(9, 4 * width, dilation=8),
        ConvSpec(10, 4 * width, dilation=16),
    ]
    return ConvSequence(inputs, specs, options)


def merge(options: ModelOptions) -> ConvSequence:
    """Both branches of stage two, back to an image."""
    width = options.width
    specs = [
        ConvSpec(11, 4 * width),
        ConvSpec(12, 4 * width),
        ConvSpec(13, 2 * width, upsample=True),
        ConvSpec(14, 2 * width),
        ConvSpec(15, width, upsample=True),
        ConvSpec(16, width // 2),
    ]
    return ConvSequence(8 * width, specs, options, to_rgb=17)


class AttentionBranch(ConvStack):
    """The branch of stage two that copies content: attention sits between layers 6 and 9."""

    def __init__(self, inputs: int, options: ModelOptions) -> None:
        width = options.width
        specs = [
            ConvSpec(1, width, kernel=5),
            ConvSpec(2, width, stride=2),
            ConvSpec(3, 2 * width),
            ConvSpec(4, 4 * width, stride=2),
            ConvSpec(5, 4 * width),
            ConvSpec(6, 4 * width, activation="relu"),
            ConvSpec(9, 4 * width),
            ConvSpec(10, 4 * width),
        ]
        super().__init__(inputs, specs, options)
        self.rules = ATTENTION_PRESETS[options.attention]

    def forward(self, inputs: Features, mask: Mask, max_bytes: int | None = None) -> Tensor:
        features = attend(
            self.run(BEFORE, inputs), key_mask(mask, self.rules), self.rules, max_bytes=max_bytes
        )
        return self.run(BEHIND, features)

    def before(self, inputs: Features, report: Report | None = None) -> Tensor:
        """All features that come out before attention, which copies from anywhere."""
        features = self.run(BEFORE, inputs)
        if report is not None:
            report(self.products_before(*inputs.shape[2:]))
        return features

    def products_before(self, height: int, width: int) -> int:
        """Multiplications that ``before`` takes for an image of ``height`` × ``width`` pixels."""
        return self.products(BEFORE, self.windows(BEFORE, whole(height // 4, width // 4)))

    def within(
        self,
        wanted: Region,
        features: Tensor,
        mask: Mask,
        max_bytes: int | None = None,
        report: Report | None = None,
    ) -> Tensor:
        """``wanted`` of the outputs, from all ``features`` that come out before attention."""
        windows = self.windows(BEHIND, wanted)
        mixed = attend_within(
            windows[0].given,
            features,
            key_mask(mask, self.rules),
            self.rules,
            max_bytes=max_bytes,
            report=report,
        )
        return self.run(BEHIND, mixed, None, windows, report)


class Refine(nn.Module):
    """Stage two: sees the coarse fill pasted into the image, never the sketch.

    With ``options.refine_mask`` it also gets ones and the mask, as stage one does.
    """

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.sees_mask, self.width = options.refine_mask, options.width
        inputs = COLORS + 2 if self.sees_mask else COLORS
        self.hallu = hallucination(inputs, options)
        self.attn = AttentionBranch(inputs, options)
        self.merge = merge(options)

    def forward(self, image: Image, mask: Mask, max_bytes: int | None = None) -> Tensor:
        inputs = self._inputs(image, mask)
        branches = [self.hallu(inputs), self.attn(inputs, mask, max_bytes)]
        merged: Tensor = self.merge(torch.cat(branches, dim=1))
        return merged

    def within(
        self,
        regions: Sequence[Region],
        image: Image,
        mask: Mask,
        max_bytes: int | None = None,
        report: Report | None = None,
    ) -> list[Tensor]:
        """The output in each of ``regions``, and no more computed than that."""
        inputs = self._inputs(image, mask)
        features = self.attn.before(inputs, report)
        outputs = []
        for region in regions:
            windows = self.merge.windows(slice(None), region)
            wanted = windows[0].given
            branches = [
                self.hallu.within(wanted, inputs, None, report),
                self.attn.within(wanted, features, mask, max_bytes, report),
            ]
            features_of_both = torch.cat(branches, dim=1)
            merged = self.merge.run(slice(None), features_of_both, None, windows, report)
            outputs.append(merged)
        return outputs

    def products(self, region: Region) -> int:
        """Multiplications that ``region`` takes beyond what all regions share."""
        windows = self.merge.windows(slice(None), region)
        wanted = windows[0].given
        behind = self.attn.windows(BEHIND, wanted)
        return (
            self.merge.products(slice(None), windows)
            + self.hallu.products_within(wanted)
            + self.attn.products(BEHIND, behind)
            + window_products(behind[0].given, 4 * self.width)
        )

    def _inputs(self, image: Image, mask: Mask) -> Tensor:
        return torch.cat([image, torch.ones_like(mask), mask], dim=1) if self.sees_mask else image


class Generator(nn.Module):
    """The generator of the paper's figure 3: 4,052,478 parameters, guided 4,053,678.

    ``options`` are the other fields of ``ModelOptions``. ``guided`` adds a sketch to the inputs of
    stage one (section 3.5). ``width`` 24 is the release's: three quarters of the 32 of DeepFill v1
    ("slim by 25 %"). ``refine_mask`` takes 4,057,278 parameters. ``convolution``: "partial" and
    "vanilla" have no gates, and half the parameters (2,026,566; guided 2,027,166). Every pixel
    that stage two sees is known, so there partial convolution differs at the border alone.

    ``activation_checkpointing`` keeps the activations of every sixth layer and computes the others
    a second time in the backward pass: less memory, more time.
    """

    def __init__(
        self, guided: bool = False, *, activation_checkpointing: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.options = ModelOptions(guided=guided, **options)
        self.trained_px = 256  # side of the images it was trained on, unless somebody sets another
        self.min_side_px = self.options.min_side_px
        self.coarse = coarse(COLORS + (3 if guided else 2), self.options)  # and ones and the mask
        self.refine = Refine(self.options)
        for module in self.modules():
            if isinstance(module, ConvStack):
                module.activation_checkpointing = activation_checkpointing

    @classmethod
    def from_options(
        cls, options: ModelOptions, *, activation_checkpointing: bool = False
    ) -> "Generator":
        """The generator that ``options`` describe, freshly initialized."""
        return cls(**vars(options), activation_checkpointing=activation_checkpointing)

    @classmethod
    def guided_from(cls, unguided: "Generator") -> "Generator":
        """A guided generator with the weights of ``unguided``, and zeros for the sketch.

        Until it is trained further it fills as ``unguided`` does, whatever the sketch.
        """
        if unguided.guided:
            raise ValueError("this generator is guided already: start from its weights as they are")
        guided = cls.from_options(replace(unguided.options, guided=True))
        weights = unguided.state_dict()
        image, rest = weights["coarse.conv01.weight"].split([COLORS, 2], dim=1)
        weights["coarse.conv01.weight"] = torch.cat([image, 0 * rest[:, :1], rest], dim=1)
        guided.load_state_dict(weights)
        return guided.to(image.device)

    @property
    def guided(self) -> bool:
        """Whether it takes a sketch."""
        return self.options.guided

    def forward(
        self,
        incomplete: Image,
        mask: Mask,
        sketch: Sketch | None = None,
        *,
        max_attention_bytes: int | None = None,
        regions: Sequence[Region] | None = None,
        report: Report | None = None,
    ) -> tuple[Image, Image]:
        """Coarse and refined images, whole, in float32 [-1, 1].

        ``incomplete`` is 0 in the hole (``masking.erase``), ``sketch`` is 0 outside it
        (``masking.guide``); both sides are multiples of 8. ``max_attention_bytes`` is the
        ``max_bytes`` of ``contextual_attention``. With ``regions``, which hold the whole hole, both
        are computed in these alone, without gradients, and are ``incomplete`` elsewhere; the values
        there are those of the whole images, and ``report`` receives the multiplications of one
        image, ``products_in`` in all. ValueError for other sizes, for a missing sketch, and for one
        that an unguided generator cannot use.
        """
        height, width = incomplete.shape[-2:]
        if height % STRIDE or width % STRIDE or min(height, width) < self.min_side_px:
            raise ValueError(
                f"an image of {height}×{width} pixels: both sides must be multiples of {STRIDE} "
                f"and at least {self.min_side_px}"
            )
        if self.guided != (sketch is not None):
            raise ValueError(
                "a guided generator needs a sketch"
                if self.guided
                else "an unguided generator takes no sketch"
            )
        guides = [] if sketch is None else [sketch]
        inputs = torch.cat([incomplete, *guides, torch.ones_like(mask), mask], dim=1)
        if regions is not None:
            return self._within(regions, inputs, incomplete, mask, max_attention_bytes, report)
        coarse = torch.tanh(at_least_float32(self.coarse(inputs, known(mask))))
        composite = paste(coarse, into=incomplete, mask=mask)
        refined = torch.tanh(at_least_float32(self.refine(composite, mask, max_attention_bytes)))
        return coarse, refined

    def products(self, region: Region) -> int:
        """Multiplications that filling ``region`` takes, but for what all regions share."""
        return self.coarse.products_within(region) + self.refine.products(region)

    def products_in(self, regions: Sequence[Region]) -> int:
        """Multiplications that filling ``regions`` of one image takes; 0 without any."""
        if not regions:
            return 0
        size = regions[0].rows.size, regions[0].columns.size
        return self.refine.attn.products_before(*size) + sum(map(self.products, regions))

    @torch.no_grad()
    def _within(
        self,
        regions: Sequence[Region],
        inputs: Tensor,
        incomplete: Image,
        mask: Mask,
        max_attention_bytes: int | None,
        report: Report | None,
    ) -> tuple[Image, Image]:
        coarse, refined = incomplete.clone(), incomplete.clone()
        for region in regions:
            colors = self.coarse.within(region, inputs, known(mask), report)
            region.of(coarse).copy_(torch.tanh(at_least_float32(colors)))
        if not regions:
            return coarse, refined
        composite = paste(coarse, into=incomplete, mask=mask)
        outputs = self.refine.within(regions, composite, mask, max_attention_bytes, report)
        for region, colors in zip(regions, outputs, strict=True):
            region.of(refined).copy_(torch.tanh(at_least_float32(colors)))
        return coarse, refined
