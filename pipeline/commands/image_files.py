"""Image, mask and sketch files as commands take and write them."""

import logging
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from data_prep.images import ImageError, Pixels, decode, read_mask
from data_prep.masks import MaskPixels

log = logging.getLogger(__name__)

WRITTEN_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MOSTLY_WHITE = 0.9


def existing_file(path: Path) -> Path:
    """``path``; ValueError where it is a folder, FileNotFoundError where nothing is there."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a file, or a folder of images as IMAGE")
    if not path.is_file():
        raise FileNotFoundError(f"{path} was not found: give an image file")
    return path


def refuse_to_write(target: Path, given: Collection[Path] = ()) -> None:
    """ValueError where ``target`` is not an image's name, or is one of the resolved ``given``."""
    if target.suffix.lower() not in WRITTEN_SUFFIXES:
        raise ValueError(f"--out {target} should end in {', '.join(WRITTEN_SUFFIXES)}")
    if target.resolve() in given:
        raise ValueError(f"{target} is one of the images given: choose another --out")


def read_image(path: Path) -> Pixels:
    """Upright 8-bit RGB. ValueError where ``path`` is not a readable image."""
    try:
        return decode(path.read_bytes()).pixels
    except ImageError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def read_mask_of(image: Path, shape: tuple[int, ...], path: Path) -> MaskPixels:
    """The mask or sketch at ``path`` for ``image`` of ``shape`` (height, width, ...), 1 in white.

    What is transparent counts as black. ValueError where it is not readable, of another size, or
    gray where it should be white.
    """
    try:
        mask = read_mask(path.read_bytes())
    except ImageError as error:
        raise ValueError(f"{path} cannot be read as a mask: {error}") from error
    if mask.shape != shape[:2]:
        raise ValueError(
            f"{path} is {mask.shape[1]}×{mask.shape[0]}, but {image} is "
            f"{shape[1]}×{shape[0]}: both should be of one size"
        )
    if (share := mask.mean()) > MOSTLY_WHITE:
        log.warning("%s is white to %.0f %%: invert it if it means the opposite", path, 100 * share)
    return mask


def as_plane(mask: MaskPixels, device: torch.device) -> Tensor:
    """``mask`` as the networks take it: (1, 1, height, width), float32."""
    return torch.tensor(mask, dtype=torch.float32, device=device)[None, None]
