"""SN-PatchGAN (paper, section 3.2): spectrally normalized convolutions that score patches."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, register_parametrization

from models.gated_conv import Conv
from models.options import ModelOptions
from models.types import Image, Mask, Scalar, Scores, Sketch

CHANNELS = (64, 128, 256, 256, 256, 256)


class Discriminator(nn.Module):
    """Is an image real, given its mask? 5,946,816 parameters, guided 5,948,416.

    ``options`` are the other fields of ``ModelOptions``; those that begin with ``discriminator_``
    alone matter here.
    "leaky" applies leaky ReLU after the last convolution too, as the authors' code does; the hinge
    loss usually takes a "linear" one.
    """

    def __init__(self, guided: bool = False, **options: Any) -> None:
        super().__init__()
        self.options = ModelOptions(guided=guided, **options)
        inputs = 5 if guided else 4  # RGB, mask, sketch
        for number, outputs in enumerate(CHANNELS, start=1):
            conv = Conv(inputs, outputs, kernel=5, stride=2)
            norm = SpectralNorm(conv.weight, divide=not self.regularized)
            register_parametrization(conv, "weight", norm)
            self.add_module(f"conv{number}", conv)
            inputs = outputs

    @classmethod
    def from_options(cls, options: ModelOptions) -> "Discriminator":
        """The discriminator that ``options`` describe, freshly initialized."""
        return cls(**vars(options))

    @classmethod
    def guided_from(cls, unguided: "Discriminator") -> "Discriminator":
        """A guided discriminator with the weights of ``unguided``, and zeros for the sketch.

        Until it is trained further it scores as ``unguided`` does, whatever the sketch.
        """
        if unguided.guided:
            raise ValueError("this discriminator is guided: start from its weights as they are")
        guided = cls.from_options(replace(unguided.options, guided=True))
        weights = unguided.state_dict()
        kernel, v = (f"conv1.parametrizations.weight.{name}" for name in ("original", "0._v"))
        # The sketch comes last, so zeros at the end of the flat matrix leave σ as it is.
        weights[v] = F.pad(weights[v], (0, weights[kernel][0, 0].numel()))
        weights[kernel] = F.pad(weights[kernel], (0, 0, 0, 0, 0, 1))
        guided.load_state_dict(weights)
        return guided.to(weights[kernel].device)

    @property
    def guided(self) -> bool:
        """Whether it takes a sketch."""
        return self.options.guided

    @property
    def regularized(self) -> bool:
        """Whether the largest singular values are to be penalized instead of set to 1."""
        return self.options.discriminator_norm == "regularized"

    def spectral_penalty(self) -> Scalar:
        """½ · Σ σ² over the layers (Yoshida and Miyato 2017), by the u and v of the last call."""
        singular = [
            norm.singular_value(norms.original)
            for norms in self.modules()
            if isinstance(norms, ParametrizationList)
            for norm in norms
            if isinstance(norm, SpectralNorm)
        ]
        return torch.stack(singular).square().sum() / 2

    def forward(self, image: Image, mask: Mask, sketch: Sketch | None = None) -> Scores:
        """256 scores for every 64×64 pixels, rounded up; row by row, channels together.

        In training mode every call moves the vectors of the spectral norm by one power iteration:
        give real and completed images in one batch.
        """
        if self.guided != (sketch is not None):
            raise ValueError(
                "a guided discriminator needs a sketch"
                if self.guided
                else "an unguided discriminator takes no sketch"
            )
        guides = [] if sketch is None else [sketch]
        features: Tensor = torch.cat([image, mask, *guides], dim=1)
        for name, conv in self.named_children():
            features = conv(features)
            if name != "conv6" or self.options.discriminator_head == "leaky":
                features = F.leaky_relu(features, 0.2, inplace=True)
        return features.permute(0, 2, 3, 1).flatten(1)


class SpectralNorm(nn.Module):
    """A weight over its largest singular value, estimated by one power iteration per training call.

    The authors' order: first v = l2(Wᵀu), then u = l2(Wv), σ = uᵀWv. torch's ``spectral_norm``
    takes the two half steps in the opposite order, and so gives another σ for the same u. Names and
    shapes in the state dict are those of torch. Gradients pass through σ, but not through u and v.
    Float32 under autocast.
    """

    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, *, divide: bool = True) -> None:
        """Without ``divide`` the weight stays as it is, and σ is estimated all the same."""
        super().__init__()
        self.divide = divide
        outputs, inputs = weight.flatten(1).shape
        u = nn.init.trunc_normal_(torch.empty(outputs))
        self.register_buffer("_u", F.normalize(u, dim=0, eps=1e-12))
        self.register_buffer("_v", torch.zeros(inputs))  # from u, in the first call

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.flatten(1)
            if self.training:
                with torch.no_grad():
                    v = F.normalize(matrix.T @ self._u, dim=0, eps=1e-12)
                    u = F.normalize(matrix @ v, dim=0, eps=1e-12)
                    self._u.copy_(u)
                    self._v.copy_(v)
            else:
                u, v = self._u, self._v
            return weight / torch.dot(u, matrix @ v) if self.divide else weight

    def singular_value(self, weight: Tensor) -> Tensor:
        """σ of ``weight`` by the vectors of the last call; gradients pass through ``weight``."""
        with torch.autocast(weight.device.type, enabled=False):
            return torch.dot(self._u, weight.flatten(1) @ self._v)
