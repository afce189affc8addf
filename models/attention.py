"""Contextual attention: fill the hole with patches of its surroundings (DeepFill v1, section 3).

A query is a pixel of the feature map at half size; a key is one too, but only where no hole is
near. Each query takes a mixture of the full-size 4×4 patches of the keys, by the similarity of the
3×3 surroundings at half size. Every sample of a batch has its own mask.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.masking import valid_keys
from models.sampling import shrink
from models.types import Features, Mask

SOFTMAX_SCALE = 10.0
SMALLEST_NORM = 1e-4

Pairs = Float[Tensor, "batch height width height width"]  # query row, column; key row, column


def contextual_attention(features: Features, mask: Mask, *, fuse: bool = True) -> Features:
    """``features`` rebuilt from patches of their known part; zeros where a mask leaves no key.

    ``mask`` is at the size of ``features``, whose sides are even. Border pixels come out as the
    authors': divided by 4 though fewer patches meet there. ``fuse`` prefers coherent patches.
    """
    small = shrink(features, 2)
    height, width = small.shape[-2:]
    valid = valid_keys(shrink(mask, 2)).float()  # (N, L)
    with torch.autocast(features.device.type, enabled=False):
        scores = similarity(small.float())
        if fuse:
            scores = fused(scores)
        # A masked score becomes 0, not −∞; what it attracts is lost, not given to the others.
        scores = scores.flatten(3).flatten(1, 2) * (SOFTMAX_SCALE * valid)[:, None]  # (N, L, L)
        attention = scores.softmax(dim=2)
    patches = F.unfold(features, 4, padding=1, stride=2) * valid[:, None]  # (N, 16 C, L)
    mixed = torch.bmm(patches.to(features.dtype), attention.transpose(1, 2).to(features.dtype))
    return F.fold(mixed, (2 * height, 2 * width), 4, padding=1, stride=2) / 4


def similarity(features: Features) -> Pairs:
    """⟨P_q, P_k / max(‖P_k‖, 1e-4)⟩ of the 3×3 patches P around every two pixels.

    The inner product of two patches is the sum of nine inner products of pixels, each pair moved by
    the same step: a diagonal 3×3 box filter over the products of single pixels, which needs nine
    times fewer multiplications than unfolded patches.
    """
    height, width = features.shape[-2:]
    pixels = features.flatten(2)  # (N, C, L)
    products = torch.bmm(pixels.transpose(1, 2), pixels)
    products = products.view(-1, height, width, height, width)
    squares = features.square().sum(dim=1, keepdim=True)
    squares = F.avg_pool2d(squares, 3, stride=1, padding=1, divisor_override=1)
    return _box(products) / squares.clamp_min(SMALLEST_NORM**2).sqrt()[:, None]


def fused(scores: Pairs) -> Pairs:
    """Scores raised where the neighbours of the query match the neighbours of the key.

    Query and key take the same step: to the next pixel of a row, rows joined end to end; then to
    the next of a column, columns joined likewise.
    """
    height, width = scores.shape[1:3]
    along_rows = _diagonal(scores.flatten(3).flatten(1, 2))
    columns = along_rows.view(-1, height, width, height, width).permute(0, 2, 1, 4, 3)
    along_columns = _diagonal(columns.flatten(3).flatten(1, 2))
    return along_columns.view(-1, width, height, width, height).permute(0, 2, 1, 4, 3)


def _box(pairs: Tensor) -> Tensor:
    """Sum over the nine steps that query and key can take together within the picture."""
    across = _diagonal(pairs.permute(0, 1, 3, 2, 4))  # (N, row, key row, column, key column)
    across = across.permute(0, 3, 4, 1, 2)  # (N, column, key column, row, key row)
    return _diagonal(across).permute(0, 3, 1, 4, 2)


class _Diagonal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        total = matrix.clone()
        total[..., 1:, 1:] += matrix[..., :-1, :-1]
        total[..., :-1, :-1] += matrix[..., 1:, 1:]
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _diagonal(gradient)  # the sum is its own transpose


def _diagonal(matrix: Tensor) -> Tensor:
    """Each entry plus its two neighbours on the diagonal, in the last two dimensions."""
    total: Tensor = _Diagonal.apply(matrix)  # type: ignore[no-untyped-call]
    return total
