"""Generator and discriminator, layer by layer; weights carry the names of the fast ones."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.reference.attention import contextual_attention, nearest


def same(features: Tensor, kernel: int, stride: int, dilation: int) -> Tensor:
    """Zeros around ``image`` by TensorFlow's rule "SAME"."""
    sides = []
    for size in (features.shape[3], features.shape[2]):
        total = (math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size
        sides += [max(total, 0) // 2, max(total, 0) - max(total, 0) // 2]
    return F.pad(features, sides)


class Conv(nn.Conv2d):
    def forward(self, features: Tensor) -> Tensor:
        padded = same(features, self.kernel_size[0], self.stride[0], self.dilation[0])
        return super().forward(padded)


class Gated(Conv):
    def __init__(
        self,
        inputs: int,
        raw_outputs: int,
        kernel: int = 3,
        stride: int = 1,
        dilation: int = 1,
        activation: Callable[[Tensor], Tensor] = F.elu,
    ) -> None:
        super().__init__(inputs, raw_outputs, kernel, stride, dilation=dilation)
        nn.init.xavier_uniform_(self.weight)
        self.activation = activation

    def forward(self, features: Tensor) -> Tensor:
        feature, gate = super().forward(features).chunk(2, dim=1)
        return self.activation(feature) * torch.sigmoid(gate)


class Up(Gated):
    def forward(self, features: Tensor) -> Tensor:
        return super().forward(F.interpolate(features, scale_factor=2, mode="nearest"))


class Coarse(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv01 = Gated(inputs, 48, 5)
        self.conv02 = Gated(24, 96, stride=2)
        self.conv03 = Gated(48, 96)
        self.conv04 = Gated(48, 192, stride=2)
        self.conv05 = Gated(96, 192)
        self.conv06 = Gated(96, 192)
        self.conv07 = Gated(96, 192, dilation=2)
        self.conv08 = Gated(96, 192, dilation=4)
        self.conv09 = Gated(96, 192, dilation=8)
        self.conv10 = Gated(96, 192, dilation=16)
        self.conv11 = Gated(96, 192)
        self.conv12 = Gated(96, 192)
        self.conv13 = Up(96, 96)
        self.conv14 = Gated(48, 96)
        self.conv15 = Up(48, 48)
        self.conv16 = Gated(24, 24)
        self.conv17 = Conv(12, 3, 3)

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.children():
            features = layer(features)
        return torch.tanh(features)


class Hallucination(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv01 = Gated(3, 48, 5)
        self.conv02 = Gated(24, 48, stride=2)
        self.conv03 = Gated(24, 96)
        self.conv04 = Gated(48, 96, stride=2)
        self.conv05 = Gated(48, 192)
        self.conv06 = Gated(96, 192)
        self.conv07 = Gated(96, 192, dilation=2)
        self.conv08 = Gated(96, 192, dilation=4)
        self.conv09 = Gated(96, 192, dilation=8)
        self.conv10 = Gated(96, 192, dilation=16)

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.children():
            features = layer(features)
        return features


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv01 = Gated(3, 48, 5)
        self.conv02 = Gated(24, 48, stride=2)
        self.conv03 = Gated(24, 96)
        self.conv04 = Gated(48, 192, stride=2)
        self.conv05 = Gated(96, 192)
        self.conv06 = Gated(96, 192, activation=F.relu)
        self.conv09 = Gated(96, 192)
        self.conv10 = Gated(96, 192)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        for layer in (self.conv01, self.conv02, self.conv03, self.conv04, self.conv05, self.conv06):
            features = layer(features)
        mask = nearest(mask, mask.shape[2] // 4, mask.shape[3] // 4)
        features = contextual_attention(features, mask)
        features = self.conv09(features)
        features = self.conv10(features)
        return features  # noqa: RET504


class Merge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv11 = Gated(192, 192)
        self.conv12 = Gated(96, 192)
        self.conv13 = Up(96, 96)
        self.conv14 = Gated(48, 96)
        self.conv15 = Up(48, 48)
        self.conv16 = Gated(24, 24)
        self.conv17 = Conv(12, 3, 3)

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.children():
            features = layer(features)
        return torch.tanh(features)


class Refine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hallu, self.attn, self.merge = Hallucination(), Attention(), Merge()

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        both = torch.cat([self.hallu(features), self.attn(features, mask)], dim=1)
        merged: Tensor = self.merge(both)
        return merged


class Generator(nn.Module):
    def __init__(self, guided: bool = False) -> None:
        super().__init__()
        self.coarse, self.refine = Coarse(6 if guided else 5), Refine()

    def forward(
        self, incomplete: Tensor, mask: Tensor, sketch: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        inputs = [incomplete, torch.ones_like(mask), mask]
        if sketch is not None:
            inputs.insert(1, sketch)
        coarse = self.coarse(torch.cat(inputs, dim=1))
        refined = self.refine(coarse * mask + incomplete * (1 - mask), mask)
        return coarse, refined


class SpectralConv(Conv):
    """A convolution by its weight over σ, with one power iteration per training call."""

    u: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 5, 2)
        nn.init.xavier_uniform_(self.weight)
        self.register_buffer("u", F.normalize(torch.randn(outputs), dim=0))

    def forward(self, features: Tensor) -> Tensor:
        matrix = self.weight.view(self.weight.shape[0], -1)
        with torch.no_grad():
            v = F.normalize(matrix.T @ self.u, dim=0, eps=1e-12)
            u = F.normalize(matrix @ v, dim=0, eps=1e-12)
            if self.training:
                self.u = u
        weight = self.weight / torch.dot(u, matrix @ v)
        return F.conv2d(same(features, 5, 2, 1), weight, self.bias, stride=2)


class Discriminator(nn.Module):
    def __init__(self, guided: bool = False) -> None:
        super().__init__()
        self.conv1 = SpectralConv(5 if guided else 4, 64)
        self.conv2 = SpectralConv(64, 128)
        self.conv3 = SpectralConv(128, 256)
        self.conv4 = SpectralConv(256, 256)
        self.conv5 = SpectralConv(256, 256)
        self.conv6 = SpectralConv(256, 256)

    def forward(self, features: Tensor, mask: Tensor, sketch: Tensor | None = None) -> Tensor:
        inputs = [features, mask] if sketch is None else [features, mask, sketch]
        features = torch.cat(inputs, dim=1)
        for layer in self.children():
            features = F.leaky_relu(layer(features), 0.2)
        return features.permute(0, 2, 3, 1).flatten(1)
