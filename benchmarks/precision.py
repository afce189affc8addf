"""Does bfloat16 learn as float32 does? Short trainings on real images, several seeds of each.

Both precisions train what ``pipeline.step`` trains, from the same weights on the same crops and
masks; a seed decides about all three. bf16 *tracks* fp32 if, over the last quarter of the steps,
its losses lie no farther from those of fp32 with the same seed than fp32's lie from each other
with different ones: at each step the absolute difference, averaged over steps and pairs.

Two networks against each other are chaotic: whatever differs in the last digit differs visibly a
hundred steps on. How far that goes without bf16 is shown by fp32 itself, nudged: the same seed
again, the generator's first weights larger by a millionth.

Run: ``python -m benchmarks.precision [FOLDER] [--device cpu|cuda] [--size 128] [--batch 4]``; the
folder of images is ``$DEEPFILL_DATA/scenes`` unless given. Written to
``results/precision_<device>.json`` and, as an image, to ``docs/bf16.png``. On a CPU it takes
most of an hour.
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.reference.masks import random_mask
from benchmarks.timing import parse_on_device, skip, write_result
from models import Discriminator, Generator
from models.gated_conv import fuse_gates
from pipeline.data.batch import Batch
from pipeline.engine import Adam, TorchEngine
from pipeline.ranks import Ranks
from pipeline.step import train_step

PLOT = Path(__file__).parents[1] / "docs" / "bf16.png"
NUDGE = 1e-6
VARIANTS = {  # precision, and how much larger the first weights are
    "fp32": (torch.float32, 0.0),
    "nudged": (torch.float32, NUDGE),
    "bf16": (torch.bfloat16, 0.0),
}
LOSSES = ("l1", "adversarial", "discriminator")
SUFFIXES = {".jpg", ".jpeg", ".png"}
POINT_STEPS = 10  # steps that a point of the kept curves averages

Curves = np.ndarray  # (seeds, steps, losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="images; $DEEPFILL_DATA/scenes")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    options = parse_on_device(parser)
    if options.folder is None:
        if "DEEPFILL_DATA" not in os.environ:
            skip("needs images: give a folder, or set DEEPFILL_DATA")
        options.folder = Path(os.environ["DEEPFILL_DATA"], "scenes")
    if options.seeds < 2 or options.steps < 4 * POINT_STEPS:
        parser.error(f"at least 2 seeds and {4 * POINT_STEPS} steps are needed for a comparison")

    photographs = read_photographs(options.folder, options.size)
    curves: dict[str, Curves] = {}
    for name, (precision, nudge) in VARIANTS.items():
        runs = []
        for seed in range(options.seeds):
            started = time.perf_counter()
            batches = training_batches(
                photographs, options.size, options.batch, options.steps, np.random.default_rng(seed)
            )
            runs.append(train(batches, seed, precision, nudge, torch.device(options.device)))
            print(f"{name} seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
        curves[name] = np.array(runs)

    last = options.steps // 4
    comparison = compare(**{name: runs[:, -last:] for name, runs in curves.items()})
    points = {name: averaged(runs) for name, runs in curves.items()}
    write_result(
        f"precision_{options.device}",
        {
            "images": len(photographs),
            "size_px": options.size,
            "batch": options.batch,
            "steps": options.steps,
            "seeds": options.seeds,
            "criterion": f"mean absolute difference over the last {last} steps: bf16 from fp32 of "
            "the same seed, at most that of fp32 between seeds",
            "tracks": all(values["ratio"] <= 1 for values in comparison.values()),
            "losses": comparison,
            "steps_per_point": POINT_STEPS,
            "curves": {
                name: {
                    loss: runs[:, :, index].round(5).tolist() for index, loss in enumerate(LOSSES)
                }
                for name, runs in points.items()
            },
        },
        packages=["torch", "numpy", "pillow"],
    )
    plot(points, last // POINT_STEPS).save(PLOT, optimize=True)


def read_photographs(folder: Path, size: int) -> list[np.ndarray]:
    """Every image of ``folder``, (H, W, 3) bytes; small ones enlarged so that a crop fits."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        skip(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))})")
    photographs = []
    for path in paths:
        photograph = Image.open(path).convert("RGB")
        scale = max(1.0, size / min(photograph.size))
        width, height = (max(size, round(scale * side)) for side in photograph.size)
        photographs.append(
            np.asarray(photograph.resize((width, height), Image.Resampling.BILINEAR))
        )
    return photographs


def training_batches(
    photographs: Sequence[np.ndarray], size: int, batch: int, steps: int, rng: np.random.Generator
) -> Iterator[Batch]:
    """Random crops of images in random order, each with a different mask."""
    order: list[int] = []
    for _ in range(steps):
        images, masks, keys = [], [], []
        for _ in range(batch):
            order = order or rng.permutation(len(photographs)).tolist()
            number = order.pop()
            height, width = photographs[number].shape[:2]
            top, left = rng.integers(0, height - size + 1), rng.integers(0, width - size + 1)
            images.append(photographs[number][top : top + size, left : left + size])
            masks.append(random_mask(size, size, rng)[0, 0])
            keys.append(str(number))
        yield Batch(
            image=torch.from_numpy(np.stack(images)),
            mask=torch.from_numpy(np.stack(masks)).to(torch.uint8),
            sketch=torch.zeros(batch, size, size, dtype=torch.uint8),
            keys=tuple(keys),
        )


def train(
    batches: Iterator[Batch],
    seed: int,
    precision: torch.dtype,
    nudge: float,
    device: torch.device,
) -> np.ndarray:
    """Losses of fresh networks at every step, (steps, losses)."""
    torch.manual_seed(seed)
    generator = Generator().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    discriminator = Discriminator().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    fuse_gates(generator)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(1 + nudge)
    engines = [TorchEngine(n, Adam(), Ranks(), None) for n in (generator, discriminator)]
    curve = []
    for batch in batches:
        losses = train_step(batch.to(device), *engines, precision=precision).losses
        l1 = losses["loss/l1_coarse"] + losses["loss/l1_refined"]
        curve.append(
            torch.stack([l1, losses["loss/adversarial"], losses["loss/discriminator"]]).cpu()
        )
    return torch.stack(curve).double().numpy()


def compare(fp32: Curves, nudged: Curves, bf16: Curves) -> dict[str, dict[str, Any]]:
    """For each loss its means, how far bf16 is from fp32, and fp32 from itself."""
    pairs = combinations(range(len(fp32)), 2)
    between_seeds = np.mean([np.abs(fp32[a] - fp32[b]).mean(axis=0) for a, b in pairs], axis=0)
    of_bf16, of_nudged = (np.abs(runs - fp32).mean(axis=(0, 1)) for runs in (bf16, nudged))
    return {
        loss: {
            "fp32_by_seed": fp32[..., index].mean(axis=1).round(5).tolist(),
            "bf16_by_seed": bf16[..., index].mean(axis=1).round(5).tolist(),
            "bf16_from_fp32": float(of_bf16[index]),
            "nudged_from_fp32": float(of_nudged[index]),
            "fp32_between_seeds": float(between_seeds[index]),
            "ratio": float(of_bf16[index] / between_seeds[index]),
        }
        for index, loss in enumerate(LOSSES)
    }


def averaged(runs: Curves) -> Curves:
    """Means of ``POINT_STEPS`` steps each; a rest at the end is left out."""
    points = runs.shape[1] // POINT_STEPS
    kept = runs[:, : points * POINT_STEPS]
    means: Curves = kept.reshape(len(runs), points, POINT_STEPS, -1).mean(axis=2)
    return means


PANEL, MARGIN, FINER = (
    (300, 200),
    34,
    3,
)  # pixels; drawn finer, then shrunk, so that lines are smooth
WHITE, BAND, INK = "#ffffff", "#c9d9ee", "#444444"
COLORS = {"fp32": "#4577b4", "nudged": "#7aa874", "bf16": "#d9661f"}


def plot(points: dict[str, Curves], last: int) -> Image.Image:
    """One panel for each loss: fp32's range over the seeds, and a line for every run.

    The gray ground marks the ``last`` points, which are compared.
    """
    width, height = len(LOSSES) * (PANEL[0] + MARGIN) + MARGIN, PANEL[1] + 2 * MARGIN
    image = Image.new("RGB", (FINER * width, FINER * height), WHITE)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=FINER * 12)
    for index, loss in enumerate(LOSSES):
        corner = (MARGIN + index * (PANEL[0] + MARGIN), MARGIN)
        panel(draw, font, corner, loss, {n: runs[..., index] for n, runs in points.items()}, last)
    return image.resize((width, height), Image.Resampling.BOX)


def panel(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    corner: tuple[int, int],
    title: str,
    runs: dict[str, np.ndarray],
    last: int,
) -> None:
    values = np.concatenate(list(runs.values()))
    low, high, count = values.min(), values.max(), values.shape[1]

    def place(point: float, value: float) -> tuple[float, float]:
        x = corner[0] + point / (count - 1) * PANEL[0]
        y = corner[1] + (high - value) / (high - low) * PANEL[1]
        return FINER * x, FINER * y

    def line(curve: np.ndarray, color: str, width: int) -> None:
        draw.line([place(*point) for point in enumerate(curve)], color, width, joint="curve")

    draw.rectangle([place(count - last, high), place(count - 1, low)], "#f1f1f1")
    upper = [place(*point) for point in enumerate(runs["fp32"].max(axis=0))]
    lower = [place(*point) for point in enumerate(runs["fp32"].min(axis=0))]
    draw.polygon(upper + lower[::-1], BAND)
    for name, curves in runs.items():
        for curve in curves:
            line(curve, COLORS[name], FINER)
    draw.rectangle([place(0, high), place(count - 1, low)], outline=INK, width=FINER // 2)
    left, top = place(0, high)
    bottom = place(0, low)[1] + FINER * 3
    draw.text((left, top - FINER * 18), title, INK, font)
    for index, (name, color) in enumerate(COLORS.items()):
        draw.text((left + FINER * (100 + 50 * index), top - FINER * 18), name, color, font)
    draw.text((left - FINER * 4, top), f"{high:.2f}", INK, font, anchor="ra")
    draw.text((left - FINER * 4, bottom), f"{low:.2f}", INK, font, anchor="rd")
    draw.text((left, bottom), "step 0", INK, font)
    draw.text((place(count - 1, low)[0], bottom), f"{count * POINT_STEPS}", INK, font, anchor="ra")


if __name__ == "__main__":
    main()
