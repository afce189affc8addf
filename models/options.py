"""What a model is made of: the options that both networks share, in recipes and weights files."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

ConvolutionKind: TypeAlias = str  # a name in ``gated_conv.CONVOLUTIONS``
Padding = Literal["same", "symmetric", "reflect"]
AttentionPreset = Literal["official", "renormalized", "renormalised"]
DiscriminatorHead = Literal["leaky", "linear"]
DiscriminatorNorm = Literal["spectral", "regularized"]
OLD_SPELLINGS = {"renormalised": "renormalized"}
"""Values that older recipes and weights files have, with the value that they mean today."""


@dataclass(frozen=True)
class ModelOptions:
    """Everything that decides the shape and the function of the networks.

    ``ValueError`` names the option, its value and what would be right.
    """

    guided: bool = True
    """Give both networks a sketch as one more input channel (paper, section 3.5)."""
    convolution: ConvolutionKind = "gated"
    """``partial`` and ``vanilla`` are what the paper argues against, for comparison."""
    padding: Padding = "same"
    """``same``: TensorFlow's rule, with zeros, which released weights need; ``symmetric``: equally
    many zeros on both sides; ``reflect``: equally many mirrored pixels on both sides."""
    attention: AttentionPreset = "official"
    """``renormalized``: masked scores are minus infinity, overlaps divided by their true count."""
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
            "attention": get_args(AttentionPreset),
            "discriminator_head": get_args(DiscriminatorHead),
            "discriminator_norm": get_args(DiscriminatorNorm),
        }
        if self.convolution != "gated":
            from models.gated_conv import CONVOLUTIONS  # here: it imports torch, recipes need none

            choices["convolution"] = tuple(CONVOLUTIONS)
        for name, names in choices.items():
            known = [each for each in names if each not in OLD_SPELLINGS]
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} is {value!r}: give one of {', '.join(known)}")
        if self.width < 2:
            raise ValueError(
                f"width is {self.width}: give at least 2, since the last layer halves it"
            )
