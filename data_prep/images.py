"""Decode any image to upright RGB, scale it to the stored size, and encode it again."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageColor, UnidentifiedImageError

from data_prep.color import ColorHandling, cmyk_to_srgb, to_srgb

Pixels = UInt8[np.ndarray, "height width 3"]
Strokes = UInt8[np.ndarray, "height width"]  # 1 on a stroke, else 0

IMAGE_SUFFIXES = frozenset(
    [
        *(".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".webp", ".bmp"),
        *(".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif", ".npy"),
    ]
)
"""Names of files, in lower case, that ``decode`` reads."""
WHITE_ABOVE = 127.5  # docs/model.md, section 5.3
COLORFUL = 48  # of 255, between the channels of a pixel; JPEGs of masks have less
MOST_COLORED, MOST_GRAY = 0.01, 0.5  # shares of the pixels of a mask
MAX_PIXELS = 100_000_000
JPEG_QUALITY = 95
BAND_PIXELS = 2**22
MAX_ASPECT = 16  # panoramas have up to 10; edges of longer images would not fit into memory
# JPEG markers of metadata, as words of little-endian bytes: FF E1 opens EXIF and XMP, FF ED IPTC.
APP1, APP13 = 0xE1FF, 0xEDFF
PROFILE_SEGMENT = b"ICC_PROFILE\0"
END_OF_IMAGE = b"\xff\xd9"
MARKER = re.compile(rb"\xff+[\x01-\xfe]")  # a stuffed zero is none
START_OF_SCAN, APP2 = 0xDA, 0xE2
# Frames of which libjpeg lets the end be missing without a word: progressive, arithmetic, both.
ENDS_SILENTLY = (0xC2, 0xC9, 0xCA)
ORIENTATION = 0x0112  # the EXIF tag
# Tags of TIFF that say how large a sample can be.
BITS_PER_SAMPLE, MAX_SAMPLE_VALUE, SAMPLE_FORMAT = 258, 281, 339
SIGNED = 2
DEEP_WHITE = 65535
NEARLY_BLACK = 1 / 16  # of the range: 12 bits in 16, and 8 in more, are darker at their brightest
GRAY_8_BITS = bytes([8, 0, 0, 0, 0])  # the end of IHDR: no palette, no interlace


class ImageError(ValueError):
    """An image that cannot be used; ``reason`` is one word for statistics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.reason, str(self))


@dataclass(frozen=True)
class Decoded:
    """An upright RGB image, perhaps already smaller than it is in the file."""

    pixels: Pixels
    width: int
    """Width and height of the upright image in the file, in pixels."""
    height: int
    plain_jpeg: bool = False
    """The file itself is an upright JPEG in color, without metadata about cameras or places."""

    def cropped(self, crop: tuple[int, int, int, int]) -> Decoded:
        """The part at (left, top, right, bottom), in pixels of the whole upright image."""
        left, top, right, bottom = crop
        if self.pixels.shape[:2] != (self.height, self.width):
            raise ValueError("a crop needs the image in full size: decode without enough_px")
        if not (0 <= left < right <= self.width and 0 <= top < bottom <= self.height):
            raise ImageError(
                "crop_outside", f"crop {crop} of an image of {self.width} x {self.height} pixels"
            )
        return Decoded(self.pixels[top:bottom, left:right], right - left, bottom - top)


def decode(
    data: bytes,
    *,
    enough_px: int | None = None,
    max_pixels: int = MAX_PIXELS,
    background: Literal["white", "black"] = "white",
    color: ColorHandling = "keep",
) -> Decoded:
    """Decode an image of any format, upright and as 8-bit RGB.

    EXIF orientation is applied, CMYK and palettes are converted, 16 bits are scaled to 8,
    transparent pixels show ``background``, and the first of several frames is used. With
    ``color`` "srgb", pixels with another color profile are converted; "keep" ignores profiles.
    With ``enough_px``, a JPEG may come back smaller, with neither side below it: give it if you
    scale the short side down to at most half of it. ``max_pixels`` cannot lift Pillow's own limit
    of 178,956,970.

    Raises ImageError with the reason ``empty``, ``unknown_format``, ``too_many_pixels``,
    ``unsupported_mode`` or ``damaged``.
    """
    if not data:
        raise ImageError("empty", "the file is empty")
    if data[:2] == b"\xff\xd8":
        try:
            return _decode_jpeg(data, enough_px, max_pixels, color)
        except ValueError as error:
            if isinstance(error, ImageError):
                raise
            data = _undamaged(data, str(error))
            # Other kinds and oddities of JPEG go to Pillow, which reads more and explains better.
    if data[:6] == b"\x93NUMPY":
        return _decode_npy(data, max_pixels)
    return _decode_any(data, max_pixels, background, color)


def fit(image: Decoded, short_px: int) -> Pixels:
    """Scale by area to a short side of ``short_px`` pixels; the aspect ratio stays.

    Raises ImageError ``too_small`` instead of enlarging, and ``too_long`` where the long side
    would have more than ``MAX_ASPECT`` times ``short_px``.
    """
    pixels, width, height = image.pixels, image.width, image.height
    short = min(width, height)
    if short < short_px:
        raise ImageError(
            "too_small", f"{width} x {height} pixels: the short side is under {short_px}"
        )
    size = tuple(_scaled(side, short_px, short) for side in (width, height))
    if max(size) > MAX_ASPECT * short_px:
        raise ImageError(
            "too_long", f"{width} x {height} pixels: longer than {MAX_ASPECT} times the short side"
        )
    if size == (pixels.shape[1], pixels.shape[0]):
        return np.ascontiguousarray(pixels)
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def encode_jpeg(pixels: Pixels, quality: int = JPEG_QUALITY) -> bytes:
    """A JPEG with colors at half the resolution (4:2:0), as cameras and Pillow write them."""
    encoded: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="420"
    )
    return encoded


def encode_png(pixels: Pixels) -> bytes:
    """An RGB image as the bytes of a PNG file."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def encode_sketch(strokes: Strokes) -> bytes:
    """A one-channel 8-bit PNG: 255 on a stroke, else 0.

    Written by hand, since Pillow and OpenCV try row filters: those gain nothing for two values and
    take ten times as long. Level 2, since its matches unpack twice as fast as plain runs.
    """
    height, width = strokes.shape
    rows = np.zeros((height, 1 + width), np.uint8)  # each row opens with its filter: none
    np.multiply(strokes, 255, out=rows[:, 1:])
    packer = zlib.compressobj(2, zlib.DEFLATED, zlib.MAX_WBITS, 9)
    body = packer.compress(rows.data) + packer.flush()
    size = struct.pack(">II", width, height)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", size + GRAY_8_BITS),
            _chunk(b"IDAT", body),
            _chunk(b"IEND", b""),
        ]
    )


def decode_sketch(png: bytes | memoryview) -> Strokes:
    """1 where a PNG of one channel is above 127, else 0.

    Files of ``encode_sketch`` are only unpacked, in less than half of OpenCV's time; OpenCV reads
    all others. Raises ImageError ``damaged``.
    """
    # Signature, IHDR from byte 8, IDAT from 33 with its data from 41, IEND.
    if png[24:29] == GRAY_8_BITS and png[37:41] == b"IDAT" and len(png) >= 57:
        width, height = struct.unpack_from(">II", png, 16)
        (length,) = struct.unpack_from(">I", png, 33)
        if png[length + 49 : length + 53] == b"IEND":
            try:
                unpacked = zlib.decompress(png[41 : 41 + length], bufsize=height * (1 + width))
            except zlib.error as error:
                raise ImageError("damaged", f"PNG: {error}") from error
            rows = np.frombuffer(unpacked, np.uint8)
            if rows.size == height * (1 + width):
                rows = rows.reshape(height, 1 + width)
                if not rows[:, 0].any():
                    return (rows[:, 1:] > 127).view(np.uint8)
    gray = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE) if len(png) else None
    if gray is None:
        raise ImageError("damaged", "not a PNG that OpenCV can read")
    return (gray > 127).view(np.uint8)


def read_mask(
    data: bytes, *, size: tuple[int, int] | None = None, white_is_hole: bool = True
) -> UInt8[np.ndarray, "height width"]:
    """1 where an image file is white, else 0; with ``white_is_hole`` false, 1 where it is black.

    White is a mean over the channels above 127.5, or 1 in a file of 0 and 1 alone; what is
    transparent counts as black. The image is stretched to ``size`` (height, width) first, if given.
    The result may be all 0. Raises ImageError as ``decode`` does, ``no_white`` for an image with
    pixels between black and white, where white should mark the hole and none is, and
    ``not_a_mask`` for a photograph.
    """
    pixels = decode(data, background="black").pixels
    _refuse_photograph(pixels)
    gray = np.rint(pixels.mean(axis=2)).astype(np.uint8)
    brightest = gray.max()
    if brightest == 1:  # as arrays of labels are saved
        gray *= 255
        brightest = gray.max()
    if white_is_hole and 0 < brightest <= WHITE_ABOVE:
        raise ImageError(
            "no_white",
            f"its brightest pixel is {brightest} of 255, and only above half counts as white: "
            "write 0 and 255",
        )
    if size is not None and gray.shape != size:
        shrinks = gray.shape[0] >= size[0] and gray.shape[1] >= size[1]
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        gray = cv2.resize(gray, size[::-1], interpolation=how).astype(np.uint8, copy=False)
    hole: np.ndarray = ((gray > WHITE_ABOVE) == white_is_hole).astype(np.uint8)
    return hole


def _refuse_photograph(pixels: Pixels) -> None:
    """ImageError ``not_a_mask`` for an image in colors, or mostly in many shades of gray."""
    # Of a part of the pixels, since masks are read while training.
    pixels = pixels[:: max(1, pixels.shape[0] // 256), :: max(1, pixels.shape[1] // 256)]
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    brightest = np.maximum(np.maximum(red, green), blue)
    colored = brightest - np.minimum(np.minimum(red, green), blue) > COLORFUL
    if colored.mean() > MOST_COLORED:
        raise ImageError(
            "not_a_mask",
            f"{colored.mean():.0%} of its pixels have a color, as in a photograph or a hole "
            "painted in red: mark the hole in white on black",
        )
    levels = np.bincount(green.ravel(), minlength=256)[32:224]
    if levels.sum() > MOST_GRAY * colored.size and np.count_nonzero(levels) > 64:
        raise ImageError(
            "not_a_mask",
            f"{levels.sum() / colored.size:.0%} of its pixels are shades of gray, as in a "
            "photograph: mark the hole in white on black",
        )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _scaled(side: int, short_px: int, short: int) -> int:
    return (side * short_px + short // 2) // short


def _decode_jpeg(
    data: bytes, enough_px: int | None, max_pixels: int, color: ColorHandling
) -> Decoded:
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    _refuse_bomb(width, height, max_pixels)
    if colorspace not in ("YCbCr", "RGB", "Gray"):
        simplejpeg.decode_jpeg(data, _native(data))  # raises for damage, which Pillow does not
        raise ValueError(f"{colorspace} is for Pillow")
    bare = not _has_metadata(data)
    orientation = 1 if bare else _orientation(_open(data, max_pixels))
    shortcuts = _shortcuts(width, height, enough_px) if enough_px else {}
    pixels = _upright(simplejpeg.decode_jpeg(data, "RGB", **shortcuts), orientation)
    if orientation > 4:
        width, height = height, width
    converted = pixels
    if color == "srgb" and PROFILE_SEGMENT in data:
        converted = to_srgb(pixels, _open(data, max_pixels).info.get("icc_profile", b""))
    plain = bare and colorspace == "YCbCr" and converted is pixels
    return Decoded(converted, width, height, plain_jpeg=plain)


def _undamaged(data: bytes, warning: str) -> bytes:
    """``data``, with a marker at the end; ImageError where libjpeg's ``warning`` is of lost pixels.

    Harmless are a missing marker at the end, filler before that marker, bytes between the segments
    before the first scan, which every decoder skips, and a damaged color profile.
    """
    # Of a progressive file whole scans may be missing; an arithmetic decoder reads zeros for the
    # rest. So only others can be whole without an end.
    if warning.startswith("Premature end of JPEG file") and not _ends_silently(data):
        try:
            simplejpeg.decode_jpeg(data + END_OF_IMAGE, _native(data))
            return data + END_OF_IMAGE
        except ValueError as error:
            warning = str(error)
    if not warning.startswith(("Corrupt JPEG data", "Premature end")):
        return data
    if (tidy := _without_extras(data)) != data:
        try:
            simplejpeg.decode_jpeg(tidy, _native(tidy))
            return data
        except ValueError as error:
            warning = str(error)
    extra = re.match(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9", warning)
    if extra:
        end = data.rfind(END_OF_IMAGE)
        if set(data[end - int(extra[1]) : end]) in ({0}, {0xFF}):
            return data
    raise ImageError("damaged", f"JPEG: {warning}")


def _without_extras(data: bytes) -> bytes:
    """A JPEG without what no pixel depends on before its first scan (SOS): segments of color
    profiles, and bytes that belong to no segment."""
    segments = [data[start:end] for kind, start, end in _header_segments(data) if kind != APP2]
    return b"".join([data[:2], *segments]) if segments else data


def _ends_silently(data: bytes) -> bool:
    return any(kind in ENDS_SILENTLY for kind, *_ in _header_segments(data))


def _header_segments(data: bytes) -> list[tuple[int, int, int]]:
    """Kind, start and end of every segment of a JPEG; the first scan reaches to the end.

    Nothing where the file has no scan.
    """
    segments: list[tuple[int, int, int]] = []
    at = 2
    while match := MARKER.search(data, at):
        start, kind = match.end() - 2, data[match.end() - 1]
        if kind == START_OF_SCAN:
            return [*segments, (kind, start, len(data))]
        at = match.end()
        if kind != 0x01 and not 0xD0 <= kind <= 0xD9:  # those have no length
            at += int.from_bytes(data[at : at + 2])
            segments.append((kind, start, at))
    return []


def _native(data: bytes) -> str:
    """The colors that libjpeg can decode a JPEG to."""
    return "CMYK" if simplejpeg.decode_jpeg_header(data)[2] in ("CMYK", "YCCK") else "RGB"


def _has_metadata(data: bytes) -> bool:
    """Whether there is a marker of EXIF, XMP or IPTC; coded pixels cannot contain one by chance.

    Compares words at even and at odd offsets: ``in`` takes five times as long, since a JPEG is
    full of FF.
    """
    even = np.frombuffer(data, "<u2", len(data) // 2)
    odd = np.frombuffer(data, "<u2", (len(data) - 1) // 2, offset=1)
    return any((words == marker).any() for words in (even, odd) for marker in (APP1, APP13))


def _shortcuts(width: int, height: int, enough_px: int) -> dict[str, Any]:
    """Arguments that let libjpeg do less for an image that is scaled to half of ``enough_px``.

    The loss stays invisible: at least 41 dB against full decoding, on real images. Scaled DCT is
    used only where both sides come out whole, or the image would shift by up to half a pixel
    (30 dB), and only by powers of two, since other factors take longer than full decoding. Colors
    at half the resolution are not interpolated, since scaling averages them afterwards.
    """
    if min(width, height) < enough_px:
        return {}
    factor = next(
        factor
        for factor in (8, 4, 2, 1)
        if width % factor == height % factor == 0 and min(width, height) >= factor * enough_px
    )
    width, height = width // factor, height // factor
    return {
        "min_width": width,
        "min_height": height,
        "fastupsample": True,
        "buffer": _near_memory(height * width * 3),
    }


def _near_memory(size: int) -> UInt8[np.ndarray, " size"]:
    """``size`` bytes that start at an odd multiple of 16.

    libjpeg-turbo writes to multiples of 32 past the cache, and scaling would have to read them
    from main memory: a tenth of the time that an image takes.
    """
    memory = np.empty(size + 32, np.uint8)
    start = (16 - memory.ctypes.data) % 32
    return memory[start : start + size]


def _decode_npy(data: bytes, max_pixels: int) -> Decoded:
    """Arrays of (1, 3, height, width) bytes, a common form of CelebA-HQ."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:
        raise ImageError("damaged", f"NPY: {_reason(error)}") from error
    channels_first = (
        array.ndim in (3, 4) and array.shape[-3] == 3 and array.shape[:-3] in ((), (1,))
    )
    if array.dtype != np.uint8 or not channels_first:
        raise ImageError(
            "unsupported_mode",
            f"NPY of {array.dtype} {array.shape}: not (1, 3, height, width) bytes",
        )
    pixels = np.ascontiguousarray(array.reshape(array.shape[-3:]).transpose(1, 2, 0))
    _refuse_bomb(pixels.shape[1], pixels.shape[0], max_pixels)
    return Decoded(pixels, width=pixels.shape[1], height=pixels.shape[0])


def _decode_any(data: bytes, max_pixels: int, background: str, color: ColorHandling) -> Decoded:
    image = _open(data, max_pixels)
    with warnings.catch_warnings(action="ignore"):
        try:
            deep_colors = has_16_bits(image)
            image.load()
            orientation = _orientation(image)  # after load, which has turned a TIFF already
            profile = image.info.get("icc_profile") if color == "srgb" else None
            if profile and image.mode == "CMYK":
                image = cmyk_to_srgb(image, profile)
            pixels = _upright(_to_rgb(image, background, deep_colors), orientation)
            if profile:
                pixels = to_srgb(pixels, profile)
        except ImageError:
            raise
        except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, ...
            raise ImageError("damaged", f"{image.format}: {_reason(error)}") from error
    return Decoded(pixels, width=pixels.shape[1], height=pixels.shape[0])


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Open an image and read its header; the pixels are decoded later."""
    with warnings.catch_warnings(action="ignore"):
        try:
            image = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError as error:
            raise ImageError("too_many_pixels", _reason(error)) from error
        except UnidentifiedImageError as error:
            raise ImageError("unknown_format", "not a known image format") from error
        except Exception as error:
            raise ImageError("damaged", _reason(error)) from error
    if image.format == "EPS":
        raise ImageError("unknown_format", "PostScript: a program for Ghostscript, not pixels")
    _refuse_bomb(*image.size, max_pixels)
    return image


def _refuse_bomb(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(
            "too_many_pixels", f"{width} x {height} pixels: more than the limit of {max_pixels}"
        )


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1, upright, for a damaged EXIF block."""
    with warnings.catch_warnings(action="ignore"):
        try:
            found = int(image.getexif().get(ORIENTATION, 1))
        except Exception:
            return 1
    return found if 1 <= found <= 8 else 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    if orientation in (5, 6, 7, 8):
        pixels = np.swapaxes(pixels, 0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _to_rgb(image: Image.Image, background: str, deep_colors: bool) -> Pixels:
    """Convert a band of rows at a time, since a pixel takes up to 16 bytes on the way.

    ``deep_colors`` is whether three channels had 16 bits in the file.
    """
    width, height = image.size
    white = white_of(image) if image.mode.startswith("I") else DEEP_WHITE
    rows = max(1, BAND_PIXELS // width)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = _band_to_rgb(band, background, white)
    if deep_colors and 0 < pixels.max() < 256 * NEARLY_BLACK:
        raise ImageError("unsupported_mode", UNKNOWN_RANGE)
    return pixels


UNKNOWN_RANGE = (
    "more bits than its values use, and it does not say how many (12 in 16, or 8 in 32?): "
    "scale the values to the full range"
)


def has_16_bits(image: Image.Image) -> bool:
    """Whether a file has 16 bits a channel; ask before its pixels are loaded."""
    return ";16" in str(getattr(image, "tile", ""))


def white_of(image: Image.Image) -> int:
    """The value of white in an image of one deep channel.

    Modes are I;16 and I;16B for 16 bits, and I for 32, which Pillow also uses for 16. Raises
    ImageError ``unsupported_mode`` where the range is unknown.
    """
    values = np.asarray(image)  # Pillow's own extremes do not know I;16B
    darkest, brightest = int(values.min()), int(values.max())
    if darkest < 0 or brightest > DEEP_WHITE:
        raise ImageError("unsupported_mode", "one channel of 32 bits: its range is unknown")
    if stated := _stated_white(image):
        if brightest <= stated <= DEEP_WHITE:
            return stated
    elif 0 < brightest < DEEP_WHITE * NEARLY_BLACK and image.format != "PPM":  # PPM says its range
        raise ImageError("unsupported_mode", f"{image.mode}: {UNKNOWN_RANGE}")
    return DEEP_WHITE


def _stated_white(image: Image.Image) -> int | None:
    """The largest value that a TIFF says it can hold, unless that is all that fits."""
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return None
    for tag in (MAX_SAMPLE_VALUE, BITS_PER_SAMPLE):
        value = _first(tags.get(tag))
        if value and tag == BITS_PER_SAMPLE:
            value -= _first(tags.get(SAMPLE_FORMAT)) == SIGNED
            value = 2**value - 1 if value < 16 else None
        if value:
            return int(value)
    return None


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def _band_to_rgb(image: Image.Image, background: str, white: int) -> Pixels:
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        gray = ((deep * 255 + white // 2) // white).astype(np.uint8)
        colors = np.repeat(gray[:, :, None], 3, axis=2)
        if (transparent := image.info.get("transparency")) is not None:
            colors[deep == transparent] = ImageColor.getrgb(background)[:3]
        return colors
    if image.has_transparency_data:
        below = Image.new("RGBA", image.size, background)
        image = Image.alpha_composite(below, image.convert("RGBA"))
    elif image.mode not in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"):
        raise ImageError("unsupported_mode", f"pixels of kind {image.mode} are not supported")
    return np.asarray(image.convert("RGB"))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
