"""The generator on held-out images: metrics of every image, their means, and a sheet of samples."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from data_prep.images import Pixels
from models.masking import erase, paste
from pipeline.data.batch import Batch
from pipeline.evaluation.metrics import METRICS, UnitImage, measure
from pipeline.evaluation.sample_sheet import SamplePanel, sample_panel, sample_sheet

GPU_MEASURERS = 4  # threads: SSIM takes 8 ms of a core for an image of 256²

Total = Callable[[Mapping[str, float], torch.device], dict[str, float]]


class Inpainter(Protocol):
    """A generator, as ``models.Generator`` is one."""

    @property
    def guided(self) -> bool: ...

    def __call__(
        self, incomplete: Tensor, mask: Tensor, sketch: Tensor | None, /
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class ImageMetrics:
    """What is known about one completed image."""

    key: str
    hole_percent: float
    """Share of the image that was filled."""
    values: Mapping[str, float]
    """By the names of ``METRICS``."""


@dataclass(frozen=True)
class Evaluation:
    """Results for one rank's images."""

    rows: list[ImageMetrics]
    panels: list[SamplePanel]
    """Images of the first rows, for the sheet of samples."""
    device: torch.device

    @classmethod
    def joined(cls, parts: Sequence["Evaluation"], keep: int) -> "Evaluation":
        """Of images in shares that follow one another; the first ``keep`` have panels."""
        rows = [row for part in parts for row in part.rows]
        panels: list[SamplePanel] = []
        for part in parts:
            panels += part.panels
            if len(part.panels) < len(part.rows):
                break
        return cls(rows, panels[:keep], parts[0].device)

    def means(self, total: Total | None = None) -> dict[str, float]:
        """Each metric's mean over all images, every image counting the same.

        NaN where it is NaN for any image. ``total`` sums over ranks (``pipeline.ranks.total``) and
        makes this collective; without it the means are of this rank's images. Raises ValueError
        without any image.
        """
        sums = {name: sum((row.values[name] for row in self.rows), 0.0) for name in METRICS}
        sums["images"] = float(len(self.rows))
        if total is not None:
            sums = total(sums, self.device)
        images = sums.pop("images")
        if not images:
            raise ValueError("no held-out images to evaluate: raise data.val_fraction")
        return {name: value / images for name, value in sums.items()}

    def csv(self) -> str:
        """A line of names, then one line for each image."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["key", "hole_percent", *METRICS])
        for row in self.rows:
            writer.writerow([row.key, row.hole_percent, *(row.values[name] for name in METRICS)])
        return text.getvalue()

    def sheet(self) -> Pixels:
        """The panels one below the other, each with its caption."""
        return sample_sheet(self.panels, self.captions())

    def captions(self) -> list[str]:
        """Key, metrics and share of the hole, for each panel."""
        return [
            "   ".join(
                [
                    row.key,
                    *(metric.text(row.values[name]) for name, metric in METRICS.items()),
                    f"hole {row.hole_percent:.0f} %",
                ]
            )
            for row in self.rows[: len(self.panels)]
        ]


@torch.inference_mode()
def evaluate(
    generator: Inpainter, batches: Iterable[Batch], *, device: torch.device, keep: int = 0
) -> Evaluation:
    """Complete every image of ``batches`` and measure it; the first ``keep`` become panels.

    A guided generator gets the sketch inside the hole. The metrics are of the completed image, with
    known pixels pasted back, before any rounding to bytes.
    """
    rows: list[ImageMetrics] = []
    panels: list[SamplePanel] = []
    measured: Iterator[ImageMetrics] = iter(())
    with ThreadPoolExecutor(GPU_MEASURERS if device.type == "cuda" else 1, "measure") as threads:
        for batch in batches:
            ready = batch.to(device)
            coarse, refined = generator(
                erase(ready.image, ready.mask),
                ready.mask,
                ready.sketch if generator.guided else None,
            )
            completed = paste(refined, into=ready.image, mask=ready.mask)
            originals, results, firsts = map(_zero_to_one, (ready.image, completed, coarse))
            masks, strokes = batch.mask.numpy(), batch.sketch.numpy()
            rows += measured  # of the batch before, meanwhile
            measured = threads.map(_measured, batch.keys, results, originals, masks)
            for i in range(min(keep - len(panels), len(batch.keys))):
                drawn = strokes[i] if generator.guided else None
                panels.append(sample_panel(originals[i], masks[i], drawn, firsts[i], results[i]))
        rows += measured
    return Evaluation(rows, panels, device)


def _measured(
    key: str, completed: UnitImage, original: UnitImage, mask: UInt8[np.ndarray, "height width"]
) -> ImageMetrics:
    values = measure(completed, original, mask)
    return ImageMetrics(key, 100 * float(mask.mean()), values)


def _zero_to_one(images: Tensor) -> Float32[np.ndarray, "batch height width 3"]:
    unit: np.ndarray = ((images.float() + 1) / 2).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return unit
