"""Nearest-neighbor sampling: on the authors' grid, whose corners are aligned, and without."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.types import Features

KEPT = 256  # tables of indices; an image needs four
_sent: dict[tuple[int, int, torch.device], Tensor] = {}


def nearest_indices(size: int, new_size: int) -> Int[Tensor, " new_size"]:
    """Which of ``size`` pixels each of ``new_size`` takes: the first and last stay, half rounds up.

    64 → 32 takes 0 2 … 28 30, then 33 35 … 63: not every second one. In float32, as the authors'
    TensorFlow counts.
    """
    # A tensor, not a number: an exported network can compute it from the size of its image.
    scale = torch.full((), size - 1, dtype=torch.float32) / max(new_size - 1, 1)
    positions = torch.arange(new_size, dtype=torch.float32) * scale
    return (positions + 0.5).floor().long()


def shrink(
    features: Features, factor: int, *, align_corners: bool = True
) -> Float[Tensor, "batch channels new_height new_width"]:
    """``features`` with each side divided by ``factor``, which must divide it.

    ``nearest_indices`` says which pixels stay; without ``align_corners`` every ``factor``-th does.
    """
    height, width = features.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(f"{height}×{width} pixels cannot shrink by {factor}: it must divide both")
    if not align_corners:
        return features[..., ::factor, ::factor]
    rows, columns = (_indices(side, side // factor, features.device) for side in (height, width))
    return features.index_select(2, rows).index_select(3, columns)


def _indices(size: int, new_size: int, device: torch.device) -> Int[Tensor, " new_size"]:
    """``nearest_indices`` on ``device``, computed on the CPU, so that all round alike.

    Sent once: a copy from pageable memory in every pass makes the host wait. A network that is
    compiled after a pass at its size has them as constants; another one computes and sends them.
    """
    if torch.compiler.is_exporting() or not isinstance(size, int):  # a size of an exported network
        return nearest_indices(size, new_size).to(device)
    kept = _sent.get((size, new_size, device))
    if kept is not None:
        return kept
    if torch.compiler.is_compiling():
        return nearest_indices(size, new_size).to(device, non_blocking=True)
    with torch.inference_mode(False):  # training may keep them for its backward pass later
        indices = nearest_indices(size, new_size).to(device)
    if len(_sent) >= KEPT:
        _sent.clear()
    _sent[size, new_size, device] = indices
    return indices
