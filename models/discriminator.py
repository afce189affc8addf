"""SN-PatchGAN (paper, section 3.2): spectrally normalised convolutions that score patches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from models.gated_conv import Conv
from models.options import DiscriminatorHead
from models.types import Image, Mask, Scores, Sketch

CHANNELS = (64, 128, 256, 256, 256, 256)


class Discriminator(nn.Module):
    """Is a picture real, given its mask? 5,946,816 parameters, guided 5,948,416.

    ``image_channels`` is 1 for grey pictures (5,943,616 parameters). ``head``: the authors' code
    follows the last convolution with leaky ReLU like all others; the hinge loss is usually put on a
    "linear" one.
    """

    def __init__(
        self,
        guided: bool = False,
        *,
        image_channels: int = 3,
        head: DiscriminatorHead = "leaky",
    ) -> None:
        super().__init__()
        self.guided, self.head = guided, head
        inputs = image_channels + (2 if guided else 1)
        for number, outputs in enumerate(CHANNELS, start=1):
            conv = Conv(inputs, outputs, kernel=5, stride=2)
            register_parametrization(conv, "weight", SpectralNorm(conv.weight))
            self.add_module(f"conv{number}", conv)
            inputs = outputs

    def forward(self, image: Image, mask: Mask, sketch: Sketch | None = None) -> Scores:
        """256 scores for every 64×64 pixels, rounded up; row by row, channels together.

        In training mode every call moves the vectors of the spectral norm by one power iteration:
        give real and completed pictures in one batch.
        """
        if self.guided != (sketch is not None):
            raise ValueError(
                "a guided discriminator needs a sketch"
                if self.guided
                else "this one takes no sketch"
            )
        guides = [] if sketch is None else [sketch]
        features: Tensor = torch.cat([image, mask, *guides], dim=1)
        for name, conv in self.named_children():
            features = conv(features)
            if name != "conv6" or self.head == "leaky":
                features = F.leaky_relu(features, 0.2, inplace=True)
        return features.permute(0, 2, 3, 1).flatten(1)


class SpectralNorm(nn.Module):
    """A weight over its largest singular value, estimated by one power iteration per training call.

    As the authors': first v = l2(Wᵀu), then u = l2(Wv), σ = uᵀWv. torch's ``spectral_norm`` takes
    the two half steps the other way round, and so gives another σ for the same u; names and shapes
    in the state dict are its. Gradients pass σ but neither u nor v. Float32 under autocast.
    """

    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
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
            return weight / torch.dot(u, matrix @ v)
