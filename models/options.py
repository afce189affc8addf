"""What a model is made of: the options that both networks share, in recipes and weights files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

ConvolutionKind: TypeAlias = str  # a name in ``gated_conv.CONVOLUTIONS``
Padding = Literal["same", "symmetric", "reflect"]
AttentionPreset = Literal["official", "renormalized", "nipponjo", "nipponjo_tf", "renormalised"]
DiscriminatorHead = Literal["leaky", "linear"]
DiscriminatorNorm = Literal["spectral", "regularized"]
STRIDE = 8
"""÷4 in the encoders, ÷2 in the attention: sides of images must be multiples of it."""
OLD_SPELLINGS = {"renormalised": "renormalized"}
"""Values that older recipes and weights files have, with the value that they mean today."""


@dataclass(frozen=True)
class AttentionRules:
    """Where codes for contextual attention differ; the defaults are those of the authors."""

    fuse: bool = True
    """Raise the score of a pair whose neighbors match as well."""
    align_corners: bool = True
    """Shrink features and mask with their corners in place; false: take every second pixel."""
    shrink_mask_by: tuple[int, ...] = (4, 2)
    """Steps from the mask's size to that of the keys; where corners stay, 8 at once is not 4, 2."""
    renormalize: bool = False
    """Mask scores with minus infinity instead of 0, and divide overlaps by their true count."""


ATTENTION_PRESETS: Mapping[AttentionPreset, AttentionRules] = {
    "official": AttentionRules(),
    "renormalized": AttentionRules(renormalize=True),
    "nipponjo": AttentionRules(align_corners=False),
    "nipponjo_tf": AttentionRules(fuse=False, shrink_mask_by=(8,)),
}


@dataclass(frozen=True)
class ModelOptions:
    """Everything that decides the shape and the function of the networks.

    ``ValueError`` names each wrong option, its value and what would be right.
    """

    guided: bool = True
    """Give both networks a sketch as one more input channel (paper, section 3.5)."""
    convolution: ConvolutionKind = "gated"
    """``partial`` and ``vanilla`` are what the paper argues against, for comparison."""
    padding: Padding = "same"
    """``same``: TensorFlow's rule, with zeros, which released weights need; ``symmetric``: equally
    many zeros on both sides; ``reflect``: equally many mirrored pixels on both sides."""
    attention: AttentionPreset = "official"
    """``official``: the authors' code. ``renormalized``: masked scores are minus infinity, overlaps
    divided by their true count. ``nipponjo`` and ``nipponjo_tf``: what that port's ``networks`` and
    ``networks_tf`` compute, for weights trained with them."""
    refine_mask: bool = False
    """Stage two also sees the mask, as in DeepFill v1; released weights are without."""
    discriminator_head: DiscriminatorHead = "leaky"
    """``leaky``: the authors' code; ``linear``: as the hinge loss is usually written."""
    discriminator_norm: DiscriminatorNorm = "spectral"
    """``spectral``: weights over their largest singular value, as the authors; ``regularized``:
    weights as they are, and a penalty on those values in training (Yoshida and Miyato 2017)."""
    width: int = 24
    """Features after the generator's first layer; released weights have 24."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "attention", OLD_SPELLINGS.get(self.attention, self.attention))
        choices: dict[str, tuple[str, ...]] = {
            "padding": get_args(Padding),
            "attention": tuple(ATTENTION_PRESETS),
            "discriminator_head": get_args(DiscriminatorHead),
            "discriminator_norm": get_args(DiscriminatorNorm),
        }
        if self.convolution != "gated":
            from models.gated_conv import CONVOLUTIONS  # here: it imports torch, recipes need none

            choices["convolution"] = tuple(CONVOLUTIONS)
        faults = []
        for name, names in choices.items():
            known = [each for each in names if each not in OLD_SPELLINGS]
            if (value := getattr(self, name)) not in known:
                faults.append(f"{name} is {value!r}: give one of {', '.join(known)}")
        if self.width < 2:
            faults.append(f"width is {self.width}: give at least 2, since the last layer halves it")
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def min_side_px(self) -> int:
        """The smallest side of an image that the generator takes."""
        # "reflect" mirrors 16 pixels at a quarter of the size, which needs 17 of them.
        return 72 if self.padding == "reflect" else STRIDE
