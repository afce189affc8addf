"""SSIM of one image: ours against scikit-image and torchmetrics, and how far the values differ.

Run: ``python -m benchmarks.metrics``. Written to ``results/metrics.json``.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.timing import interleaved, needs, write_result
from pipeline.evaluation.metrics import ssim

SIZE, REPEATS = 256, 20


def main() -> None:
    needs("cv2", "skimage", "torchmetrics")
    import cv2
    from skimage import data
    from skimage.metrics import structural_similarity
    from torchmetrics.functional.image import structural_similarity_index_measure

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    original = (data.astronaut()[:SIZE, :SIZE] / 255).astype(np.float32)
    noise = 0.05 * np.random.default_rng(0).standard_normal(original.shape)
    completed = np.clip(original + noise, 0, 1).astype(np.float32)
    tensors = [torch.from_numpy(p).permute(2, 0, 1)[None] for p in (completed, original)]

    def skimage_ssim() -> float:
        similarity = structural_similarity(
            completed,
            original,
            data_range=1.0,
            channel_axis=-1,
            gaussian_weights=True,
            use_sample_covariance=False,
        )
        return float(similarity)

    def torchmetrics_ssim() -> float:
        _, whole = structural_similarity_index_measure(
            *tensors, data_range=1.0, return_full_image=True
        )
        return float(whole[..., 5:-5, 5:-5].mean())

    variants = {
        "ours": lambda: ssim(completed, original),
        "scikit-image": skimage_ssim,
        "torchmetrics": torchmetrics_ssim,
    }
    seconds = interleaved({name: partial(repeat, run) for name, run in variants.items()})
    others = ("scikit-image", "torchmetrics")
    write_result(
        "metrics",
        {
            "size_px": SIZE,
            "milliseconds": {name: s / REPEATS * 1e3 for name, s in seconds.items()},
            "times_faster_than": {name: seconds[name] / seconds["ours"] for name in others},
            "difference": {
                name: abs(float(variants[name]()) - variants["ours"]()) for name in others
            },
        },
        packages=["numpy", "opencv-python-headless", "scikit-image", "torchmetrics", "torch"],
    )


def repeat(run: Callable[[], object]) -> None:
    for _ in range(REPEATS):
        run()


if __name__ == "__main__":
    main()
