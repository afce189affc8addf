"""Masks per second and core: ours against plain Pillow drawings of the same statistics.

Two anchors: ``reference``, the transcription that the network's reference uses (Pillow and numpy),
and ``ports``, as PyTorch ports of the method make a mask: Pillow strokes to a float tensor, a
rectangle of zeros and ones in torch, their logical or, and a cast.

Run: ``python -m benchmarks.masks``. Written to ``results/masks.json``.
"""

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.reference.masks import random_mask, strokes
from benchmarks.timing import interleaved, needs, write_result

SIZE = 256
DRAWS = 1000


def main() -> None:
    needs("cv2")
    import cv2

    from data_prep.masks import MaskSampler, MaskSettings

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    numbers, rng = np.random.default_rng(0), random.Random(0)
    anchors: dict[str, Callable[[], np.ndarray]] = {
        "ports": lambda: _port_mask(numbers).numpy()[0, 0],
        "reference": lambda: random_mask(SIZE, SIZE, numbers)[0, 0],
    }
    samplers = {
        kind: MaskSampler(MaskSettings({kind: 1.0}))
        for kind in ("official", "corrected", "brush", "box")
    }
    ours = {kind: partial(sampler, SIZE, SIZE, rng) for kind, sampler in samplers.items()}
    draws = anchors | ours
    seconds = interleaved({name: partial(repeat, draw) for name, draw in draws.items()}, rounds=7)
    write_result(
        "masks",
        {
            "size_px": SIZE,
            "microseconds": {name: s / DRAWS * 1e6 for name, s in seconds.items()},
            "masks_per_s_and_core": {name: DRAWS / s for name, s in seconds.items()},
            "times_faster_than": {
                anchor: {
                    kind: seconds[anchor] / seconds[kind] for kind in ("official", "corrected")
                }
                for anchor in anchors
            },
            "mean_coverage": {
                name: float(np.mean([draw().mean() for _ in range(DRAWS)]))
                for name, draw in draws.items()
            },
        },
        packages=["numpy", "opencv-python-headless", "pillow", "torch"],
    )


def repeat(draw: Callable[[], object]) -> None:
    for _ in range(DRAWS):
        draw()


def _port_mask(rng: np.random.Generator) -> torch.Tensor:
    rectangle = torch.zeros((1, 1, SIZE, SIZE), dtype=torch.float32)
    top, left = rng.integers(0, SIZE // 2, 2)
    inset_y, inset_x = rng.integers(0, SIZE // 16 + 1, 2)
    bottom, right = top + SIZE // 2 - inset_y, left + SIZE // 2 - inset_x
    rectangle[:, :, top + inset_y : bottom, left + inset_x : right] = 1.0
    drawn = torch.from_numpy(strokes(SIZE, SIZE, rng))[None, None]
    return torch.logical_or(rectangle, drawn).to(torch.float32)


if __name__ == "__main__":
    main()
