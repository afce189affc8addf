"""Color profiles: pixels of other color spaces become sRGB."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms

ColorHandling = Literal["keep", "srgb"]

SAME_WITHIN = 2  # steps of 255 that rounded curves and matrices of sRGB itself may differ by
_SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}


def to_srgb(
    pixels: UInt8[np.ndarray, "height width 3"], profile: bytes
) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels in sRGB; unchanged where ``profile`` is sRGB, damaged, or not of RGB or gray."""
    mode = profile_mode(profile)
    if mode not in ("RGB", "L") or (transform := _transform(profile)) is None:
        return pixels
    image = Image.fromarray(pixels if mode == "RGB" else np.ascontiguousarray(pixels[..., 0]))
    return np.asarray(_applied(transform, image))


def cmyk_to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """A CMYK image as sRGB; unchanged where ``profile`` is damaged or of other colors."""
    if profile_mode(profile) != "CMYK" or (transform := _transform(profile)) is None:
        return image
    return _applied(transform, image)


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is when done in place
    return converted


@lru_cache(64)
def profile_mode(profile: bytes) -> str | None:
    """The mode of the pixels that a profile is for: RGB, L or CMYK; None where it is damaged."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    except OSError:
        return None
    return _SPACES.get(opened.profile.xcolor_space)


@lru_cache(64)
def _transform(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """From this profile to sRGB; None where that changes nothing, or cannot be done."""
    mode = profile_mode(profile)
    assert mode is not None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
    if mode == "CMYK":
        return transform
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    if mode == "L":
        colors = np.repeat(levels[None, :, None], 3, axis=2)
    image = Image.fromarray(colors if mode == "RGB" else np.ascontiguousarray(colors[..., 0]))
    change = np.asarray(_applied(transform, image)).astype(int) - colors
    return transform if np.abs(change).max() > SAME_WITHIN else None
