"""Fill pictures of any size with a trained generator, within a bounded amount of memory."""

import os
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from models.attention import attention_bytes
from models.gated_conv import NewFeatures
from models.generator import STRIDE, Generator
from models.masking import erase, paste
from models.types import Features, Image, Mask, Sketch

# Per pixel, measured: at the widest layer the release takes 700 in float32 and the greediest of the
# options 870, beside the attention's matrices 140.
LAYER_BYTES, KEPT_BYTES = 900, 200
SHARE_OF_FREE = 0.8


@torch.no_grad()
def fill(
    generator: Generator,
    image: Image,
    mask: Mask,
    sketch: Sketch | None = None,
    *,
    max_memory_bytes: int | None = None,
) -> Image:
    """``image`` with its hole filled; known pixels are those given, bit for bit.

    Any size from one pixel on: sides are mirrored up to a multiple of 8 and cut off afterwards.
    Attention works in bands so that all stays below ``max_memory_bytes``, by default most of what
    is free on the device; ``ValueError`` before anything is computed if that cannot be.
    """
    height, width = image.shape[-2:]
    rows = _mirrored(height, generator.smallest).to(image.device)
    columns = _mirrored(width, generator.smallest).to(image.device)
    if max_memory_bytes is None:
        max_memory_bytes = int(SHARE_OF_FREE * free_bytes(image.device))
    size = len(image), len(rows), len(columns)
    needed = memory_bytes(*size)
    if needed > max_memory_bytes:
        raise ValueError(
            f"filling {len(image)} × {height}×{width} pixels takes {needed / 2**30:.2f} GiB, but "
            f"{max_memory_bytes / 2**30:.2f} GiB are allowed: fill fewer or smaller ones at a "
            "time, or allow more"
        )

    def pad(picture: Features) -> NewFeatures:
        return picture.index_select(2, rows).index_select(3, columns)

    padded = pad(mask)
    _, refined = generator(
        erase(pad(image), padded),
        padded,
        None if sketch is None else pad(sketch),
        max_attention_bytes=max_memory_bytes - KEPT_BYTES * len(image) * len(rows) * len(columns),
    )
    return paste(refined[..., :height, :width], into=image, mask=mask)


def memory_bytes(batch: int, height: int, width: int) -> int:
    """The least that ``fill`` can do with, beside weights and program; sides rounded up to 8s."""
    rows, columns = -(-height // STRIDE), -(-width // STRIDE)
    pixels = batch * rows * columns * STRIDE**2
    band = batch * attention_bytes(rows, columns, 1)
    return max(LAYER_BYTES * pixels, KEPT_BYTES * pixels + band)


def free_bytes(device: torch.device) -> int:
    """Memory that can be had on ``device`` without pushing anybody out."""
    if device.type == "cuda":
        # What torch has freed and keeps for itself is free to us too.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def _mirrored(size: int, smallest: int) -> Int[Tensor, " padded"]:
    """Indices 0 1 … ``size`` − 1, then back and forth, up to a multiple of 8."""
    padded = max(-(-size // STRIDE) * STRIDE, smallest)
    there_and_back = torch.arange(padded) % max(2 * size - 2, 1)
    return torch.minimum(there_and_back, (2 * size - 2 - there_and_back).abs())
