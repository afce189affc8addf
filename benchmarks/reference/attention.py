"""Contextual attention in ten steps, one sample at a time, with convolutions as in DeepFill v1."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def contextual_attention(features: Tensor, mask: Tensor, renormalized: bool = False) -> Tensor:
    """``features`` (N, C, h, w) rebuilt from its known patches; ``mask`` (N, 1, h, w)."""
    samples = [_one(features[n, None], mask[n, None], renormalized) for n in range(len(features))]
    return torch.cat(samples)


def _one(features: Tensor, mask: Tensor, renormalized: bool) -> Tensor:
    _, channels, height, width = features.shape
    raw = F.unfold(features, 4, padding=1, stride=2)  # (1, 16 C, L)
    raw = raw.view(channels, 4, 4, -1).permute(3, 0, 1, 2)  # (L, C, 4, 4)

    small, small_mask = (
        nearest(features, height // 2, width // 2),
        nearest(mask, height // 2, width // 2),
    )
    height, width = small.shape[-2:]
    keys = height * width
    patches = F.unfold(small, 3, padding=1).view(channels, 3, 3, keys).permute(3, 0, 1, 2)
    norms = patches.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
    scores = F.conv2d(small, patches / norms.clamp_min(1e-4), padding=1)  # (1, key, row, column)

    diagonal = torch.eye(3).view(1, 1, 3, 3).to(scores)
    pairs = scores.view(keys, keys).T.reshape(1, 1, keys, keys)  # (query, key)
    pairs = F.conv2d(pairs, diagonal, padding=1).view(height, width, height, width)
    pairs = pairs.permute(1, 0, 3, 2).reshape(1, 1, keys, keys)  # both by columns
    pairs = F.conv2d(pairs, diagonal, padding=1).view(width, height, width, height)
    scores = pairs.permute(1, 0, 3, 2).reshape(height, width, keys).permute(2, 0, 1)[None]

    holes = F.unfold(small_mask, 3, padding=1).mean(dim=1)  # (1, L)
    valid = (holes == 0).to(scores).view(1, keys, 1, 1)
    if renormalized:
        scores = scores.masked_fill(valid == 0, -torch.inf)
        attention = torch.softmax(scores * 10, dim=1).nan_to_num(0)
        ones = torch.ones(1, 1, 4, 4).to(scores)
        overlaps = F.conv_transpose2d(ones.new_ones(1, 1, height, width), ones, stride=2, padding=1)
        return F.conv_transpose2d(attention, raw, stride=2, padding=1) / overlaps
    attention = torch.softmax(scores * valid * 10, dim=1) * valid
    return F.conv_transpose2d(attention, raw, stride=2, padding=1) / 4


def nearest(features: Tensor, height: int, width: int) -> Tensor:
    """Nearest neighbors with aligned corners, half rounding up."""

    def indices(size: int, new_size: int) -> list[int]:
        return [math.floor(i * (size - 1) / max(new_size - 1, 1) + 0.5) for i in range(new_size)]

    rows, columns = indices(features.shape[2], height), indices(features.shape[3], width)
    return features[:, :, rows][:, :, :, columns]
