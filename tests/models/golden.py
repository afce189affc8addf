"""Deterministic weights and inputs for which the authors' own code gave the numbers in these tests.

The numbers come from the release (TensorFlow 1.15, float32), run on these weights and images.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from models import Discriminator


def hashed(count: int, variable: int) -> np.ndarray:
    """``count`` numbers in [-1, 1) that depend on their position and the number of the variable."""
    x = (np.arange(count, dtype=np.uint64) + 1000003 * variable).astype(np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> np.uint32(shift)
        x = (x * np.uint64(factor)).astype(np.uint32)
    x ^= x >> np.uint32(16)
    return 2 * x.astype(np.float64) / 2**32 - 1


def kernel(weight: Tensor, variable: int) -> Tensor:
    """Values for ``weight``, counted in TensorFlow's layout: height, width, inputs, outputs."""
    outputs, inputs, height, width = weight.shape
    amplitude = 4 / math.sqrt(height * width * inputs)
    values = (amplitude * hashed(weight.numel(), variable)).astype(np.float32)
    return torch.from_numpy(values).view(height, width, inputs, outputs).permute(3, 2, 0, 1)


def bias(outputs: int, variable: int) -> Tensor:
    return torch.from_numpy((0.1 * hashed(outputs, variable)).astype(np.float32))


def fill_generator(generator: nn.Module) -> None:
    """Every weight by the formula, in the order of the layer tables."""
    state = generator.state_dict()
    for index, name in enumerate(key for key in state if key.endswith("weight")):
        state[name] = kernel(state[name], 2 * index + 1)
        name = name.replace("weight", "bias")
        state[name] = bias(len(state[name]), 2 * index + 2)
    generator.load_state_dict(state)


def fill_discriminator(discriminator: Discriminator) -> None:
    """Every weight and power-iteration vector by the formula; they follow the generator's."""
    state = discriminator.state_dict()
    for index in range(6):
        weight = f"conv{index + 1}.parametrizations.weight.original"
        u = f"conv{index + 1}.parametrizations.weight.0._u"
        state[weight] = kernel(state[weight], 85 + 3 * index)
        state[f"conv{index + 1}.bias"] = bias(len(state[u]), 86 + 3 * index)
        state[u] = torch.from_numpy(hashed(len(state[u]), 87 + 3 * index).astype(np.float32))
    discriminator.load_state_dict(state)


def images() -> tuple[Tensor, Tensor]:
    """Two images of 64×96 and a mask for each, the same one twice."""
    b, c, h, w = np.ix_(range(2), range(3), range(64), range(96))
    image = 0.9 * np.sin(0.11 * h + 0.07 * w + 2.1 * c + 0.4 * b)
    mask = torch.zeros(2, 1, 64, 96)
    mask[:, :, 20:44, 30:62] = 1
    mask[:, :, 5:9, 10:90] = 1
    return torch.from_numpy(image.astype(np.float32)), mask


def wavy_features(batch: int, height: int, width: int, channels: int) -> Tensor:
    """The input of the attention's numbers."""
    b, c, h, w = np.ix_(range(batch), range(channels), range(height), range(width))
    waves = np.sin(0.37 * h + 0.91 * w + 1.7 * c + 0.5 * b) + 0.25 * np.cos(1.3 * h * w + c)
    return torch.from_numpy(waves.astype(np.float32))
