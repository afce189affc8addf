"""The generator on held-out pictures: figures, a row for every picture, and a sheet of samples."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from models.masking import erase, paste
from pipeline.data.batch import Batch
from pipeline.evaluation.metrics import measure

Cell = UInt8[np.ndarray, "height width 3"]
Total = Callable[[Mapping[str, float], torch.device], dict[str, float]]

METRICS = (
    "l1_percent",
    "l2_percent",
    "psnr_db",
    "ssim",
)  # defined in pipeline/evaluation/metrics.py

_WHITE, _INK = 255, 20
_GAP_PX, _CAPTION_PX, _TEXT_PX, _MIN_CELL_PX = 6, 22, 14, 160


class Inpainter(Protocol):
    """A generator, as ``models.Generator`` is one."""

    guided: bool

    def __call__(
        self, incomplete: Tensor, mask: Tensor, sketch: Tensor | None, /
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Row:
    """What is known about one completed picture."""

    key: str
    hole_percent: float
    l1_percent: float
    l2_percent: float
    psnr_db: float
    ssim: float


@dataclass(frozen=True)
class Sample:
    """One picture on its way through the generator, as 8-bit RGB."""

    original: Cell
    hole: Cell
    """The original, white in the hole."""
    sketch: Cell | None
    """The same with the strokes that guided it; None where there were none to see."""
    coarse: Cell
    completed: Cell


@dataclass(frozen=True)
class Evaluation:
    """Results of one rank's pictures."""

    rows: list[Row]
    samples: list[Sample]
    device: torch.device

    def means(self, total: Total | None = None) -> dict[str, float]:
        """Each metric's mean over all pictures, every picture counting the same.

        ``total`` sums over ranks (``pipeline.ranks.total``) and makes this collective; without it
        the means are of this rank's pictures. ValueError where there are none at all.
        """
        sums = {name: sum((getattr(row, name) for row in self.rows), 0.0) for name in METRICS}
        sums["pictures"] = float(len(self.rows))
        if total is not None:
            sums = total(sums, self.device)
        pictures = sums.pop("pictures")
        if not pictures:
            raise ValueError("no held-out pictures to evaluate: raise data.val_fraction")
        return {name: value / pictures for name, value in sums.items()}

    def csv(self) -> str:
        """One line for every picture, after a line of names."""
        text = io.StringIO()
        names = list(Row.__dataclass_fields__)
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return text.getvalue()

    def sheet(self) -> Cell:
        """The kept samples, one to a line: original, hole, sketch, coarse and completed."""
        columns = {
            "original": [sample.original for sample in self.samples],
            "hole": [sample.hole for sample in self.samples],
            "sketch": [sample.sketch for sample in self.samples if sample.sketch is not None],
            "coarse": [sample.coarse for sample in self.samples],
            "completed": [sample.completed for sample in self.samples],
        }
        captions = [
            f"{row.key}   L1 {row.l1_percent:.1f} %   PSNR {row.psnr_db:.1f} dB   "
            f"SSIM {row.ssim:.3f}   hole {row.hole_percent:.0f} %"
            for row in self.rows[: len(self.samples)]
        ]
        return sample_sheet({name: cells for name, cells in columns.items() if cells}, captions)


@torch.inference_mode()
def evaluate(
    generator: Inpainter, batches: Iterable[Batch], *, device: torch.device, keep: int = 0
) -> Evaluation:
    """Complete every picture of ``batches`` and measure it; the first ``keep`` stay as samples.

    A guided generator gets the sketch inside the hole. Metrics are of the completed picture, known
    pixels pasted back, before any rounding to bytes.
    """
    rows: list[Row] = []
    samples: list[Sample] = []
    for batch in batches:
        ready = batch.to(device)
        coarse, refined = generator(
            erase(ready.image, ready.mask), ready.mask, ready.sketch if generator.guided else None
        )
        completed = paste(refined, into=ready.image, mask=ready.mask)
        originals, results, firsts = map(_zero_to_one, (ready.image, completed, coarse))
        masks, strokes = batch.mask.numpy(), batch.sketch.numpy()
        for i, key in enumerate(batch.keys):
            quality = measure(results[i], originals[i], masks[i])
            rows.append(Row(key, 100 * float(masks[i].mean()), **asdict(quality)))
            if len(samples) < keep:
                samples.append(
                    _sample(
                        originals[i],
                        masks[i],
                        strokes[i] if generator.guided else None,
                        firsts[i],
                        results[i],
                    )
                )
    return Evaluation(rows, samples, device)


def sample_sheet(columns: Mapping[str, Sequence[Cell]], captions: Sequence[str]) -> Cell:
    """Pictures of one size in a grid, with a title over each column and a caption under each line.

    Small pictures are enlarged by whole numbers, so that the text fits.
    """
    if not captions:
        raise ValueError("a sheet needs at least one sample: keep some")
    height, width = next(iter(columns.values()))[0].shape[:2]
    scale = -(-_MIN_CELL_PX // min(height, width))
    height, width = scale * height, scale * width
    line_px = height + _CAPTION_PX
    sheet = Image.new(
        "RGB",
        (
            len(columns) * (width + _GAP_PX) + _GAP_PX,
            _CAPTION_PX + len(captions) * line_px,
        ),
        (_WHITE, _WHITE, _WHITE),
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_TEXT_PX)
    ink = (_INK, _INK, _INK)
    for column, (title, cells) in enumerate(columns.items()):
        left = _GAP_PX + column * (width + _GAP_PX)
        draw.text((left, 2), title, ink, font)
        for line, cell in enumerate(cells):
            picture = Image.fromarray(cell).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, _CAPTION_PX + line * line_px))
    for line, caption in enumerate(captions):
        draw.text((_GAP_PX, _CAPTION_PX + line * line_px + height + 2), caption, ink, font)
    return np.asarray(sheet)


def _sample(
    original: Float32[np.ndarray, "height width 3"],
    mask: UInt8[np.ndarray, "height width"],
    strokes: UInt8[np.ndarray, "height width"] | None,
    coarse: Float32[np.ndarray, "height width 3"],
    completed: Float32[np.ndarray, "height width 3"],
) -> Sample:
    hole = _bytes(original)
    hole[mask > 0] = _WHITE
    sketch = None
    if strokes is not None:
        sketch = hole.copy()
        sketch[(mask > 0) & (strokes > 0)] = _INK
    return Sample(_bytes(original), hole, sketch, _bytes(coarse), _bytes(completed))


def _zero_to_one(image: Tensor) -> Float32[np.ndarray, "batch height width 3"]:
    pictures: np.ndarray = ((image.float() + 1) / 2).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pictures


def _bytes(picture: Float32[np.ndarray, "height width 3"]) -> Cell:
    rounded: Cell = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    return rounded
