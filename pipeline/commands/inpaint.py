"""Fill the holes of one picture, or of a folder of them."""

import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_prep.images import IMAGE_SUFFIXES, ImageError, Pixels, decode, read_mask
from data_prep.masks import Mask
from models import Generator
from models.inference import fill, memory_bytes
from models.masking import guide
from pipeline.memory import available_bytes
from pipeline.networks import load_generator

log = logging.getLogger(__name__)

OUT_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MOSTLY_WHITE = 0.9
JPEG = {"quality": 95, "subsampling": 0}
# By default Pillow writes JPEG at 75 with colours at half the resolution, and WebP with loss.
SAVING: dict[str, dict[str, Any]] = {".jpg": JPEG, ".jpeg": JPEG, ".webp": {"lossless": True}}


def inpaint(
    weights: str,
    image: Path,
    mask: Path,
    out: Path,
    *,
    sketch: Path | None = None,
    max_memory_bytes: int | None = None,
) -> Iterator[Path]:
    """Fill ``image`` where ``mask`` is white; yields each file written.

    With a folder of images, ``mask`` and ``sketch`` are folders with files of the same stem, or one
    file for all, and ``out`` is a folder. ``sketch`` is white strokes on black; only those inside
    the hole count. In both, what is transparent counts as black. Outputs are upright 8-bit RGB,
    PNG unless ``out`` has another suffix; known pixels of such a picture stay as they are to the
    last bit, but in JPEG, which loses some whatever its settings. ``max_memory_bytes`` bounds the
    activations, by default to most of the device's free memory. Every picture is looked for before
    the first one is filled, and none of those given is written over. ValueError for a mask without
    a hole.
    """
    jobs = list(_jobs(image, mask, sketch, out))
    given = {path.resolve() for *paths, _ in jobs for path in paths if path}
    for *_, target in jobs:
        refuse_to_write(target, given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = load_generator(weights).to(device).eval()
    if sketch is not None and not generator.guided:
        raise ValueError(f"{weights} takes no sketch: leave out --sketch, or use guided weights")
    for picture, hole, strokes, target in jobs:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fill_file(generator, device, picture, hole, strokes, target, max_memory_bytes)
        yield target


def _jobs(
    image: Path, mask: Path, sketch: Path | None, out: Path
) -> Iterator[tuple[Path, Path, Path | None, Path]]:
    if not image.is_dir():
        target = out / f"{image.stem}.png" if out.is_dir() else out
        yield existing(image), existing(mask), sketch and existing(sketch), target
        return
    pictures = _by_stem(image)
    if not pictures:
        raise ValueError(f"{image} holds no pictures ({' '.join(sorted(IMAGE_SUFFIXES))})")
    masks = _partners(pictures, mask)
    sketches = _partners(pictures, sketch) if sketch else {}
    for stem, picture in pictures.items():
        yield picture, masks[stem], sketches.get(stem), out / f"{stem}.png"


def refuse_to_write(target: Path, given: Collection[Path] = ()) -> None:
    """ValueError where ``target`` has no picture's suffix, or is one of the resolved ``given``."""
    if target.suffix.lower() not in OUT_SUFFIXES:
        raise ValueError(f"--out {target} should end in {', '.join(OUT_SUFFIXES)}")
    if target.resolve() in given:
        raise ValueError(f"{target} is one of the pictures given: choose another --out")


def existing(path: Path) -> Path:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: with one picture go files")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: give a picture")
    return path


def _by_stem(folder: Path) -> dict[str, Path]:
    """The pictures in ``folder`` under their names without suffix, sorted."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES and found.setdefault(path.stem, path) != path:
            raise ValueError(
                f"{found[path.stem]} and {path.name} go by one name, {path.stem}: rename one"
            )
    return found


def _partners(pictures: Mapping[str, Path], given: Path) -> dict[str, Path]:
    """For every picture its file in the folder ``given``, or ``given`` itself."""
    if not given.is_dir():
        return dict.fromkeys(pictures, existing(given))
    found = _by_stem(given)
    for stem, picture in pictures.items():
        if stem not in found:
            raise FileNotFoundError(f"{given} has no file {stem}.* to go with {picture}")
    return found


def _fill_file(
    generator: Generator,
    device: torch.device,
    picture: Path,
    hole: Path,
    strokes: Path | None,
    target: Path,
    max_memory_bytes: int | None,
) -> None:
    original = read_image(picture)
    mask = read_mask_image(hole, original.shape[:2], picture)
    if not mask.any():
        raise ValueError(f"{hole} has no hole: white pixels mark it, no black or transparent ones")
    image_tensor = torch.tensor(original, device=device).permute(2, 0, 1)[None] / 127.5 - 1
    mask_tensor = plane(mask, device)
    sketch_tensor = None
    if generator.guided:
        # Without strokes of the user's the network is told that there are no edges.
        drawn = (
            np.zeros_like(mask)
            if strokes is None
            else read_mask_image(strokes, mask.shape, picture)
        )
        if strokes is not None and not (drawn & mask).any():
            log.warning("no stroke of %s is in the hole: strokes are white, on black", strokes)
        sketch_tensor = guide(plane(drawn, device), mask_tensor)
    height, width = mask.shape
    needed = memory_bytes(generator.options, 1, height, width) / 2**30
    log.info("filling picture=%s size=%dx%d needs_gib=%.2f", picture, width, height, needed)
    completed = fill(
        generator,
        image_tensor,
        mask_tensor,
        sketch_tensor,
        max_memory_bytes=max_memory_bytes or available_bytes(device),
    )
    filled = ((completed[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255)
    # From the bytes, not from the network: known pixels stay exactly as they were.
    result = np.where(mask[..., None] > 0, filled.to("cpu", torch.uint8).numpy(), original)
    Image.fromarray(result).save(target, **SAVING.get(target.suffix.lower(), {}))


def read_image(path: Path) -> Pixels:
    try:
        return decode(path.read_bytes()).pixels
    except ImageError as error:
        raise ValueError(f"{path} is no picture that can be read: {error}") from error


def read_mask_image(path: Path, shape: tuple[int, ...], picture: Path) -> Mask:
    """1 where the picture at ``path`` is brighter than half; what is transparent is black."""
    try:
        mask = read_mask(path.read_bytes())
    except ImageError as error:
        raise ValueError(f"mask {path}: {error}") from error
    if mask.shape != shape[:2]:
        raise ValueError(
            f"{path} is {mask.shape[1]}×{mask.shape[0]}, but {picture} is "
            f"{shape[1]}×{shape[0]}: both should be of one size"
        )
    if mask.mean() > MOSTLY_WHITE:
        log.warning(
            "%s is white to %.0f %%: invert it if it means the opposite", path, 100 * mask.mean()
        )
    return mask


def plane(values: Mask, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[None, None]  # (1, 1, H, W)
