"""Image, mask and sketch files as commands take and write them."""

import io
import logging
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8, UInt16
from PIL import Image, ImageOps
from torch import Tensor

from cluster.storage import replacing
from data_prep.color import profile_mode
from data_prep.images import (
    MAX_PIXELS,
    ImageError,
    Pixels,
    decode,
    has_16_bits,
    read_mask,
    white_of,
)
from data_prep.masks import MaskPixels
from pipeline.filling import FillResult, blended, marked_at

log = logging.getLogger(__name__)

WRITTEN_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MOSTLY_WHITE = 0.9
OTHER_ASPECT = 0.02
WITH_ALPHA = (".png", ".tif", ".tiff", ".webp")
WITH_16_BITS = (".png", ".tif", ".tiff")
WITH_PROFILE = (".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
JPEG = {"quality": 95, "subsampling": 0}
# By default Pillow writes JPEG at 75 with colors at half the resolution, and WebP with loss.
SAVING: dict[str, dict[str, Any]] = {
    ".jpg": JPEG,
    ".jpeg": JPEG,
    ".webp": {"lossless": True, "exact": True},
}


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
    return _decoded(path.read_bytes(), str(path))


def _decoded(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Pixels:
    try:
        return decode(data, max_pixels=max_pixels).pixels
    except ImageError as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


@dataclass(frozen=True)
class OriginalImage:
    """An image with all that its file holds, so that known pixels can be written as they were."""

    pixels: Pixels
    """Upright 8-bit RGB, on white where it is transparent: what a network sees."""
    colors: Pixels
    """The same without white under it."""
    alpha: UInt8[np.ndarray, "height width"] | None = None
    deep_gray: UInt16[np.ndarray, "height width"] | None = None
    """The values of an image of one deep channel."""
    deep_white: int = 65535
    profile: bytes | None = None
    """The color profile, in ICC's format."""
    deep_colors: bool = False
    """The file has 16 bits in several channels, of which 8 are read."""

    def lost_in(self, suffix: str) -> list[str]:
        """What a file of this suffix will not keep."""
        lost = []
        if self.alpha is not None and suffix not in WITH_ALPHA:
            lost.append("transparency, which becomes white")
        if self.deep_colors or (self.deep_gray is not None and suffix not in WITH_16_BITS):
            lost.append("8 of its 16 bits")
        if self.profile and (suffix not in WITH_PROFILE or not self._profile_fits(suffix)):
            lost.append("the color profile")
        return lost

    def save(self, path: Path, filled: FillResult) -> None:
        """Write what ``filled`` says, and the original where its weight is 0.

        ``path`` appears once it is whole.
        """
        suffix = path.suffix.lower()
        options = dict(SAVING.get(suffix, {}))
        if self.profile and suffix in WITH_PROFILE and self._profile_fits(suffix):
            options["icc_profile"] = self.profile
        image = self._composed(suffix, filled)
        with replacing(path) as file:
            image.save(file, format=Image.registered_extensions()[suffix], **options)

    def _composed(self, suffix: str, filled: FillResult) -> Image.Image:
        if self._stays_gray(suffix):
            assert self.deep_gray is not None
            gray = filled.colors.mean(axis=2) * self.deep_white
            return Image.fromarray(blended(gray, self.deep_gray, filled.weight))
        if self.alpha is None or suffix not in WITH_ALPHA:
            return Image.fromarray(filled.over(self.pixels))
        opaque = np.full_like(self.alpha, 255)  # what was filled is to be seen
        alpha = blended(opaque, self.alpha, filled.weight)
        return Image.fromarray(np.dstack([filled.over(self.colors), alpha]))

    def _stays_gray(self, suffix: str) -> bool:
        return self.deep_gray is not None and suffix in WITH_16_BITS

    def _profile_fits(self, suffix: str) -> bool:
        assert self.profile is not None
        return profile_mode(self.profile) == ("L" if self._stays_gray(suffix) else "RGB")


def read_original(path: Path) -> OriginalImage:
    """The image with its alpha, 16 bits and color profile. ValueError where it is not readable."""
    return original_image(path.read_bytes(), str(path))


def original_image(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> OriginalImage:
    """``read_original`` of the bytes of a file; ``name`` is for messages.

    ValueError also where the image has more than ``max_pixels``.
    """
    pixels = _decoded(data, name, max_pixels)
    with warnings.catch_warnings(action="ignore"):
        try:
            image: Image.Image = Image.open(io.BytesIO(data))
            deep_colors = has_16_bits(image) and not image.mode.startswith("I")
            image = ImageOps.exif_transpose(image)
        except OSError:  # an array of numpy's, which Pillow does not know
            return OriginalImage(pixels, pixels)
        profile = image.info.get("icc_profile")
        if image.mode.startswith("I"):
            white = white_of(image)
            deep = np.asarray(image).astype(np.uint16)
            return OriginalImage(pixels, pixels, deep_gray=deep, deep_white=white, profile=profile)
        if image.has_transparency_data:
            layers = np.asarray(image.convert("RGBA"))
            alpha, colors = layers[..., 3], layers[..., :3]
            if (alpha < 255).any():
                return OriginalImage(
                    pixels, colors, alpha=alpha, profile=profile, deep_colors=deep_colors
                )
        return OriginalImage(pixels, pixels, profile=profile, deep_colors=deep_colors)


def read_mask_of(
    image: Path, shape: tuple[int, ...], path: Path, *, fit: bool = False, invert: bool = False
) -> MaskPixels:
    """The mask or sketch at ``path`` for ``image`` of ``shape`` (height, width, ...), 1 in white.

    What is transparent counts as black. ``fit`` stretches one of another size; no stroke is lost.
    ``invert``: 1 in black instead. ValueError where it is not readable, of another size, or gray
    where it should be white.
    """
    try:
        mask = read_mask(path.read_bytes(), white_is_hole=not invert)
    except ImageError as error:
        raise ValueError(f"{path} cannot be read as a mask: {error}") from error
    if mask.shape != shape[:2]:
        sizes = f"{path} is {mask.shape[1]}×{mask.shape[0]}, but {image} is {shape[1]}×{shape[0]}"
        if not fit:
            raise ValueError(f"{sizes}: both should be of one size")
        if abs(mask.shape[1] / mask.shape[0] / (shape[1] / shape[0]) - 1) > OTHER_ASPECT:
            log.warning("%s: another shape, so it is stretched out of proportion", sizes)
        mask = marked_at(mask, (shape[0], shape[1]))
    if (share := mask.mean()) > MOSTLY_WHITE:
        log.warning("%s marks %.0f %%: invert it if it means the opposite", path, 100 * share)
    return mask


def as_plane(mask: MaskPixels, device: torch.device) -> Tensor:
    """``mask`` as the networks take it: (1, 1, height, width), float32."""
    return torch.tensor(mask, dtype=torch.float32, device=device)[None, None]
