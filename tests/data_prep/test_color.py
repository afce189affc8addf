"""Color profiles: converted to sRGB where asked for, and otherwise left alone."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_prep.images import decode
from data_prep.manifest import card
from tests.data_prep.profiles import wide_profile
from tests.data_prep.settings import SAMPLE_SETTINGS

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def blobs() -> Image.Image:
    colors = np.random.default_rng(0).integers(0, 255, (6, 6, 3), np.uint8)
    return Image.fromarray(colors).resize((96, 96), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_wide_profile_is_converted_where_asked_for(kind: str) -> None:
    how: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}
    options = how.get(kind, {})
    data = saved(blobs(), kind, icc_profile=wide_profile(), **options)
    kept = decode(data)
    source = ImageCms.ImageCmsProfile(io.BytesIO(wide_profile()))
    expected = ImageCms.profileToProfile(Image.fromarray(kept.pixels), source, SRGB)
    converted = decode(data, color="srgb")
    assert np.array_equal(converted.pixels, np.asarray(expected))
    assert np.abs(converted.pixels.astype(int) - kept.pixels).max() > 20
    assert not converted.plain_jpeg
    assert kept.plain_jpeg == (kind == "JPEG")


@pytest.mark.parametrize("profile", [None, SRGB.tobytes(), b"damaged", wide_profile()[:300]])
def test_srgb_and_what_is_no_profile_change_nothing(profile: bytes | None) -> None:
    data = saved(blobs(), "JPEG", quality=95, icc_profile=profile)
    converted = decode(data, color="srgb")
    assert np.array_equal(converted.pixels, decode(data).pixels)
    assert converted.plain_jpeg


def test_only_a_conversion_is_part_of_the_digest_and_the_card_says_what_was_done() -> None:
    kept = SAMPLE_SETTINGS.record()
    converted = replace(SAMPLE_SETTINGS, data=replace(SAMPLE_SETTINGS.data, color="srgb")).record()
    assert "color" not in kept
    assert converted == kept | {"color": "srgb"}
    counts = {
        "splits": {},
        "pictures": {"ok": 1, "skipped": 0, "failed": 0},
        "sketches": {},
        "sketch_density": 0.0,
    }
    assert "Color profiles were ignored" in card("x", "", "", counts, kept)
    assert "converted to sRGB" in card("x", "", "", counts, converted)
